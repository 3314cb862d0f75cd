"""The number of threads follows what steps take, on a clock of our own; real threads are set and set back."""

import contextlib
import threading

import pytest
import torch

from diverse_cfg import threads as module
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.sampler.rollout import sample_codes
from diverse_cfg.threads import SAMPLING, Threads, _Block, available_cores
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


class Machine:
    """Steps that take as long as `seconds(threads)` says, on a clock of their own.

    `seconds` may be changed meanwhile. Looking whether threads wait costs a moment, and `waits(threads)` says it.
    """

    def __init__(self, seconds, most, waits=lambda threads: False, like=None):
        self.seconds, self.most, self.waits, self.now, self.threads = seconds, most, waits, 0.0, most
        self.kind = Threads(like, clock=lambda: self.now, waits=self.look)
        self.used = []

    def look(self, threads):
        self.now += 0.002
        return self.waits(threads)

    def set(self, threads):
        self.threads = threads

    def run(self, *works):
        """Seconds of a block of steps of so much work each; of equal steps if it is one number."""
        started, done = self.now, _Block(self.kind, self.most, self.set)
        for work in works if len(works) > 1 else [1] * works[0]:
            self.now += self.seconds(self.threads) * work
            self.used.append(self.threads)
            done(work)
        return self.now - started


def idle(threads):
    """Computing is shared, reading memory is not."""
    return 0.004 + 0.004 / threads


def with_one_busy_core(cores, wait=0.05):
    return lambda threads: idle(threads) + (wait if threads >= cores else 0.0)


@pytest.mark.parametrize("most", [2, 3, 4, 8, 16])
def test_idle_cores_lose_nothing(most):
    """At most 2 % of a single clip's time, and of a long training's."""
    machine = Machine(idle, most)
    assert machine.run(78) < 1.02 * (78 * idle(most) + 0.002)
    assert sum(machine.run(78) for _ in range(50)) < 1.02 * 50 * 78 * idle(most)
    assert machine.kind.chosen in (None, most)


@pytest.mark.parametrize("most", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("seen", [False, True])
def test_one_busy_core_costs_at_most_twice(most, seen):
    """Fault: 32 clips took 4 to 5 times as long. Also where looking at small operations does not show it."""
    machine = Machine(with_one_busy_core(most), most, lambda threads: seen and threads >= most)
    if seen:
        assert machine.run(78) < 2 * 78 * idle(most)
    assert sum(machine.run(78) for _ in range(5)) < 2 * 5 * 78 * idle(most)
    assert machine.kind.chosen < most


def test_a_core_that_becomes_busy_and_idle_again():
    """Fault: a choice that is made once."""
    machine = Machine(lambda threads: 0.01 / threads, 2)
    machine.seconds = lambda threads: 0.05 if threads == 2 and len(machine.used) >= 200 else 0.01 / threads
    machine.run(400)
    assert machine.threads == machine.kind.chosen == 1
    assert machine.used[200:].count(2) <= 6, "at once, though one thread was known to take twice as long"
    machine.seconds = lambda threads: 0.01 / threads
    machine.run(2000)
    assert machine.kind.chosen == 2 and machine.used[-300:].count(2) > 290


def test_several_busy_cores():
    """Fault: one thread fewer, which helps as little, is tried again and again, and half of them never."""
    machine = Machine(lambda threads: 0.01 / threads, 8)
    machine.seconds = lambda threads: (
        0.01 / threads + (0.02 if threads > 5 and len(machine.used) >= 3000 else 0)
    )
    machine.run(3200)
    assert sum(threads > 5 for threads in machine.used[3000:]) < 20


@pytest.mark.parametrize("most", [2, 16])
def test_short_batches_find_idle_cores_again(most):
    """Fault: a batch is over before it may look again, and looking at what is set counts as looking at more."""
    busy = [True]
    machine = Machine(idle, most, lambda threads: busy[0] and threads >= most)
    machine.run(20)
    assert machine.kind.chosen < most
    busy.clear(), busy.append(False)
    for _ in range(100):
        machine.run(20)
    assert machine.seconds(machine.kind.chosen) < 1.02 * idle(most)


def test_many_short_waits_count_and_a_hiccup_does_not():
    machine, steps = Machine(idle, 2), iter(range(10**6))
    machine.seconds = lambda threads: idle(threads) + (0.5 if next(steps) == 300 else 0.0)
    machine.run(600)
    assert machine.used[320:].count(1) < 10
    machine.seconds = lambda threads: idle(threads) + (0.02 if threads == 2 and next(steps) % 2 else 0.0)
    machine.run(600)
    assert machine.used[-300:].count(2) < 20


def test_steps_of_different_size_are_compared_by_their_work():
    """Fault: a last, smaller batch that was tried with fewer threads seems fast."""
    machine = Machine(lambda threads: 1.0 / threads, 2)
    machine.run(*[64] * 4, *[4] * 100)
    assert machine.kind.chosen in (None, 2) and machine.used.count(1) <= 3


def test_long_steps_try_nothing_that_cannot_be_paid_for():
    """An evaluation has a few steps of seconds: half the threads for one of them would cost it percents."""
    sampling = Machine(idle, 2)
    machine = Machine(lambda threads: 2.0 / threads, 2, like=sampling.kind)
    machine.run(40)
    assert machine.used == [2] * 40
    sampling.kind.chosen = 1  # it is busy: the first guess
    machine.run(3)
    assert machine.used[40:] == [1] * 3
    machine.run(30)
    assert machine.kind.chosen == 2


@contextlib.contextmanager
def set_to(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def four_cores(monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 4)


def test_the_callers_number_is_the_most_and_is_set_again(four_cores):
    with set_to(3):
        kind = Threads(waits=lambda threads: threads > 2)
        with pytest.raises(KeyError), kind.measured("cpu") as done:
            assert torch.get_num_threads() == 2
            done()
            raise KeyError
        assert torch.get_num_threads() == 3 and module._blocks == 0
        monkey = Threads(waits=lambda threads: threads > 2)
        monkey.chosen = 8
        with monkey.measured("cpu"):
            assert torch.get_num_threads() <= 3
    with set_to(8), Threads(waits=lambda threads: False).measured("cpu"):
        assert torch.get_num_threads() == 4, "a quota is the most, too"


@pytest.mark.parametrize("why", ["gpu", "one thread", "deterministic"])
def test_where_nothing_is_changed(why, four_cores):
    kind = Threads(waits=lambda threads: pytest.fail("looked"))
    torch.use_deterministic_algorithms(why == "deterministic")
    try:
        with set_to(1 if why == "one thread" else 2):
            before = torch.get_num_threads()
            with kind.measured("cuda" if why == "gpu" else "cpu") as done:
                for _ in range(20):
                    done()
                    assert torch.get_num_threads() == before
    finally:
        torch.use_deterministic_algorithms(False)


def test_two_python_threads_leave_the_callers_number(four_cores):
    """A slider that samples while another sample runs: nobody is left with the other's number."""
    inside, leave, seen = threading.Event(), threading.Event(), []
    kind = Threads(waits=lambda threads: threads > 1)

    def other():
        with kind.measured("cpu"):
            inside.set()
            leave.wait(60)
        seen.append(torch.get_num_threads())

    with set_to(2):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(60)
        with kind.measured("cpu") as done:
            done()
            assert torch.get_num_threads() == 1
            leave.set()
            thread.join(60)
        assert seen == [2] and torch.get_num_threads() == 2


def test_codes_do_not_depend_on_the_number_of_threads(monkeypatch, four_cores):
    """The race is decided by numbers that rounding hardly moves; the loop changes its threads at every step here."""
    model = load_policy(tiny_musicgen())
    condition = encode_text(model, tiny_processor(), PROMPTS)
    with set_to(1):
        wanted = sample_codes(model, condition, 30, return_logps=True)
    used = []

    def alternately(block, work=1.0):
        used.append(torch.get_num_threads())
        torch.set_num_threads(1 + len(used) % 3)

    monkeypatch.setattr(_Block, "__call__", alternately)
    with set_to(3):
        found = sample_codes(model, condition, 30, return_logps=True)
        assert torch.get_num_threads() == 3
    assert {1, 2, 3} <= set(used)
    assert torch.equal(found.codes, wanted.codes)
    torch.testing.assert_close(found.logps, wanted.logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("files", "own", "cores"),
    [
        ({}, "", None),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({"cpu.max": "100000 100000\n"}, "0::/\n", 1),
        ({"a/cpu.max": "50000 100000\n", "a/b/cpu.max": "max 100000\n"}, "0::/a/b\n", 1),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "2:cpu,cpuacct:/\n", None),
        ({"cpu/x/cpu.cfs_quota_us": "90000\n", "cpu/x/cpu.cfs_period_us": "50000\n"}, "2:cpu:/x\n", 1),
        ({"other/cpu.max": "1 100000\n", "cpu.max": "x"}, "0::/a:b\n", None),
    ],
)
def test_quotas_of_containers(tmp_path, monkeypatch, files, own, cores):
    """Fault: 64 threads in a container that may use two cores. The group, and every group that it lies in."""
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: range(7), raising=False)
    for name, text in files.items():
        (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "groups" / name).write_text(text)
    (tmp_path / "own").write_text(own)
    assert available_cores(str(tmp_path / "groups"), str(tmp_path / "own")) == (cores or 7)
    assert available_cores(str(tmp_path / "groups"), str(tmp_path / "gone")) >= 1
    assert SAMPLING.chosen is None or SAMPLING.chosen >= 1
