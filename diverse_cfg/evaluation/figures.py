"""The paper's figures from results: front, LERP against the straight line, trajectories (curves: `plotting`).

Each function writes three files beside each other, SVG, PNG and the CSV of exactly what is drawn, at the
width of a paper's column. Series differ by marker and line style as well as by colour, so that a
black-and-white print can be read.
"""

import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from diverse_cfg.evaluation.metrics import METRICS, require_known
from diverse_cfg.evaluation.results import (
    Estimate,
    Results,
    SystemResult,
    above_line,
    lerp_ends,
    mean_estimate,
)
from diverse_cfg.plotting import LEGEND, STYLE, Look, new_figure, save

_LABEL_SIZE = 6.5  # points
_LEGEND_LINE = 0.13  # inches
_NARROW_LABEL = 22  # characters, of which two columns have room
_MANY = 6  # systems of a series; of more, every second has a label
_WIDE_LABEL = 58  # characters, of which one column has room
_FLAGGED = "hollow: invalid audio"


def front(
    results: Results, x: str, y: str, stem: str | os.PathLike, corner: tuple[float, float] | None = None
) -> list[Path]:
    """Every system in the plane of two metrics, with intervals; the systems of a series are joined.

    The legend gives each series of several systems its hypervolume with its interval. A series of merges is the
    strongest line. Flagged systems are named below the plot and count for nothing: their numbers stay in the CSV.

    Args:
        results: of a sweep.
        x: metric on the horizontal axis, e.g. "diversity_heldout".
        y: metric on the vertical axis, e.g. "adherence".
        stem: path without ending.
        corner: where hypervolumes begin; None takes the worst coordinates of all systems.

    Returns:
        The SVG, the PNG and the CSV.

    Raises:
        ValueError: no system has both metrics, or a name that is no metric.
    """
    rows = _with_metrics(results, (x, y))
    volumes = _series_hypervolumes(results, x, y, corner)
    table = [{"system": row.system.name, "series": row.system.series} | _numbers(row, x, y) for row in rows]
    areas = pd.DataFrame(
        [(name, volume.estimate, volume.low, volume.high) for name, volume in volumes.items()],
        columns=["series", "hypervolume", "low", "high"],
    )
    sound = [row for row in rows if not row.flags]
    series, looks = _by_series(sound), _looks(sound)
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(1, height=2.7)
        for name, members in series.items():
            look, joined = looks[name], len(members) > 1
            line = {
                "color": look.color,
                "linestyle": look.linestyle if joined else "none",
                "linewidth": look.width,
            }
            if joined:
                places = zip(*(_place(row, x, y) for row in members), strict=True)
                axes.plot(*places, **line, zorder=2.5 if look.strong else 2)
            for row in members:
                _point(axes, row, x, y, look, alone=not joined)
            text = name if name not in volumes else f"{name}: {volumes[name].text()}"
            axes.plot([], [], **line, marker=look.marker, label=textwrap.fill(text, _WIDE_LABEL))
        flagged = [row.system.name for row in rows if row.flags]
        if flagged:
            text = textwrap.fill(f"not drawn, invalid audio: {', '.join(flagged)}", _WIDE_LABEL)
            axes.plot([], [], color="0.4", marker="x", linestyle="none", label=text)
        _upper_bound(axes, results, x)
        place = "the worst coordinates" if corner is None else f"({corner[0]:.3f}, {corner[1]:.3f})"
        _finish(axes, x, y, title=f"hypervolume above {place}, with its interval" if volumes else None)
        figure.draw_without_rendering()  # only then is it known where points lie
        # No label may hide a point, or the upper bound's text.
        taken = [Bbox.from_bounds(*(_in_points(axes, row, x, y) - 2), 4, 4) for row in sound]
        taken += [Bbox(text.get_window_extent().get_points() * 72 / figure.dpi) for text in axes.texts]
        labelled = [(name, members) for name, members in series.items() if len(members) > 1]
        for name, members in sorted(labelled, key=lambda item: not looks[item[0]].strong):
            _label_points(axes, members, x, y, looks[name], list(looks).index(name), taken)
        return save(figure, stem, pd.DataFrame(table), areas)


def _looks(rows: Sequence[SystemResult]) -> dict[str, Look]:
    """Series → how it is drawn; merges as the strongest line, all others in their order."""
    series = _by_series(rows)
    merges = {name: sum(row.system.merge_weight is not None for row in series[name]) for name in series}
    strong = [name for name in series if merges[name] > 2]
    order = [*strong, *(name for name in series if name not in strong)]
    return {name: replace(Look.number(index), strong=name in strong) for index, name in enumerate(order)}


def _series_hypervolumes(
    results: Results, x: str, y: str, corner: tuple[float, float] | None = None
) -> dict[str, Estimate]:
    """Hypervolume of every series of several systems, above a corner: None takes the worst coordinates of all.

    Empty when a metric has no direction, no cells, or fewer than two systems can be compared.
    """
    if not (METRICS[x].better and METRICS[y].better):
        return {}
    rows = [row for row in _with_metrics(results, (x, y)) if not row.flags and {x, y} <= row.cells.keys()]
    if len(rows) < 2:
        return {}
    corner = corner or results.worst(x, y)
    return {
        name: results.hypervolume([row.system.name for row in members], x, y, corner)
        for name, members in _by_series(rows).items()
        if len(members) > 1
    }


def merge_curve(results: Results, series: str, metrics: Sequence[str], stem: str | os.PathLike) -> list[Path]:
    """Metrics along a LERP against the straight line between its ends.

    The CSV tells for each point how far it lies above the line, as a paired difference with an interval.

    Args:
        results: of a sweep.
        series: whose systems have a `merge_weight`; 0 and 1 among them (the ends).
        metrics: one panel each, diversity first as in the paper.
        stem: path without ending.

    Raises:
        ValueError: no such series, or an end is missing.
    """
    rows = [
        row for row in results.usable if row.system.series == series and row.system.merge_weight is not None
    ]
    rows.sort(key=lambda row: row.system.merge_weight or 0.0)
    first, last = lerp_ends(rows)
    weights = [row.system.merge_weight for row in rows]
    table = []
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(metrics), height=2.0)
        for axes, metric, look in zip(panels, metrics, map(Look.number, range(len(metrics))), strict=False):
            values = [row.metrics[metric] for row in rows]
            ends = [_value(first, metric), _value(last, metric)]
            axes.plot([0, 1], ends, color="0.45", linestyle=(0, (4, 2)), linewidth=0.9, label="straight line")
            axes.errorbar(
                weights, [value.estimate for value in values], yerr=_error_bars(values), color=look.color,
                marker=look.marker, linestyle="-", elinewidth=0.7, capsize=1.5, label="merge",
            )  # fmt: skip
            axes.set_xlabel("merge weight λ")
            axes.set_ylabel(METRICS[metric].axis)
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", ".25", ".5", ".75", "1"])
            axes.grid(axis="y", linewidth=0.3, color="0.85")
            for row, value in zip(rows, values, strict=True):
                above = mean_estimate(above_line(first, row, last, metric))
                table.append(
                    {"metric": metric, "merge_weight": row.system.merge_weight}
                    | {"estimate": value.estimate, "low": value.low, "high": value.high}
                    | {"above_line": above.estimate, "above_low": above.low, "above_high": above.high}
                )
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=2)
        return save(figure, stem, pd.DataFrame(table))


def surface(results: Results, series: str, metrics: Sequence[str], stem: str | os.PathLike) -> list[Path]:
    """Metrics over the plane of γ and λ, of merges that are told γ: contour lines between the systems' dots.

    Args:
        results: of a sweep.
        series: whose systems have a `student_guidance` and a `merge_weight`, in at least two values each.
        metrics: one panel each.
        stem: path without ending.

    Raises:
        ValueError: no such series.
    """
    rows = [
        row for row in on_surface(results, series) if all(row.number(m).estimate is not None for m in metrics)
    ]
    if not rows:
        raise ValueError(
            f"series {series!r} has no grid of student_guidance and merge_weight: there is no surface"
        )
    places = [(row.system.student_guidance, row.system.merge_weight) for row in rows]
    told, weights = zip(*places, strict=True)
    table = [
        {"system": row.system.name, "student_guidance": scale, "merge_weight": weight}
        | _numbers(row, *metrics)
        for row, (scale, weight) in zip(rows, places, strict=True)
    ]
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(metrics), height=2.2)
        for axes, metric in zip(panels, metrics, strict=False):
            values = [_value(row, metric) for row in rows]
            axes.plot(told, weights, linestyle="none", marker=".", markersize=3, color="0.6")
            if max(values) > min(values):
                axes.clabel(
                    axes.tricontour(told, weights, values, levels=6, cmap="viridis"), fontsize=_LABEL_SIZE
                )
            axes.set_title(METRICS[metric].axis)
            axes.set_xlabel("γ that is told")
            axes.set_ylabel("merge weight λ")
        return save(figure, stem, pd.DataFrame(table))


def on_surface(results: Results, series: str) -> list[SystemResult]:
    """Systems of a series that lie on a grid of γ and λ; none where one of the two does not vary."""
    rows = [row for row in results.usable if row.system.series == series]
    rows = [r for r in rows if None not in (r.system.student_guidance, r.system.merge_weight) and not r.flags]
    varied = [
        len({getattr(r.system, name) for r in rows}) > 1 for name in ("student_guidance", "merge_weight")
    ]
    return rows if all(varied) and len(rows) > 3 else []


def trajectories(
    results: Results, x: str, y: str, stem: str | os.PathLike, starts: Mapping[str, str] | None = None
) -> list[Path]:
    """Training runs as paths in the quality–diversity plane: the systems of a series in the order of their
    `step`.

    Systems without a step are drawn as single points (base, guided base), flagged ones hollow.

    Args:
        results: of a sweep.
        x: metric on the horizontal axis.
        y: metric on the vertical axis.
        stem: path without ending.
        starts: series → name of the system that its runs began with; its path leaves from there.

    Raises:
        ValueError: no series has two systems with a step, or a start that is not there.
    """
    rows = _with_metrics(results, (x, y))
    series, runs = _by_series(rows), {}
    for name, members in series.items():
        run = [row for row in members if row.system.step is not None]
        runs[name] = sorted(run, key=lambda row: row.system.step or 0)
    if not any(len(run) > 1 for run in runs.values()):
        raise ValueError(
            "no series has two systems with a step: evaluate checkpoints of a run to draw its path"
        )
    began = {name: results[system] for name, system in (starts or {}).items()}
    table = []
    with matplotlib.rc_context(STYLE):
        figure, (axes,) = new_figure(1, height=2.7)
        for index, (name, members) in enumerate(series.items()):
            look, run = Look.number(index), runs[name]
            path = [began[name], *run] if name in began else run
            if name in began:
                table.append({"series": name, "step": 0} | _numbers(began[name], x, y))
            points = [_place(row, x, y) for row in path]
            arrow = {"arrowstyle": "-|>", "color": look.color, "linestyle": look.linestyle, "linewidth": 0.8}
            for start, end in itertools.pairwise(points):
                axes.annotate("", xy=end, xytext=start, arrowprops=arrow | {"shrinkA": 2, "shrinkB": 2})
            for row in [*run, *(row for row in members if row.system.step is None)]:
                axes.plot(
                    *_place(row, x, y), color=look.color, marker=look.marker, linestyle="none",
                    markerfacecolor="white" if row.flags else look.color, markeredgewidth=0.7,
                    markersize=5.0 if row.flags else 4.0,
                    zorder=4 if row.system.step is None else 2,  # single points must not be hidden by paths
                )  # fmt: skip
                table.append({"series": name, "step": row.system.step} | _numbers(row, x, y))
            if run:
                place = {"xytext": (4, 3), "textcoords": "offset points"}
                axes.annotate(
                    f"step {run[-1].system.step}", points[-1], **place, fontsize=_LABEL_SIZE, color=look.color
                )
            linestyle = look.linestyle if run else "none"
            axes.plot([], [], color=look.color, marker=look.marker, linestyle=linestyle, label=name)
        if any(row.flags for row in rows):
            axes.plot(
                [], [], color="0.3", marker="o", markerfacecolor="white", linestyle="none", label=_FLAGGED
            )
        _finish(axes, x, y)
        return save(figure, stem, pd.DataFrame(table, dtype=object))


# ---- parts ---------------------------------------------------------------------------------------


def _with_metrics(results: Results, names: Sequence[str]) -> list[SystemResult]:
    require_known(names)
    rows = [row for row in results.usable if all(row.number(name).estimate is not None for name in names)]
    if not rows:
        raise ValueError(f"no system has {' and '.join(names)}: there is nothing to draw")
    return rows


def _by_series(rows: Sequence[SystemResult]) -> dict[str, list[SystemResult]]:
    series: dict[str, list[SystemResult]] = {}
    for row in rows:
        series.setdefault(row.system.series or row.system.name, []).append(row)
    return series


def _value(row: SystemResult, metric: str) -> float:
    value = row.metrics[metric].estimate
    assert value is not None
    return value


def _place(row: SystemResult, x: str, y: str) -> tuple[float, float]:
    return _value(row, x), _value(row, y)


def _numbers(row: SystemResult, *metrics: str) -> dict[str, Any]:
    """Columns of a figure's CSV: of each metric the number and its interval, and the flags."""
    columns: dict[str, Any] = {}
    for name in metrics:
        found = row.metrics[name]
        columns |= {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}
    return columns | {"flags": "; ".join(row.flags)}


def _point(axes: Axes, row: SystemResult, x: str, y: str, look: Look, alone: bool) -> None:
    axes.errorbar(
        *_place(row, x, y), xerr=_error_bars([row.metrics[x]]), yerr=_error_bars([row.metrics[y]]),
        color=look.color, marker=look.marker, linestyle="none",
        markersize=6.0 if alone else 4.0 if look.strong else 3.2,
        markeredgecolor="white" if alone else look.color,  # which a strong line beneath must not swallow
        markeredgewidth=0.6, elinewidth=0.7 if look.strong else 0.4,
        zorder=4 if alone else 3 if look.strong else 2,
    )  # fmt: skip


def _in_points(axes: Axes, row: SystemResult, x: str, y: str) -> np.ndarray:
    """Where a system lies on the page, in points of 1/72 inch [2]."""
    return axes.transData.transform(_place(row, x, y)) * 72 / axes.get_figure(root=True).dpi


def _label_points(
    axes: Axes, rows: list[SystemResult], x: str, y: str, look: Look, index: int, taken: list[Bbox]
) -> None:
    """The setting that varies along a series, beside its points: its ends first, and only where there is room
    between what is there (`taken`, which grows)."""
    varied = {
        "γ": any(row.system.guidance_scale != 1 for row in rows),
        "T": any(row.system.temperature != 1 for row in rows),
    }
    # Each series tries another side first, so that the labels of neighbouring curves do not meet.
    sides = ((-1, -1), (1, 1), (1, -1), (-1, 1))
    inner = rows[1:-1] if len(rows) <= _MANY else rows[2:-1:2]
    low, high = axes.get_window_extent().get_points() * 72 / axes.get_figure(root=True).dpi
    for row in [rows[0], rows[-1], *inner]:
        text = _short_label(row, varied) or row.system.name
        width, height = 0.6 * _LABEL_SIZE * len(text), 1.2 * _LABEL_SIZE
        for right, up in (*sides[index % 4 :], *sides[: index % 4]):
            left, bottom = _in_points(axes, row, x, y) + np.array([4 * right, 3.5 * up])
            place = Bbox.from_bounds(left - width * (right < 0), bottom - height * (up < 0), width, height)
            # The axis and its numbers are left alone.
            if any(map(place.overlaps, taken)) or (place.min < low + 1).any() or (place.max > high).any():
                continue
            taken.append(place)
            axes.annotate(
                text, _place(row, x, y), xytext=(4 * right, 3.5 * up), textcoords="offset points",
                ha="left" if right > 0 else "right", va="bottom" if up > 0 else "top",
                fontsize=_LABEL_SIZE, color=look.color,
            )  # fmt: skip
            break


def _short_label(row: SystemResult, varied: Mapping[str, bool]) -> str:
    """λ of a merge; step of a checkpoint; n of a hybrid; γ, T and k where they vary along the series or are not
    neutral; empty for a plain model."""
    system = row.system
    if system.step is not None:
        return f"@{system.step}"
    told = [] if system.student_guidance is None else [f"γ {system.student_guidance:g}"]
    if system.merge_weight is not None:
        return ", ".join([f"λ {_short(system.merge_weight)}", *told])
    parts = [f"n {system.first_frames}"] if system.first else []
    parts += told
    parts += (
        [f"γ {system.guidance_scale:g}"] if not told and (varied["γ"] or system.guidance_scale != 1) else []
    )
    parts += [f"T {_short(system.temperature)}"] if varied["T"] or system.temperature != 1 else []
    parts += [f"k {system.top_k}"] if system.top_k else []
    return ", ".join(parts)


def _short(number: float) -> str:
    return f"{number:g}".removeprefix("0") if 0 < number < 1 else f"{number:g}"


def _upper_bound(axes: Axes, results: Results, x: str) -> None:
    """The diversity of different prompts under the same encoder, of the first base: nothing can be more
    diverse."""
    name = x.replace("diversity_", "different_prompts_")
    bases = [row for row in results.usable if row.system.role == "base" and name in row.metrics]
    if name == x or not bases or bases[0].metrics[name].estimate is None:
        return
    bound = _value(bases[0], name)
    left, right = axes.get_xlim()
    text = {"ha": "right", "va": "bottom", "fontsize": _LABEL_SIZE, "color": "0.3"}
    if bound < right + 0.15 * (right - left):
        axes.axvline(bound, color="0.4", linewidth=0.8, linestyle=(0, (1, 2)))
        place = ("data", "axes fraction")
        axes.annotate("different prompts ", (bound, 0), xycoords=place, rotation=90, **text)
    else:  # far away it would press the front into a corner
        axes.annotate(f"different prompts: {bound:.2f} →", (1, 0.02), xycoords="axes fraction", **text)


def _finish(axes: Axes, x: str, y: str, title: str | None = None) -> None:
    axes.set_xlabel(METRICS[x].axis)
    axes.set_ylabel(METRICS[y].axis)
    axes.grid(linewidth=0.3, color="0.88")
    axes.margins(0.08)
    figure = axes.figure
    assert figure is not None
    labels = axes.get_legend_handles_labels()[1]
    columns = 2 if max(map(len, labels)) <= _NARROW_LABEL else 1
    # The figure grows with its legend, so that the axes keep their height.
    lines = sum(label.count("\n") for label in labels) + math.ceil(len(labels) / columns) + bool(title)
    figure.set_figheight(figure.get_figheight() + _LEGEND_LINE * lines)
    figure.legend(**LEGEND | {"ncols": columns}, labelspacing=0.3, title=title, title_fontsize=6.5)


def _error_bars(values: Sequence[Estimate]) -> np.ndarray | None:
    """Lengths of error bars below and above [2, C]; None if there are none."""
    numbers = np.array([(value.low, value.estimate, value.high) for value in values], dtype=float)
    return None if np.isnan(numbers).any() else np.diff(numbers).clip(min=0).T
