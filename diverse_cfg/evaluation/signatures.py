"""The paper's five findings as tests on results, each with its evidence and a verdict (arXiv 2410.06084).

A claim of a difference holds when its interval excludes zero in the claimed direction. A claim of *no*
difference ("reaches the quality of guidance") holds when the interval excludes a loss of more than a
margin, named beforehand: a wide interval around zero is no evidence of equality.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from diverse_cfg.evaluation.results import (
    Estimate,
    Results,
    SystemResult,
    above_line,
    lerp_ends,
    markdown_table,
    mean_estimate,
)
from diverse_cfg.untrusted import markdown

HOLDS, FAILS, OPEN, MISSING = "holds", "fails", "not shown", "not measured"
"""Verdicts: shown; the opposite is shown; the interval allows both; a system or metric is missing."""

_MARGIN = 0.02
"""Loss of quality that still counts as "the quality of", and distance from a straight line that is still on it."""

_TITLES = (
    "Distillation alone reaches the quality of guidance at half the cost, and loses its diversity",
    "The diversity reward restores diversity at a small price in quality",
    "Between the two students, diversity follows the straight line and quality lies above it",
    "The merges have a larger hypervolume than guidance and temperature, above the guided base's diversity and the "
    "base's quality",
    "The uniform average of all students lies on or near that front",
)


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
    sweeps: Sequence[str | Sequence[str]] | None = None
    uniform: str | None = None

    @property
    def pools(self) -> dict[str, tuple[str, ...]]:
        """Name of a sweep → its series and systems; of several sweeps, all of them together come last."""
        parts = [(sweep,) if isinstance(sweep, str) else tuple(sweep) for sweep in self.sweeps or ()]
        pools = {" with ".join(map(repr, part)): part for part in parts}
        if len(parts) > 1:
            pools["all of these together"] = tuple(dict.fromkeys(name for part in parts for name in part))
        return pools


@dataclass(frozen=True)
class _Evidence:
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
    evidence: tuple[_Evidence, ...]

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
) -> list[Signature]:
    """The five findings in these results.

    Args:
        results: of a sweep.
        arms: which system is which.
        quality: metric of quality.
        diversity: metric of diversity; under an encoder that was not the reward.
    """
    base, guided, student, diverse = arms.base, arms.guided, arms.quality, arms.diverse
    merges = merges_of(results, arms)
    kept = f"(a loss of {_MARGIN:g} at most)"

    def more(claim: str, system: str, other: str, metric: str, by: float = 0.0) -> _Evidence:
        return _claimed(claim, lambda: results.difference(system, other, metric), above=by)

    def less(claim: str, system: str, other: str, metric: str) -> _Evidence:
        return _claimed(claim, lambda: results.difference(system, other, metric), below=0.0)

    def larger_front(pool: Sequence[str]) -> Estimate:
        front, corner = [row.system.name for row in merges], useful_corner(results, arms, diversity, quality)
        return results.hypervolume_difference(front, members(results, pool), diversity, quality, corner)

    evidence = (
        (
            less("its KL to the guided teacher is below the base's", student, base, "kl_teacher"),
            more(f"it has the quality of the guided base {kept}", student, guided, quality, by=-_MARGIN),
            less("it costs fewer decoder rows than the guided base", student, guided, "decoder_rows"),
            less("it is less diverse than the base", student, base, diversity),
        ),
        (
            more("it is more diverse than the guided base", diverse, guided, diversity),
            more("it is more diverse than the base", diverse, base, diversity),
            more("it keeps a better quality than the base", diverse, base, quality),
        ),
        (
            _claimed(
                f"diversity is on the line (within ±{_MARGIN:g})",
                lambda: _mean_above_line(merges, diversity),
                above=-_MARGIN,
                below=_MARGIN,
            ),
            _claimed("quality is above the line", lambda: _mean_above_line(merges, quality), above=0.0),
        ),
        tuple(
            _claimed(f"larger hypervolume than {name}", partial(larger_front, pool), above=0.0)
            for name, pool in arms.pools.items()
        )
        or (_Evidence("larger hypervolume than guidance and temperature", None, MISSING),),
        (
            _claimed(
                f"quality of the front at its diversity {kept}",
                lambda: _beside_front(results[arms.uniform or ""], merges, diversity, quality),
                above=-_MARGIN,
            ),
        ),
    )
    titled = zip(_TITLES, evidence, strict=True)
    return [Signature(number, title, claims) for number, (title, claims) in enumerate(titled, start=1)]


def _claimed(
    claim: str, measure: Callable[[], Estimate], *, above: float | None = None, below: float | None = None
) -> _Evidence:
    """One claim: that an interval lies above a bound, below one, or between two.

    What was not measured (`measure` raises a ValueError: a system failed, is flagged or was not evaluated, or a
    metric was not measured) is said so, and is neither shown nor refuted.
    """
    try:
        found = measure()
    except ValueError:
        return _Evidence(claim, None, MISSING)
    if found.low is None or found.high is None:
        return _Evidence(claim, found, OPEN)
    holds = (above is None or found.low > above) and (below is None or found.high < below)
    fails = (above is not None and found.high < above) or (below is not None and found.low > below)
    return _Evidence(claim, found, HOLDS if holds else FAILS if fails else OPEN)


def useful_corner(results: Results, arms: Arms, x: str, y: str) -> tuple[float, float]:
    """Where hypervolumes begin: the guided base's diversity, the base's quality.

    A model that is worse than the base, or less diverse than guidance makes it, is of no use: both can be had
    without training. The corner depends on these two systems alone, not on what else was evaluated.

    Raises:
        ValueError: one of the two failed, or has not been evaluated by this metric.
    """
    return results[arms.guided].mean(x), results[arms.base].mean(y)


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
            (markdown(one.claim), "–" if one.found is None else one.found.text(), one.verdict)
            for one in signature.evidence
        ]
        table = markdown_table(["claim", "difference", "verdict"], claims)
        parts.append(f"### {signature.number}. {signature.title}: **{signature.verdict}**\n\n{table}\n")
    return "\n".join(parts)


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


def _mean_above_line(merges: Sequence[SystemResult], metric: str) -> Estimate:
    """Mean over the inner merges of v(λ) − (1 − λ)·v(0) − λ·v(1), by prompt."""
    first, last = lerp_ends(merges)
    return mean_estimate(np.mean([above_line(first, row, last, metric) for row in merges[1:-1]], axis=0))


def _beside_front(row: SystemResult, merges: Sequence[SystemResult], x: str, y: str) -> Estimate:
    """Quality of a system minus that of the LERP where it has the same diversity, by prompt.

    The place on the LERP is found on the means (outside of its range: the nearer end), the difference is
    taken by prompt.
    """
    lerp_ends(merges)
    places, wanted = [point.mean(x) for point in merges], row.mean(x)
    order = sorted(range(len(merges)), key=places.__getitem__)
    shares = [
        np.interp(wanted, sorted(places), [float(index == k) for index in order]) for k in range(len(merges))
    ]
    front = sum(share * point.by_prompt(y) for share, point in zip(shares, merges, strict=True))
    return mean_estimate(row.by_prompt(y) - front)
