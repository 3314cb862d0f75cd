"""What an evaluation found: per system and metric a number with its interval, and the cells it came from.

`Results.frame` is the table as a pandas frame, a line per system and metric; the CSV is that frame.

The cells (means per prompt and replicate) are kept, so that differences between systems, fronts and
hypervolumes are computed from the file alone, with the same intervals as the table. `metrics.json` holds
the numbers, `cells.npz` the cells.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from diverse_cfg.atomic import replacing, write_text
from diverse_cfg.evaluation.metrics import METRICS, Metric, Replicate
from diverse_cfg.evaluation.systems import System, shared_replicates
from diverse_cfg.functional.statistics import bootstrap_mean, hypervolume, jackknife_statistic
from diverse_cfg.untrusted import frame_csv, markdown

_FORMAT = 1


@dataclass(frozen=True)
class Estimate:
    """A number with its interval.

    Args:
        estimate: mean over prompts (or the statistic of all of them); None if it does not apply to any
            prompt.
        low, high: bounds of the 95 % interval; None where one prompt alone allows none.
        standard_error: of the estimate.
        num_prompts: how many prompts it rests on.
        num_replicates: how many training seeds it rests on. From three on the interval holds for new seeds,
            below for these alone.
    """

    estimate: float | None
    low: float | None = None
    high: float | None = None
    standard_error: float | None = None
    num_prompts: int = 0
    num_replicates: int = 0

    @property
    def excludes_zero(self) -> bool:
        """Whether 0 lies outside of the interval: of a difference, whether there is one."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)

    def text(self) -> str:
        """For tables: "0.754 [0.731, 0.776]", with digits by the size of the number."""
        number, interval = self.parts("{}, {}")
        return f"{number} [{interval}]" if interval else number

    def parts(self, between: str = "{} … {}") -> tuple[str, str]:
        """Number and interval as texts; the interval is empty where there is none, or no width."""
        if self.estimate is None:
            return "–", ""
        size = abs(self.estimate)
        digits = 3 if size < 10 else 1 if size < 1000 else 0
        number = f"{self.estimate:.{digits}f}"
        if self.low is None or self.high is None or self.low == self.high:
            return number, ""
        return number, between.format(f"{self.low:.{digits}f}", f"{self.high:.{digits}f}")


@dataclass
class SystemResult:
    """One row.

    Args:
        system: what was evaluated.
        error: why it failed; None if it did not.
        metrics: metric → estimate.
        cells: metric → cells [P, R], R replicates; NaN where a prompt has no value. Metrics of the whole
            set have none.
        clusters: metric → what is independent [P], where this is not the prompt but the batch.
        flags: what a reader must know before comparing this row.
    """

    system: System
    error: str | None = None
    metrics: dict[str, Estimate] = field(default_factory=dict)
    cells: dict[str, np.ndarray] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)
    clusters: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether it has numbers."""
        return self.error is None

    def number(self, metric: str) -> Estimate:
        """Its number; an empty one for a metric that it does not have."""
        return self.metrics.get(metric, Estimate(None))

    def by_prompt(self, metric: str) -> np.ndarray:
        """Its cells [P, R].

        Raises:
            ValueError: it failed, or has no cells of this metric.
        """
        if not self.ok:
            raise ValueError(f"system {self.system.name!r} failed: {self.error}")
        if metric not in self.cells:
            raise ValueError(f"system {self.system.name!r} has no {metric!r} per prompt")
        return self.cells[metric]

    def mean(self, metric: str) -> float:
        """Mean of its cells; raises as `by_prompt`."""
        return float(np.nanmean(self.by_prompt(metric)))


@dataclass
class Results:
    """A table, and everything needed to draw it.

    Args:
        prompts: P.
        systems: rows in the order of the sweep, failed ones included.
        settings: how it was measured: generations per prompt, seeds, frames, encoders, versions, machine.
        compare_to: names of the systems that the others are compared with.
    """

    prompts: list[str]
    systems: list[SystemResult]
    settings: dict[str, Any] = field(default_factory=dict)
    compare_to: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> SystemResult:
        for row in self.systems:
            if row.system.name == name:
                return row
        raise ValueError(f"no system {name!r}; there are {', '.join(r.system.name for r in self.systems)}")

    @property
    def usable(self) -> list[SystemResult]:
        """Rows that did not fail."""
        return [row for row in self.systems if row.ok]

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that at least one row has, in the order of the registry."""
        found = {name for row in self.usable for name in row.metrics}
        return [name for name in METRICS if name in found]

    def difference(self, system: str, other: str, metric: str) -> Estimate:
        """Paired difference of two systems, first minus second, on the same prompts and training seeds.

        Both are compared under the training seeds that they share: an arm of one seed with that seed of an
        arm of three, and `num_replicates` of the estimate says that it rests on one. A system that was not
        trained (the base) serves for every seed. Without folders `seed-N` to tell the seeds, systems with as
        many replicates are paired in their order. What is left, or shares no seed, is averaged first, and
        the interval holds for these runs.

        What the clips of a batch share (their time) is clustered by batch; there is no interval if the two
        systems' batches differ, or are not in the file.

        Raises:
            ValueError: a system that is not there or failed, or a metric without cells.
        """
        cells = [self[name].by_prompt(metric) for name in (system, other)]
        columns = shared_replicates([self[name].system for name in (system, other)])
        if columns is None:
            cells = [values.mean(axis=1, keepdims=True) for values in cells]
        else:
            cells = [values[:, chosen] for values, chosen in zip(cells, columns, strict=True)]
        difference = cells[0] - cells[1]
        if metric not in METRICS or METRICS[metric].cluster == "prompt":
            return mean_estimate(difference)
        clusters = [self[name].clusters.get(metric) for name in (system, other)]
        if clusters[0] is None or clusters[1] is None or not np.array_equal(*clusters):
            return replace(mean_estimate(difference), low=None, high=None, standard_error=None)
        return mean_estimate(difference, clusters[0].tolist())

    def hypervolume(self, names: Iterable[str], x: str, y: str, corner: tuple[float, float]) -> Estimate:
        """Area that a set of systems dominates above a corner, in the plane of two metrics that are better
        when larger.

        Flagged systems do not count: their numbers are not comparable. Prompts count where all systems have
        both metrics. The interval is a jackknife over prompts, and over the training seeds where the trained
        systems share three or more: what one seed does to all systems it does together.

        Raises:
            ValueError: no usable system, or a metric that one does not have per prompt.
        """
        return self._volume([(1, names)], x, y, corner)

    def hypervolume_difference(
        self, names: Iterable[str], others: Iterable[str], x: str, y: str, corner: tuple[float, float]
    ) -> Estimate:
        """How much more area one set of systems dominates than another, both on the same prompts and seeds;
        see `hypervolume`."""
        return self._volume([(1, names), (-1, others)], x, y, corner)

    def worst(self, x: str, y: str) -> tuple[float, float]:
        """The worst coordinate that any comparable system has in each of two metrics: a corner for
        hypervolumes.

        Raises:
            ValueError: no system can be compared, or a metric has no direction.
        """
        rows = [row for row in self.usable if not row.flags and {x, y} <= row.cells.keys()]
        if not rows:
            raise ValueError(f"no system has {x} and {y}, or all that have them are flagged")
        low_x, low_y = (min(_sign(n) * row.mean(n) for row in rows) * _sign(n) for n in (x, y))
        return low_x, low_y

    def _volume(
        self, sets: Sequence[tuple[int, Iterable[str]]], x: str, y: str, corner: tuple[float, float]
    ) -> Estimate:
        """Sum of signed areas of sets of systems, with an interval over prompts and shared training seeds."""
        kept = []
        for sign, names in sets:
            rows = [row for row in (self[name] for name in names) if row.ok and not row.flags]
            if not rows:
                raise ValueError("none of these systems can be compared: all failed or are flagged")
            kept += [(sign, row) for row in rows]
        directions = torch.tensor([_sign(x), _sign(y)], dtype=torch.float64)
        reference = directions * torch.tensor(corner, dtype=torch.float64)
        columns = shared_replicates([row.system for _, row in kept])
        cells = []
        for index, (_, row) in enumerate(kept):
            both = np.stack([row.by_prompt(metric) for metric in (x, y)])
            if columns is None or len(columns[0]) < 3:
                both = both.mean(axis=2, keepdims=True)
            else:
                both = both[:, :, columns[index]]
            cells.append(directions[:, None, None] * torch.from_numpy(both))
        values = torch.stack(cells)  # [systems, 2, P, R]
        values = values[:, :, ~values.isnan().any(dim=3).any(dim=1).any(dim=0)]
        signs = torch.tensor([sign for sign, _ in kept])

        def area(prompts: torch.Tensor, seeds: torch.Tensor) -> float:
            points = values[:, :, prompts][..., seeds].mean(dim=(2, 3))
            return sum(sign * hypervolume(points[signs == sign], reference) for sign, _ in sets)

        return _jackknifed(area, *values.shape[2:])

    # ---- files -----------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Plain values: settings, rows, and the differences from `compare_to`."""
        rows = []
        for row in self.systems:
            values: dict[str, Any] = {"system": row.system.to_dict(), "error": row.error, "flags": row.flags}
            values["metrics"] = {name: asdict(estimate) for name, estimate in row.metrics.items()}
            values["differences"] = {
                other: {
                    metric: asdict(self.difference(row.system.name, other, metric))
                    for metric in row.cells
                    if metric in self[other].cells
                }
                for other in self.compare_to
                if row.ok and other != row.system.name and self[other].ok
            }
            rows.append(values)
        return {
            "format": _FORMAT,
            "settings": self.settings,
            "compare_to": self.compare_to,
            "prompts": self.prompts,
            "systems": rows,
        }

    def save(self, folder: str | os.PathLike) -> Path:
        """Write `metrics.json`, `metrics.csv` and `cells.npz`; return the path of the first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {
            f"{index}:{metric}": cells
            for index, row in enumerate(self.systems)
            for metric, cells in row.cells.items()
        }
        for index, row in enumerate(self.systems):
            arrays |= {f"clusters:{index}:{metric}": labels for metric, labels in row.clusters.items()}
        with replacing(folder / "cells.npz") as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        write_text(folder / "metrics.csv", self.csv())
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False, allow_nan=False)
        return write_text(folder / "metrics.json", text + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike) -> "Results":
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: there are no results.
            ValueError: they are of another format, or the two files do not belong together.
        """
        folder = Path(folder)
        content = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"{folder / 'metrics.json'} has format {content.get('format')!r}, not {_FORMAT}: run the "
                "evaluation again"
            )
        with np.load(folder / "cells.npz", allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        rows = []
        for index, values in enumerate(content["systems"]):
            cells, clusters = (
                {name.removeprefix(prefix): a for name, a in arrays.items() if name.startswith(prefix)}
                for prefix in (f"{index}:", f"clusters:{index}:")
            )
            system = System.from_dict(values["system"])
            known = {"num_replicates": len(system.replicates)}  # not in the oldest files
            metrics = {name: Estimate(**{**known, **e}) for name, e in values["metrics"].items()}
            if set(cells) - set(metrics) or any(len(a) != len(content["prompts"]) for a in cells.values()):
                raise ValueError(
                    f"{folder}: metrics.json and cells.npz do not belong together: evaluate again"
                )
            rows.append(SystemResult(system, values["error"], metrics, cells, values["flags"], clusters))
        return cls(content["prompts"], rows, content["settings"], content["compare_to"])

    def frame(self, metrics: Sequence[str] | None = None) -> pd.DataFrame:
        """The table in tidy form: a line per system and metric, with the number, its interval and error.

        Args:
            metrics: names; None takes all.
        """
        numbers = ["estimate", "low", "high", "standard_error"]
        lines = [
            [row.system.name, row.system.role, row.system.series, name]
            + [getattr(row.number(name), column) for column in numbers]
            + [row.number(name).num_prompts]
            for row in self.systems
            for name in metrics or self.metrics
        ]
        frame = pd.DataFrame(lines, columns=["system", "role", "series", "metric", *numbers, "prompts"])
        return frame.astype(dict.fromkeys(numbers, float))

    def csv(self) -> str:
        """`frame` as text."""
        return frame_csv(self.frame(), float_format="%.6g")

    def table(self, metrics: Sequence[str] | None = None) -> str:
        """A Markdown table; failures and flags are in it."""
        names = list(metrics or self.metrics)
        lines = []
        for row in self.systems:
            cells = [row.number(name).text() for name in names]
            if not row.ok:
                cells = [f"failed: {markdown(row.error)}", *[""] * (len(names) - 1)]
            lines.append([markdown(row.system.name) + (" ⚠" if row.flags else ""), *cells])
        table = markdown_table(["system", *(METRICS[name].label for name in names)], lines)
        notes = [
            f"⚠ {markdown(row.system.name)}: {markdown(flag)}" for row in self.systems for flag in row.flags
        ]
        return "\n".join([table, *([""] if notes else []), *notes])


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table as Markdown. Free text in a cell has gone through `untrusted.markdown`."""
    rows = ["| " + " | ".join(line) + " |" for line in (header, *lines)]
    return "\n".join([rows[0], "|" + "---|" * len(header), *rows[1:]])


def estimate(metric: Metric, replicates: Sequence[Replicate]) -> tuple[Estimate, np.ndarray | None]:
    """A metric of one system over all its replicates: the number with its interval, and its cells [P, R].

    Raises:
        ValueError: a measure that returned another number of prompts than there are, or infinite values.
    """
    if metric.of_set is not None:
        return _set_estimate(metric, replicates), None
    assert metric.cells is not None
    columns = [np.asarray(metric.cells(replicate), dtype=np.float64) for replicate in replicates]
    cells = np.stack(columns, axis=1)
    if len(cells) != len(replicates[0].codes) or np.isinf(cells).any():
        raise ValueError(f"metric {metric.name!r} gave infinite values, or {len(cells)} prompts")
    return estimate_of_cells(metric, cells, clusters_of(metric, replicates)), cells


def estimate_of_cells(metric: Metric, cells: np.ndarray, clusters: np.ndarray | None = None) -> Estimate:
    """`mean_estimate` of a metric's cells, whose interval stays where the metric can be."""
    found = mean_estimate(cells, None if clusters is None else clusters.tolist())
    if metric.is_share and found.low is not None and found.high is not None:
        found = replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))
    return found


def clusters_of(metric: Metric, replicates: Sequence[Replicate]) -> np.ndarray | None:
    """What is independent in a metric's cells, a label per prompt [P]; None if it is the prompts."""
    if metric.cluster == "prompt":
        return None
    return replicates[0].features["timing"][metric.cluster][:, 0, 0]


def mean_estimate(cells: np.ndarray, clusters: Sequence[int] | None = None) -> Estimate:
    """Mean of cells [P, R] with its interval.

    All replicates of a prompt count together; from three replicates on, the interval holds for new training
    seeds too (see `bootstrap_mean`). Cells that are all equal, such as shares of exactly 1, have an interval
    without width, which is not printed: of what was not seen once in P prompts it tells nothing, and may
    still happen in 3/P of new ones (the rule of three).
    """
    known = ~np.isnan(cells).any(axis=1)
    values = cells[known]
    num_prompts, num_replicates = values.shape
    if num_prompts == 0:
        return Estimate(None)
    labels = np.arange(len(cells)) if clusters is None else np.asarray(clusters)
    prompts = labels[known].repeat(num_replicates).tolist()
    if len(set(prompts)) < 2:
        return Estimate(float(values.mean()), num_prompts=num_prompts, num_replicates=num_replicates)
    seeds = np.tile(np.arange(num_replicates), num_prompts).tolist() if num_replicates >= 3 else None
    interval = bootstrap_mean(torch.from_numpy(values.flatten()), prompts, seeds)
    return Estimate(*interval, num_prompts=num_prompts, num_replicates=num_replicates)


def lerp_ends(merges: Sequence[SystemResult]) -> tuple[SystemResult, SystemResult]:
    """Both ends of a LERP whose systems are in the order of their merge weights.

    Raises:
        ValueError: an end is missing, or there is nothing between.
    """
    weights = [row.system.merge_weight for row in merges]
    if len(weights) < 3 or (weights[0], weights[-1]) != (0, 1):
        raise ValueError(
            f"of the merge weights {weights} no LERP can be made: it needs 0, 1 and something between"
        )
    return merges[0], merges[-1]


def above_line(first: SystemResult, row: SystemResult, last: SystemResult, metric: str) -> np.ndarray:
    """How far a merge lies above the straight line between its ends: v(λ) − (1 − λ)·v(0) − λ·v(1), cells
    [P, R]."""
    weight = row.system.merge_weight or 0.0
    return row.by_prompt(metric) - (1 - weight) * first.by_prompt(metric) - weight * last.by_prompt(metric)


def _set_estimate(metric: Metric, replicates: Sequence[Replicate]) -> Estimate:
    assert metric.of_set is not None
    statistics = [metric.of_set(replicate) for replicate in replicates]

    def mean(prompts: torch.Tensor, seeds: torch.Tensor) -> float:
        return sum(statistics[seed](prompts) for seed in seeds.tolist()) / len(seeds)

    return _jackknifed(mean, len(replicates[0].codes), len(replicates))


def _jackknifed(
    statistic: Callable[[torch.Tensor, torch.Tensor], float], num_prompts: int, num_replicates: int
) -> Estimate:
    """A statistic of prompts and replicates with its interval; without one where it has none."""
    counts = {"num_prompts": num_prompts, "num_replicates": num_replicates}
    number = statistic(torch.arange(num_prompts), torch.arange(num_replicates)) if num_prompts else math.nan
    if math.isnan(number):
        return Estimate(None)
    if num_prompts < 2:
        return Estimate(number, **counts)
    interval = jackknife_statistic(statistic, num_prompts, num_replicates)
    return Estimate(*(None if math.isnan(value) else value for value in interval), **counts)


def _sign(metric: str) -> int:
    better = METRICS[metric].better
    if not better:
        raise ValueError(f"metric {metric!r} is neither better when larger nor when smaller: it has no front")
    return better
