"""The paper's five findings as tests on results, each with its evidence and a verdict (arXiv 2410.06084).

A claim of a difference holds when its interval excludes zero in the claimed direction. A claim of *no*
difference ("reaches the quality of guidance") holds when the interval excludes a loss of more than a
margin, named beforehand: a wide interval around zero is no evidence of equality.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from diverse_cfg.evaluation.results import (
    Estimate,
    Results,
    SystemResult,
    above_line,
    markdown_table,
    mean_estimate,
)
from diverse_cfg.untrusted import markdown

HOLDS, FAILS, OPEN, MISSING = "holds", "fails", "not shown", "not measured"
"""Verdicts: shown; the opposite is shown; the interval allows both; a system or metric is missing."""


@dataclass(frozen=True)
class Arms:
    """Which systems play which part.

    Args:
        base: without guidance.
        guided: the base with the teacher's guidance.
        quality: the student without diversity reward.
        diverse: the student with the diversity reward that is merged with it.
        merges: series of the LERP between the two; its ends may be left out, as they are the two students.
        sweeps: what a user could do without the diversity reward: guidance, temperature. Each is a series,
            or a list of series and systems that count as one sweep.
        uniform: the uniform average of all students, if it was evaluated.
    """

    base: str
    guided: str
    quality: str
    diverse: str
    merges: str
    sweeps: Sequence[str | Sequence[str]] = ()
    uniform: str | None = None

    @property
    def pools(self) -> dict[str, tuple[str, ...]]:
        """Name of a sweep → its series and systems; of several sweeps, all of them together come last."""
        parts = [(sweep,) if isinstance(sweep, str) else tuple(sweep) for sweep in self.sweeps]
        pools = {" with ".join(map(repr, part)): part for part in parts}
        if len(parts) > 1:
            pools["all of these together"] = tuple(dict.fromkeys(name for part in parts for name in part))
        return pools


@dataclass(frozen=True)
class Evidence:
    """One claim and what the numbers say.

    Args:
        claim: in words.
        found: the difference that decides, None if it was not measured.
        verdict: one of `HOLDS`, `FAILS`, `OPEN`, `MISSING`.
    """

    claim: str
    found: Estimate | None
    verdict: str


@dataclass(frozen=True)
class Signature:
    """One of the paper's findings: it is reproduced when every claim of it holds."""

    number: int
    title: str
    evidence: tuple[Evidence, ...]

    @property
    def verdict(self) -> str:
        """The worst verdict among the claims."""
        verdicts = [evidence.verdict for evidence in self.evidence]
        return next(verdict for verdict in (FAILS, MISSING, OPEN, HOLDS) if verdict in verdicts)


def signatures(
    results: Results,
    arms: Arms,
    *,
    quality: str = "adherence",
    diversity: str = "diversity_heldout",
    margin: float = 0.02,
    diversity_margin: float = 0.02,
) -> list[Signature]:
    """The five findings in these results.

    Args:
        results: of a sweep.
        arms: which system is which.
        quality: metric of quality.
        diversity: metric of diversity; under an encoder that was not the reward.
        margin: loss of quality that still counts as "the quality of".
        diversity_margin: distance from the straight line that still counts as "on the line".
    """
    test = _Tests(results)
    base, guided, student, diverse = arms.base, arms.guided, arms.quality, arms.diverse
    merges = merges_of(results, arms)
    front = [row.system.name for row in merges]

    def corner() -> tuple[float, float]:
        return useful_corner(results, arms, diversity, quality)

    return [
        Signature(
            1,
            "Distillation alone reaches the quality of guidance at half the cost, and loses its diversity",
            (
                test.less("its KL to the guided teacher is below the base's", student, base, "kl_teacher"),
                test.no_less("it has the quality of the guided base", student, guided, quality, margin),
                test.less(
                    "it costs fewer decoder rows than the guided base", student, guided, "decoder_rows"
                ),
                test.less("it is less diverse than the base", student, base, diversity),
            ),
        ),
        Signature(
            2,
            "The diversity reward restores diversity at a small price in quality",
            (
                test.more("it is more diverse than the guided base", diverse, guided, diversity),
                test.more("it is more diverse than the base", diverse, base, diversity),
                test.more("it keeps a better quality than the base", diverse, base, quality),
            ),
        ),
        Signature(
            3,
            "Between the two students, diversity follows the straight line and quality lies above it",
            (
                test.on_line("diversity is on the line", merges, diversity, diversity_margin),
                test.above_line("quality is above the line", merges, quality),
            ),
        ),
        Signature(
            4,
            "The merges have a larger hypervolume than guidance and temperature, above the guided base's diversity "
            "and the base's quality",
            tuple(
                test.larger_front(f"larger hypervolume than {name}", front, pool, diversity, quality, corner)
                for name, pool in arms.pools.items()
            )
            or (Evidence("larger hypervolume than guidance and temperature", None, MISSING),),
        ),
        Signature(
            5,
            "The uniform average of all students lies on or near that front",
            (
                test.near_front(
                    "quality of the front at its diversity", arms.uniform, merges, diversity, quality, margin
                ),
            ),
        ),
    ]


def useful_corner(results: Results, arms: Arms, x: str, y: str) -> tuple[float, float]:
    """Where hypervolumes begin: the guided base's diversity, the base's quality.

    A model that is worse than the base, or less diverse than guidance makes it, is of no use: both can be had
    without training. The corner depends on these two systems alone, not on what else was evaluated.

    Raises:
        ValueError: one of the two failed, or has not been evaluated by this metric.
    """
    _require(x, results[arms.guided])
    _require(y, results[arms.base])
    return float(np.nanmean(results[arms.guided].cells[x])), float(np.nanmean(results[arms.base].cells[y]))


def members(results: Results, pool: Sequence[str]) -> list[str]:
    """Names of the comparable systems of some series, or so named.

    Raises:
        ValueError: there is none of one of them.
    """
    found: list[str] = []
    for name in pool:
        rows = [row.system for row in results.usable if not row.flags]
        names = [system.name for system in rows if name in (system.name, system.series)]
        if not names:
            raise ValueError(f"no comparable system is named {name!r} or of that series")
        found += names
    return list(dict.fromkeys(found))


def to_markdown(found: Sequence[Signature]) -> str:
    """A section per finding, with its verdict and its evidence."""
    parts = []
    for signature in found:
        claims = [
            (
                markdown(evidence.claim),
                "–" if evidence.found is None else evidence.found.text(),
                evidence.verdict,
            )
            for evidence in signature.evidence
        ]
        table = markdown_table(["claim", "difference", "verdict"], claims)
        parts.append(f"### {signature.number}. {signature.title}: **{signature.verdict}**\n\n{table}\n")
    return "\n".join(parts)


class _Tests:
    """Claims as tests; what was not measured is said so, and is neither shown nor refuted."""

    def __init__(self, results: Results):
        self.results = results

    def more(self, claim: str, system: str, other: str, metric: str) -> Evidence:
        return self._judged(claim, lambda: self.results.difference(system, other, metric), above=0.0)

    def less(self, claim: str, system: str, other: str, metric: str) -> Evidence:
        return self._judged(claim, lambda: self.results.difference(system, other, metric), below=0.0)

    def no_less(self, claim: str, system: str, other: str, metric: str, margin: float) -> Evidence:
        claim = f"{claim} (a loss of {margin:g} at most)"
        return self._judged(claim, lambda: self.results.difference(system, other, metric), above=-margin)

    def on_line(self, claim: str, merges: Sequence[SystemResult], metric: str, margin: float) -> Evidence:
        def found() -> Estimate:
            return _mean_above_line(merges, metric)

        return self._judged(f"{claim} (within ±{margin:g})", found, above=-margin, below=margin)

    def above_line(self, claim: str, merges: Sequence[SystemResult], metric: str) -> Evidence:
        return self._judged(claim, lambda: _mean_above_line(merges, metric), above=0.0)

    def larger_front(
        self,
        claim: str,
        front: Sequence[str],
        pool: Sequence[str],
        x: str,
        y: str,
        corner: Callable[[], tuple[float, float]],
    ) -> Evidence:
        def found() -> Estimate:
            return self.results.hypervolume_difference(front, members(self.results, pool), x, y, corner())

        return self._judged(claim, found, above=0.0)

    def near_front(
        self, claim: str, system: str | None, merges: Sequence[SystemResult], x: str, y: str, margin: float
    ) -> Evidence:
        claim = f"{claim} (a loss of {margin:g} at most)"
        if system is None:
            return Evidence(claim, None, MISSING)
        return self._judged(claim, lambda: _beside_front(self.results[system], merges, x, y), above=-margin)

    def _judged(
        self,
        claim: str,
        measure: Callable[[], Estimate],
        above: float | None = None,
        below: float | None = None,
    ) -> Evidence:
        try:
            found = measure()
        except ValueError:  # a system failed, is flagged or was not evaluated; or a metric was not measured
            return Evidence(claim, None, MISSING)
        if found.low is None or found.high is None:
            return Evidence(claim, found, OPEN)
        holds = (above is None or found.low > above) and (below is None or found.high < below)
        fails = (above is not None and found.high < above) or (below is not None and found.low > below)
        return Evidence(claim, found, HOLDS if holds else FAILS if fails else OPEN)


def merges_of(results: Results, arms: Arms) -> list[SystemResult]:
    """The comparable systems of a LERP by merge weight; where an end is not among them, the student it is."""
    rows = [row for row in results.usable if row.system.series == arms.merges and not row.flags]
    rows = [row for row in rows if row.system.merge_weight is not None]
    for weight, student in ((0.0, arms.quality), (1.0, arms.diverse)):
        if all(row.system.merge_weight != weight for row in rows):
            rows += [
                replace(row, system=replace(row.system, merge_weight=weight))
                for row in results.usable
                if row.system.name == student and not row.flags
            ]
    return sorted(rows, key=lambda row: row.system.merge_weight or 0.0)


def _ends(merges: Sequence[SystemResult]) -> tuple[SystemResult, list[SystemResult], SystemResult]:
    if len(merges) < 3 or merges[0].system.merge_weight != 0 or merges[-1].system.merge_weight != 1:
        raise ValueError("a LERP needs its two ends and something between")
    return merges[0], list(merges[1:-1]), merges[-1]


def _mean_above_line(merges: Sequence[SystemResult], metric: str) -> Estimate:
    """Mean over the inner merges of v(λ) − (1 − λ)·v(0) − λ·v(1), by prompt."""
    first, inner, last = _ends(merges)
    _require(metric, first, *inner, last)
    return mean_estimate(np.mean([above_line(first, row, last, metric) for row in inner], axis=0))


def _beside_front(row: SystemResult, merges: Sequence[SystemResult], x: str, y: str) -> Estimate:
    """Quality of a system minus that of the LERP where it has the same diversity, by prompt.

    The place on the LERP is found on the means (outside of its range: the nearer end), the difference is
    taken by prompt.
    """
    first, inner, last = _ends(merges)
    points = [first, *inner, last]
    _require(x, row, *points)
    _require(y, row, *points)
    places = [float(np.nanmean(point.cells[x])) for point in points]
    order = sorted(range(len(points)), key=places.__getitem__)
    wanted = float(np.nanmean(row.cells[x]))
    shares = [
        np.interp(wanted, sorted(places), [float(index == k) for index in order]) for k in range(len(points))
    ]
    front = sum(share * point.cells[y] for share, point in zip(shares, points, strict=True))
    return mean_estimate(row.cells[y] - front)


def _require(metric: str, *rows: SystemResult) -> None:
    missing: Iterable[str] = (row.system.name for row in rows if metric not in row.cells)
    for name in missing:
        raise ValueError(f"system {name!r} has no {metric!r} per prompt")
