"""As many threads as help.

A parallel operation ends when its slowest thread does. Where another program has one of the cores, that thread
waits for the scheduler, some milliseconds each time, and a decoder step has hundreds of operations: fewer threads
are several times as fast then. How many is measured on the steps themselves, a few of which try another number.
"""

import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

_SHARE = 0.003  # of the time, for trials that turn out slower
_FEWER, _MORE = 0.9, 0.98  # of the usual time: what fewer and more threads must stay below
_SLOW = 2.0  # times the usual time of the last two steps: the machine has become busy
_WAIT = 2e-3  # seconds of an operation of microseconds: one of its threads waited for a core
_AGAIN = 0.5  # seconds until that is looked at again
_lock = threading.Lock()
_blocks, _callers = 0, 1  # blocks that run now, and the number of threads that was set before them


def _waits(threads: int) -> bool:
    """Whether so many threads wait for a core: small operations, which tell within a few milliseconds."""
    import torch

    torch.set_num_threads(threads)
    numbers = torch.zeros(threads << 15)
    for _ in range(40):
        started = time.perf_counter()
        numbers.add_(1)
        if time.perf_counter() - started > _WAIT:
            return True
    return False


class Threads:
    """The number of threads for steps of one kind, as measured so far; never more than the caller has set.

    Args:
        like: steps of another kind, whose number is the first guess.
        clock: seconds.
        waits: whether so many threads wait for a core.
    """

    def __init__(
        self,
        like: "Threads | None" = None,
        clock: Callable[[], float] = time.perf_counter,
        waits: Callable[[int], bool] = _waits,
    ) -> None:
        self.like, self.clock, self.waits = like, clock, waits
        self.chosen: int | None = None
        self.slower: dict[int, float] = {}  # threads → how many times as long as the chosen ones they took
        self.total = self.spent = 0.0  # seconds in all, and of those what trials cost
        self.looked: dict[int, float] = {}  # threads → when it was found out whether they wait

    @contextmanager
    def measured(self, device: str) -> Iterator[Callable[..., None]]:
        """Measure the steps of a block, after which the caller's number of threads is set again.

        Nothing is changed on a GPU, where one thread was set, and under `torch.use_deterministic_algorithms`:
        rounding may depend on the number of threads.

        Yields:
            A function to call after every step, with the amount of work that it was.
        """
        import torch

        global _blocks, _callers
        with _lock:
            # In a block of another Python thread, torch tells a new one that block's number.
            callers = _callers = _callers if _blocks else torch.get_num_threads()
            _blocks += 1
        still = device != "cpu" or callers < 2 or torch.are_deterministic_algorithms_enabled()
        most = 1 if still else min(callers, _cores())
        try:
            yield (lambda work=1.0: None) if still else _Block(self, most, torch.set_num_threads)
        finally:
            with _lock:
                _blocks -= 1
            if torch.get_num_threads() != callers:
                torch.set_num_threads(callers)


class _Block:
    """What is usual in one block, and the trial that runs."""

    def __init__(self, kind: Threads, most: int, set_threads: Callable[[int], None]) -> None:
        self.kind, self.set_threads = kind, set_threads
        self.ladder = sorted({most, max(1, most - 1), *(1 << n for n in range((most - 1).bit_length()))})
        self.usual: deque[float] = deque(maxlen=7)  # seconds per unit of work, newest last
        self.trial: int | None = None
        self.tried: list[float] = []
        self.threads = 0  # that are set; 0 where that is not known
        self.current = min(kind.chosen or (kind.like and kind.like.chosen) or most, most)
        while self.current > 1 and not self._has_looked(self.current) and self._waits(self.current):
            kind.chosen = self.current = max(n for n in self.ladder if n < self.current)
        self._start()

    def __call__(self, work: float = 1.0) -> None:
        spent, kind = self.kind.clock() - self.started, self.kind
        kind.total += spent
        if self.trial is None:
            self.usual.append(spent / work)
            self.trial = self._worth_trying(work)
        else:
            self.tried.append(spent / work)
            ratio, fewer = self.tried[-1] / _typical(self.usual), self.trial < self.current
            kind.spent += max(0.0, spent - spent / ratio)
            if ratio > (_FEWER if fewer else _MORE):
                kind.slower[self.trial], self.trial, self.tried = ratio, None, []
            elif len(self.tried) == (2 if fewer else 4):  # beside others, more threads are lucky at times
                kind.slower = {self.current: 1 / ratio}
                kind.chosen = self.current = self.trial
                self.usual, self.trial, self.tried = deque(self.tried, maxlen=7), None, []
        self._start()

    def _start(self) -> None:
        if (threads := self.trial or self.current) != self.threads:
            self.set_threads(threads)
            self.threads = threads
        self.started = self.kind.clock()

    def _worth_trying(self, work: float) -> int | None:
        """Another number of threads, if a trial of it can be paid for, or if steps have become slow."""
        if len(self.usual) < 4:
            return None
        kind, (*before, first, second) = self.kind, self.usual
        if first + second > 2 * _SLOW * _typical(before):
            return max((n for n in self.ladder if n <= self.current // 2), default=None)
        # Nobody knows what the first trial costs: a short step is worth it, of long ones the worst is assumed.
        unknown = {n: self.current / n if kind.like else 1.0 for n in self.ladder if n < self.current}
        extra = {n: max(0.0, kind.slower.get(n, times) - 1) for n, times in unknown.items()}
        # More threads are only tried where they do not wait, and then cost nothing.
        extra |= {n: 0.0 for n in self.ladder if n > self.current and not self._has_looked(n)}
        trial = min(extra, key=lambda n: (extra[n], n in kind.slower, -n), default=self.current)
        price = extra.get(trial, math.inf) * _typical(self.usual) * work
        payable = kind.spent + price <= _SHARE * kind.total
        return trial if payable and (trial < self.current or not self._waits(trial)) else None

    def _has_looked(self, threads: int) -> bool:
        return self.kind.clock() - self.kind.looked.get(threads, -math.inf) <= _AGAIN

    def _waits(self, threads: int) -> bool:
        self.threads, self.kind.looked[threads] = 0, self.kind.clock()
        return self.kind.waits(threads)


def _typical(seconds: Sequence[float]) -> float:
    """The mean without the longest: what many short waits cost counts, a single hiccup does not."""
    return (sum(seconds) - max(seconds)) / (len(seconds) - 1)


def available_cores(groups: str = "/sys/fs/cgroup", own: str = "/proc/self/cgroup") -> int:
    """Cores that this process may use: of the machine, of its affinity, of its container's quota (at least 1)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = float(len(affinity(0)) if affinity else os.cpu_count() or 1)
    lines = Path(own).read_text().splitlines() if Path(own).is_file() else []
    for place in {"", *(line.split(":", 2)[2].strip("/") for line in lines)}:
        for root in (Path(groups), Path(groups, "cpu")):  # version 2 of control groups, and version 1
            levels = (root / place, *(root / place).parents)
            cores = min(cores, *(_quota(level) for level in levels if level.is_relative_to(root)))
    return max(1, int(cores))


_cores = cache(available_cores)  # half a millisecond of files, which a short batch would notice


def _quota(group: Path) -> float:
    for files in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        try:
            quota, period = map(int, " ".join((group / file).read_text() for file in files).split())
            return quota / period if quota > 0 else math.inf
        except (OSError, ValueError):  # not there, or "max"
            continue
    return math.inf


SAMPLING = Threads()
EVALUATION = Threads(like=SAMPLING)
