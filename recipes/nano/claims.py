"""What was claimed of an experiment before its test prompts were played, and what came out.

    python recipes/nano/claims.py --config recipes/nano/open.yaml --recorded results/open

The claims stand in the experiment's file. When the first clip of the sweep `test` is played, `experiment.py` keeps a
copy of them beside the clips, and a claim that has changed since is marked. Each holds if its interval lies beyond its
bound; since several are tested, their p-values are adjusted by Holm (1979): all that hold together are wrong in at most
one of forty experiments (one-sided).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.levels import of_levels
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Estimate, Results, above_line, markdown_table, mean_estimate
from diverse_cfg.evaluation.signatures import FAILS, HOLDS, MISSING, OPEN
from diverse_cfg.settings import field_types, require_type
from diverse_cfg.untrusted import markdown

REGISTERED = "claims.json"
SIZE = 0.025  # of one-sided tests: what a 95 % interval leaves on one side


@dataclass(frozen=True)
class Claim:
    """One claim about a system of the sweep `test`: that a number lies above a bound, below one, or between two.

    The number is the system's own, or its difference from `other`; or from what the systems of the series `line` have
    where they are as diverse (by `x`), linear between them; or from the mean of two `parents`, weighted as they were
    merged, or evenly where it is no merge of them.
    """

    claim: str
    system: str
    metric: str = "adherence"
    levels: list[int] | None = None  # None: prompts of all levels
    other: str | None = None
    line: str | None = None
    parents: list[str] | None = None
    x: str = "diversity_heldout"
    above: float | None = None
    below: float | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> Claim:
        """Read an entry; whatever is wrong with it is an error that names it."""
        known = [f.name for f in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown or not {"claim", "system"} <= set(values):
            raise ValueError(
                f"{where}: a claim has claim, system and some of {', '.join(known[2:])}: {values}"
            )
        for name, annotation in field_types(cls).items():
            if name in values:
                require_type(f"{where}, claims: {name}", values[name], annotation)
        found = cls(**values)
        if (found.above is None and found.below is None) or len(found.compared) > 1:
            raise ValueError(
                f"{where}: the claim {found.claim!r} needs above or below, and one of other, line and parents at most"
            )
        for metric in (found.metric, found.x):
            if metric not in METRICS:
                raise ValueError(f"{where}: the claim {found.claim!r} names {metric!r}, which is no metric")
        return found

    @property
    def compared(self) -> list[str]:
        """Which kinds of comparison it names."""
        return [name for name in ("other", "line", "parents") if getattr(self, name) is not None]

    @property
    def systems(self) -> list[str]:
        """The systems that it names."""
        return [self.system, *([self.other] if self.other else []), *(self.parents or [])]

    def measure(self, results: Results) -> Estimate:
        """The number.

        Raises:
            ValueError: a system failed, was not evaluated or cannot be compared.
        """
        part = results if self.levels is None else of_levels(results, self.levels)
        if self.other:
            return part.difference(self.system, self.other, self.metric)
        if self.line:
            return at_equal_diversity(part, self.system, self.line, self.x, self.metric)
        if self.parents:
            first, last = (part[name] for name in self.parents)
            row = part[self.system]
            if row.system.merge_weight is None:
                row = replace(row, system=replace(row.system, merge_weight=0.5))
            return mean_estimate(above_line(first, row, last, self.metric))
        part[self.system].by_prompt(self.metric)
        return part[self.system].number(self.metric)

    def probability(self, found: Estimate) -> float:
        """One-sided p-value of the nearer bound, as if the estimate were normal with its interval's width."""
        if found.estimate is None or found.low is None or found.high is None:
            return 1.0
        error = (found.high - found.low) / 2 / 1.96
        beyond = [
            sign * (found.estimate - bound)
            for sign, bound in ((1, self.above), (-1, self.below))
            if bound is not None
        ]
        if error == 0:
            return 0.0 if min(beyond) > 0 else 1.0
        return math.erfc(min(beyond) / error / math.sqrt(2)) / 2

    def refuted(self, found: Estimate) -> bool:
        """Whether the interval lies on the other side of a bound."""
        if found.low is None or found.high is None:
            return False
        under = self.above is not None and found.high < self.above
        return under or (self.below is not None and found.low > self.below)


def at_equal_diversity(results: Results, system: str, line: str, x: str, y: str) -> Estimate:
    """`y` of a system minus that of a series where it has the same `x`, by prompt; linear between its members.

    A system that is more diverse than all of the series is compared with the most diverse: it has that as well.

    Raises:
        ValueError: fewer than two systems to compare with, or all of them are more diverse.
    """
    rows = [row for row in results.usable if row.system.series == line and not row.flags]
    if len(rows) < 2:
        raise ValueError(f"the series {line!r} has {len(rows)} comparable systems: no line")
    rows.sort(key=lambda row: row.mean(x))
    places, wanted = [row.mean(x) for row in rows], results[system].mean(x)
    if results[system].flags or wanted < places[0]:
        raise ValueError(
            f"{system} cannot be compared with {line!r}: it is flagged, or less diverse than all"
        )
    shares = [np.interp(wanted, places, np.eye(len(rows))[index]) for index in range(len(rows))]
    beside = sum(
        share * row.by_prompt(y).mean(axis=1, keepdims=True) for share, row in zip(shares, rows, strict=True)
    )
    return mean_estimate(results[system].by_prompt(y) - beside)


def holm(probabilities: Sequence[float]) -> list[float]:
    """Adjusted p-values: the k-th smallest of m times m − k + 1, none below the one before."""
    adjusted, largest = [0.0] * len(probabilities), 0.0
    for place, index in enumerate(sorted(range(len(probabilities)), key=probabilities.__getitem__)):
        largest = max(largest, min(1.0, (len(probabilities) - place) * probabilities[index]))
        adjusted[index] = largest
    return adjusted


def tested(results: Results, claims: Sequence[Claim]) -> list[dict[str, Any]]:
    """Of every claim its number, adjusted p-value and verdict."""
    numbers = []
    for claim in claims:
        try:
            numbers.append(claim.measure(results))
        except ValueError:
            numbers.append(None)
    raw = [1.0 if n is None else claim.probability(n) for claim, n in zip(claims, numbers, strict=True)]
    rows = []
    for claim, number, adjusted in zip(claims, numbers, holm(raw), strict=True):
        verdict = HOLDS if adjusted < SIZE else OPEN
        if number is None:
            verdict = MISSING
        elif claim.refuted(number):
            verdict = FAILS
        rows.append({"claim": claim, "found": number, "p": adjusted, "verdict": verdict})
    return rows


def claims_table(results: Results, claims: Sequence[Claim], registered: Sequence[Claim] | None) -> str:
    """The claims as a Markdown table; what was not registered, or otherwise, is marked."""
    lines = []
    for row in tested(results, claims):
        claim, number = row["claim"], row["found"]
        mark = "" if registered is None or claim in registered else " (not as registered)"
        bound = [f"> {claim.above:g}"] if claim.above is not None else []
        bound += [f"< {claim.below:g}"] if claim.below is not None else []
        levels = "all" if claim.levels is None else ", ".join(map(str, claim.levels))
        lines.append([
            markdown(claim.claim) + mark, levels, METRICS[claim.metric].label, " and ".join(bound),
            "–" if number is None else number.text(), f"{row['p']:.3g}", f"**{row['verdict']}**",
        ])  # fmt: skip
    return markdown_table(["claim", "named", "number", "claimed", "found", "p (Holm)", "verdict"], lines)


def register(claims: Sequence[Claim], folder: Path) -> None:
    """Keep the claims in the folder of the sweep that will test them; those that are there already stay."""
    path = folder / REGISTERED
    if claims and not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps([asdict(claim) for claim in claims], indent=1, ensure_ascii=False)
        write_text(path, text + "\n")


def registered_in(folder: Path) -> list[Claim] | None:
    """The claims that were kept when the sweep began; None where none were."""
    path = folder / REGISTERED
    if not path.is_file():
        return None
    return [Claim.from_dict(values, str(path)) for values in json.loads(path.read_text(encoding="utf-8"))]


def main(argv: list[str] | None = None) -> int:
    from experiment import HERE, Experiment

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=HERE / "open.yaml")
    parser.add_argument(
        "--recorded", type=Path, help="folder of the sweeps; default: results/NAME of NAME.yaml"
    )
    arguments = parser.parse_args(argv)
    recorded = arguments.recorded or HERE / "results" / arguments.config.stem
    claims = Experiment.load(arguments.config).claims
    table = claims_table(Results.load(recorded / "test"), claims, registered_in(recorded / "test"))
    write_text(recorded / "test" / "claims.md", table + "\n")
    print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
