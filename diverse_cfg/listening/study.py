"""A blind listening test: trials, votes, win rates (the paper's study, arXiv 2410.06084).

Two questions are asked side by side: which of two *clips* is better (quality), and which of two *pairs of
clips* is more diverse (diversity; one clip alone has none). `make_study` writes a folder that shows nothing
of the systems: audio under opaque names, `trials.json` for whoever plays it, and `key.json`, which says
what was what and is read only to count. Votes are lines appended to a file, safely by several listeners at
once.

    win rate = (W + T/2) / (W + L + T)
"""

import fcntl
import hashlib
import json
import os
import random
import shutil
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path

import torch
from scipy.stats import beta

from diverse_cfg.atomic import new_folder, write_text, writing
from diverse_cfg.evaluation.cache import digest
from diverse_cfg.evaluation.generations import describe
from diverse_cfg.evaluation.results import Estimate, Results
from diverse_cfg.evaluation.sweep import Sweep, kept_codes, write_audio
from diverse_cfg.functional.statistics import bootstrap_mean
from diverse_cfg.untrusted import checked_name, inside

QUESTIONS = {
    "quality": "Which clip is better: its sound, how well it fits the text, its music?",
    "diversity": "Which pair of clips is more diverse: in which pair do the two clips differ more?",
}
CLIPS = {"quality": 1, "diversity": 2}
"""Clips on each side of a trial."""

ANSWERS = {"left": 0.0, "same": 0.5, "right": 1.0}

TRIALS_FILE, KEY_FILE, VOTES_FILE = "trials.json", "key.json", "votes.jsonl"


@dataclass(frozen=True)
class Trial:
    """One comparison, as a listener sees it.

    Args:
        id: of the trial.
        kind: "quality" or "diversity".
        prompt: what both sides were made from.
        left, right: files of the clips, relative to the study's folder.
    """

    id: str
    kind: str
    prompt: str
    left: tuple[str, ...]
    right: tuple[str, ...]

    def __post_init__(self) -> None:
        checked_name(self.id, "the id of a trial")
        if self.kind not in CLIPS or not len(self.left) == len(self.right) == CLIPS[self.kind]:
            raise ValueError(f"trial {self.id}: {self.kind!r} is no kind of trial, or has other clips")


@dataclass(frozen=True)
class Vote:
    """One answer.

    Args:
        trial: id of the trial.
        listener: who voted, any name.
        answer: "left", "same" or "right", as the trial has its sides.
    """

    trial: str
    listener: str
    answer: str

    def __post_init__(self) -> None:
        if not isinstance(self.trial, str) or not isinstance(self.listener, str):
            raise ValueError(f"trial={self.trial!r} and listener={self.listener!r} must be texts")
        if not isinstance(self.answer, str) or self.answer not in ANSWERS:
            raise ValueError(f"answer={self.answer!r} must be one of {', '.join(ANSWERS)}")
        if not self.listener.strip():
            raise ValueError("a vote needs a listener: enter any name")


def make_study(
    results: Results,
    sweep: Sweep,
    folder: str | os.PathLike,
    pairs: Sequence[tuple[str, str]],
    *,
    num_quality: int,
    num_diversity: int,
    seed: int = 0,
) -> Path:
    """Write a study: trials of each pair of systems on the first prompts, blind and in random order.

    Args:
        results: of the sweep.
        sweep: that made them, with at least 2 clips per prompt for diversity.
        folder: new.
        pairs: systems to compare, e.g. ("merge λ=0.5", "base γ=3").
        num_quality: prompts whose single clips are compared (the paper: 101, for each pair of systems).
        num_diversity: prompts whose pairs of clips are compared (the paper: 50).
        seed: of sides and order.

    Returns:
        The folder.

    Raises:
        FileExistsError: the folder is there already.
        ValueError: a system that is not there or failed, more prompts than there are, too few clips, a sweep
            other than the one that made the results, or clips that its cache does not have: nothing is
            generated.
    """
    folder = Path(folder)
    wanted = {"quality": num_quality, "diversity": num_diversity}
    _check_study(results, sweep, pairs, wanted)
    chosen = [results[name] for name in dict.fromkeys(name for pair in pairs for name in pair)]
    shuffle = random.Random(seed)
    trials, key = [], {}
    with new_folder(folder) as incomplete:
        files = write_audio(
            Results(results.prompts, chosen),
            sweep,
            incomplete / "systems",
            max(wanted.values()),
            2 if num_diversity else 1,
        )
        (incomplete / "audio").mkdir()
        for kind, count in wanted.items():
            for (first, second), prompt in ((pair, prompt) for pair in pairs for prompt in range(count)):
                left, right = (first, second) if shuffle.random() < 0.5 else (second, first)
                words = f"{seed}/{kind}/{first}/{second}/{prompt}".encode()
                name = hashlib.blake2b(words, digest_size=5).hexdigest()
                sides: dict[str, list[str]] = {"left": [], "right": []}
                for side, system in (("left", left), ("right", right)):
                    for number, file in enumerate(files[system, prompt][: CLIPS[kind]]):
                        sides[side].append(f"audio/{name}-{side}-{number}.wav")  # which tells nothing
                        shutil.copyfile(incomplete / "systems" / file, incomplete / sides[side][-1])
                trials.append({"id": name, "kind": kind, "prompt": results.prompts[prompt], **sides})
                key[name] = {"left": left, "right": right}
        shutil.rmtree(incomplete / "systems")
        shuffle.shuffle(trials)
        for name, content in ((TRIALS_FILE, trials), (KEY_FILE, key)):
            write_text(incomplete / name, json.dumps(content, indent=1, ensure_ascii=False))
    return folder


def load_trials(folder: str | os.PathLike) -> list[Trial]:
    """Trials of a study.

    Raises:
        FileNotFoundError: the folder is no study.
        ValueError: the list of trials was damaged, or names files elsewhere.
    """
    path = Path(folder) / TRIALS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} is no listening test: it has no {TRIALS_FILE}")
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        trials = [Trial(**{**row, "left": tuple(row["left"]), "right": tuple(row["right"])}) for row in rows]
        for trial in trials:
            for file in (*trial.left, *trial.right):
                inside(folder, file)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path} is not what `listen make` wrote ({error}): copy the study again") from error
    return trials


class Votes:
    """The votes of a study: lines that are appended under a lock, one listener's earlier answers found again.

    Args:
        folder: of the study.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)
        self.trials = {trial.id: trial for trial in load_trials(folder)}
        self.path = self.folder / VOTES_FILE

    def add(self, vote: Vote) -> None:
        """Append a vote; it is on the disk when this returns.

        Raises:
            ValueError: a trial that is not in the study, or that this listener has answered.
        """
        if not self.add_new([vote]):
            raise ValueError(f"{vote.listener} has answered trial {vote.trial} already")

    def add_new(self, votes: Sequence[Vote]) -> int:
        """Append those votes that are not there yet, in one piece; they are on the disk when this returns.

        Returns:
            How many votes are new.

        Raises:
            ValueError: a trial that is not in the study; then none is appended.
        """
        unknown = [vote.trial for vote in votes if vote.trial not in self.trials]
        if unknown:
            raise ValueError(f"the study has no trial {unknown[0]!r}")
        with writing(self.path), open(self.path, "ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # let go when the file is closed
            file.seek(0)
            content = file.read()
            answered = {(vote.trial, vote.listener) for vote in self._parse(content)}
            new = [vote for vote in votes if (vote.trial, vote.listener) not in answered]
            # ASCII: no name can end a line, and no line can be cut inside a letter.
            lines = "".join(json.dumps(asdict(vote), ensure_ascii=True) + "\n" for vote in new)
            # A line that was cut off by a crash must not swallow the next.
            between = "\n" if lines and content and not content.endswith(b"\n") else ""
            file.write((between + lines).encode("ascii"))
            file.flush()
            os.fsync(file.fileno())
        return len(new)

    def all(self) -> list[Vote]:
        """Every vote; lines that hold none (cut off by a crash, edited by hand) are left out with a warning."""
        return self._parse(self.path.read_bytes()) if self.path.is_file() else []

    def _parse(self, content: bytes) -> list[Vote]:
        votes: dict[tuple[str, str], Vote] = {}
        bad = []
        for number, line in enumerate(content.split(b"\n"), start=1):
            if not line.strip():
                continue
            try:
                vote = Vote(**json.loads(line))
                if vote.trial not in self.trials:
                    raise ValueError(f"the study has no trial {vote.trial!r}")
                if (vote.trial, vote.listener) in votes:
                    raise ValueError(f"{vote.listener} has answered trial {vote.trial} in a line above")
            except (
                ValueError,
                TypeError,
                RecursionError,
            ) as error:  # no JSON or UTF-8, other names or values
                bad.append(f"line {number} ({error})")
            else:
                votes[vote.trial, vote.listener] = vote
        if bad:
            warnings.warn(f"{self.path}: left out, for they hold no vote: {', '.join(bad)}", stacklevel=3)
        return list(votes.values())

    def remaining(self, listener: str) -> list[Trial]:
        """Trials that a listener has not answered, in an order of their own."""
        answered = {vote.trial for vote in self.all() if vote.listener == listener}
        order = list(self.trials.values())
        random.Random(listener.encode("utf-8", "surrogatepass")).shuffle(order)
        return [trial for trial in order if trial.id not in answered]


@dataclass(frozen=True)
class _WinRate:
    """How often a system won against another.

    Args:
        kind: "quality" or "diversity".
        system, other: who against whom.
        wins, ties, losses: votes.
        rate: (W + T/2) / (W + L + T), with an interval; without one for a single prompt.
        listeners: how many voted.
        new_listeners: whether the interval holds for new listeners as well as new prompts; otherwise it holds
            for new prompts and these listeners.
    """

    kind: str
    system: str
    other: str
    wins: int
    ties: int
    losses: int
    rate: Estimate
    listeners: int
    new_listeners: bool


def win_rates(folder: str | os.PathLike) -> list[_WinRate]:
    """Count the votes of a study, each pair of systems once, the first of the alphabet against the other.

    All votes on one prompt are one cluster of the bootstrap. Three listeners or more who answered everything
    are resampled too, so that the interval holds for new listeners; otherwise it holds for these.

    Raises:
        FileNotFoundError: no study, or no key.
    """
    votes = Votes(folder)
    path = votes.folder / KEY_FILE
    try:
        key: Mapping[str, Mapping[str, str]] = json.loads(path.read_text(encoding="utf-8"))
        lacking = [name for name in votes.trials if not {"left", "right"} <= key[name].keys()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is not the key of this study ({error!r}): copy it again") from error
    assert not lacking, lacking
    scores: dict[tuple[str, str, str], list[tuple[str, str, float]]] = {}
    for vote in votes.all():
        sides, trial = key[vote.trial], votes.trials[vote.trial]
        system, other = sorted(sides.values())
        right_won = ANSWERS[vote.answer]
        score = right_won if sides["right"] == system else 1 - right_won
        scores.setdefault((trial.kind, system, other), []).append((trial.prompt, vote.listener, score))
    return [_win_rate(*names, entries) for names, entries in sorted(scores.items())]


def _win_rate(kind: str, system: str, other: str, entries: list[tuple[str, str, float]]) -> _WinRate:
    prompts, names, values = (list(column) for column in zip(*entries, strict=True))
    wins, ties, losses = (values.count(score) for score in (1.0, 0.5, 0.0))
    number, distinct, listeners = (wins + ties / 2) / len(values), len(set(prompts)), len(set(names))
    rate, crossed = Estimate(number, num_prompts=distinct), False
    if distinct > 1:
        crossed = listeners >= 3 and len(set(zip(prompts, names, strict=True))) == distinct * listeners
        interval = bootstrap_mean(torch.tensor(values), prompts, names if crossed else None)
        rate = Estimate(*interval, num_prompts=distinct)
        if rate.low == rate.high:  # nothing varies, so a bootstrap cannot tell how little is known
            rate, crossed = Estimate(number, *_exact_interval(number, distinct), num_prompts=distinct), False
    return _WinRate(kind, system, other, wins, ties, losses, rate, listeners, crossed)


def _exact_interval(rate: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of `count` independent prompts (Clopper & Pearson 1934), with k = rate·count.

        low = B(0.025; k, count − k + 1),   high = B(0.975; k + 1, count − k)        (B: quantile of a Beta)

    A tie counts as half a win, which errs on the wide side: no score between 0 and 1 varies more than a win
    or loss of the same mean.
    """
    k = rate * count
    low = 0.0 if k <= 0 else float(beta.ppf(0.025, k, count - k + 1))
    high = 1.0 if k >= count else float(beta.ppf(0.975, k + 1, count - k))
    return low, high


def _check_study(
    results: Results, sweep: Sweep, pairs: Sequence[tuple[str, str]], wanted: Mapping[str, int]
) -> None:
    if not pairs:
        raise ValueError("name at least one pair of systems to compare")
    for first, second in pairs:
        if first == second:
            raise ValueError(f"{first!r} cannot be compared with itself")
        for name in (first, second):
            if not results[name].ok:
                raise ValueError(f"system {name!r} failed and cannot be heard: {results[name].error}")
    for kind, count in wanted.items():
        if not 0 <= count <= len(results.prompts):
            raise ValueError(
                f"{count} {kind} trials per pair of systems, but there are {len(results.prompts)} prompts"
            )
    if not any(wanted.values()):
        raise ValueError("the study has no trials: ask for quality, diversity, or both")
    if wanted["diversity"] and sweep.clips.num_generations < 2:
        raise ValueError("diversity is heard in pairs of clips: evaluate with num_generations >= 2")
    # The texts of a study come from the results and its audio from the sweep: the two must be of one piece.
    again = "set it as it was, or run `diverse-cfg evaluate` with this configuration again"
    clips = sweep.clips
    for number, (ours, theirs) in enumerate(zip_longest(clips.prompts, results.prompts), start=1):
        if ours != theirs:
            raise ValueError(
                f"prompt {number} of the configuration is {ours!r} and of the results {theirs!r} (settings "
                f"prompts, prompts_split, prompt_column, num_prompts): {again}"
            )
    for name in ("num_generations", "num_frames", "seeds"):
        value = list(clips.seeds) if name == "seeds" else getattr(clips, name)
        found = results.settings.get(name, value)
        if found != value:
            setting = "num_frames (clip_seconds)" if name == "num_frames" else name
            raise ValueError(f"{setting} is {value} in the configuration and {found} in the results: {again}")
    recorded = results.settings.get("clips", {})
    for name in dict.fromkeys(name for pair in pairs for name in pair):
        system = results[name].system
        now = digest(describe(system, system.replicates[0], clips, clips.seeds[0]))
        if now != recorded.get(name, [now])[0]:
            raise ValueError(
                f"system {name!r} is not what the results were made from: its weights, or how they are sampled, "
                "have changed since; run `diverse-cfg evaluate` with this configuration again"
            )
        kept_codes(system, sweep)
