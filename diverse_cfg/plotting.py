"""How figures look and are written, and the one that trainings, cards and experiments share: logged metrics as curves.

Figures have the width of a paper's column and can be read in black and white; beside SVG and PNG lies the CSV of
exactly what is drawn.
"""

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diverse_cfg.atomic import replacing, write_text
from diverse_cfg.reading import last_checkpoint
from diverse_cfg.untrusted import frame_csv

Log = Sequence[Mapping[str, Any]]
"""What a run logged: entries with a `step` and metrics by name; one that is `flagged` is drawn hollow."""

PANELS = (("kl/clip", "KL to the teacher (nats)"), ("reward/diversity", "diversity (reward)"))

COLUMN_WIDTH = 3.4  # inches
_NO_DATE = {"svg": {"Date": None}, "png": {"Software": None}}  # one figure, one file
# Okabe and Ito's colours, which the colour-blind tell apart too, in an order of falling contrast in grey.
_COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LINES = ("-", "--", ":", "-.", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (6, 2, 1, 2)))
STYLE = {
    "font.size": 7.5,
    "axes.labelsize": 7.5,
    "legend.fontsize": 6.5,
    "xtick.labelsize": 6.5,
    "ytick.labelsize": 6.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.0,
    "lines.markersize": 4.0,
    "savefig.dpi": 300,
    "svg.fonttype": "none",
    "text.parse_math": False,  # a dollar sign in a name is one
    "svg.hashsalt": "diverse-cfg",
    "font.family": "DejaVu Sans",
}


LEGEND: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False, "handlelength": 3.0}


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    color: str
    marker: str
    linestyle: Any
    strong: bool = False

    @property
    def width(self) -> float:
        """Of its line, in points."""
        return 1.8 if self.strong else 0.8

    @classmethod
    def number(cls, index: int) -> "Look":
        return cls(*(looks[index % len(looks)] for looks in (_COLOURS, _MARKERS, _LINES)))


def new_figure(panels: int, height: float, columns: int = 2) -> tuple[Figure, list[Axes]]:
    """Panels beside each other: two take a column's width, and a row has at most so many `columns`."""
    columns = min(panels, columns)
    lines = math.ceil(panels / columns)
    width = COLUMN_WIDTH * max(1, columns / 2)
    figure = Figure(figsize=(width, height * lines), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: a library must not choose the caller's backend
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def save(
    figure: Figure, stem: str | os.PathLike, *tables: pd.DataFrame, pictures: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """Write the pictures, and the tables of what is drawn as one CSV, an empty line between them; return the paths."""
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for ending in pictures:
        paths.append(stem.with_name(f"{stem.name}.{ending}"))
        with replacing(paths[-1]) as temporary:
            figure.savefig(temporary, format=ending, metadata=_NO_DATE[ending])
    if tables:
        text = "\n".join(map(frame_csv, tables))
        paths.append(write_text(stem.with_name(f"{stem.name}.csv"), text))
    return paths


def png(values: np.ndarray, colours: str = "magma") -> bytes:
    """A small picture of numbers in 0 … 1 [rows, columns], such as a `piano_roll`."""
    picture = io.BytesIO()
    matplotlib.image.imsave(
        picture, values, cmap=colours, vmin=0, vmax=1, format="png", metadata=_NO_DATE["png"]
    )
    return picture.getvalue()


def training_curves(
    runs: Mapping[str, str | os.PathLike],
    stem: str | os.PathLike,
    metrics: Sequence[tuple[str, str]] = PANELS,
    smooth: int = 1,
) -> list[Path]:
    """Logged metrics along training, one line per run.

    Args:
        runs: label → folder of a training run (its `trainer_state.json` is read, or that of its last
            checkpoint).
        stem: path without ending.
        metrics: (logged name, label) of each panel; a run that did not log one has no line there.
        smooth: width of a running mean, in training steps; what is logged less often is drawn as it is.

    Raises:
        FileNotFoundError: a run without a log.
        ValueError: no run has any of the metrics.
    """
    logs = {label: [_training_log(folder)] for label, folder in runs.items()}
    return draw_curves(logs, stem, metrics, smooth)


def draw_curves(
    arms: Mapping[str, Sequence[Log]],
    stem: str | os.PathLike,
    metrics: Sequence[tuple[str, str]] = PANELS,
    smooth: int = 1,
    *,
    columns: int = 2,
    pictures: Sequence[str] | None = None,
) -> list[Path]:
    """As `training_curves`, from logs; of an arm with several seeds the mean, over a band from least to most.

    Args:
        arms: label → the logs of its seeds; steps that not every seed has logged are left out, and seeds that
            never logged a metric.
        columns: most panels in a row.
        pictures: endings of the only files wanted; None writes SVG, PNG and CSV.
    """
    table: list[list[Any]] = []
    found = [
        m for m in metrics if any(m[0] in entry for logs in arms.values() for log in logs for entry in log)
    ]
    if not found:
        raise ValueError(f"none of the runs logged {', '.join(name for name, _ in metrics)}")
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(found), height=2.2, columns=columns)
        for axes, (name, label) in zip(panels, found, strict=True):
            for index, (arm, logs) in enumerate(arms.items()):
                (steps, values), look = _aligned(logs, name), Look.number(index)
                if len(steps):
                    _line(axes, steps, values, smooth, arm, look)
                    hollow = [step in _flagged(logs, name) for step in steps]
                    if any(hollow):
                        axes.plot(
                            steps[hollow], values.mean(0)[hollow], color=look.color, linestyle="none",
                            marker=look.marker, markersize=5, markerfacecolor="white", markeredgewidth=0.7, zorder=3,
                        )  # fmt: skip
                    rows = zip(steps, values.mean(0), values.min(0), values.max(0), strict=True)
                    table += [[arm, name, int(step), *numbers] for step, *numbers in rows]
            axes.set_xlabel("training step")
            axes.set_ylabel(label)
            axes.grid(axis="y", linewidth=0.3, color="0.85")
        if any(_flagged(logs, name) for logs in arms.values() for name, _ in found):
            panels[0].plot(
                [], [], color="0.3", marker="o", markersize=3, markerfacecolor="white", linestyle="none",
                label="hollow: invalid audio",
            )  # fmt: skip
        handles = {}
        for axes in panels:  # a run may have logged one metric only
            handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        if handles:
            figure.legend(list(handles.values()), list(handles), **LEGEND)
        if pictures is not None:
            return save(figure, stem, pictures=pictures)
        return save(
            figure, stem, pd.DataFrame(table, columns=["run", "metric", "step", "value", "least", "most"])
        )


def _training_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """What a training run logged, one entry per logged step.

    Raises:
        FileNotFoundError: neither the folder nor a checkpoint in it has a `trainer_state.json`.
    """
    whole_run = (Path(folder) / "trainer_state.json").is_file()
    state = folder if whole_run else last_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(
            f"{folder} has no trainer_state.json, nor has a checkpoint in it: is it a training run?"
        )
    return json.loads((Path(state) / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def _aligned(logs: Sequence[Log], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every seed has logged [T], and their values [seeds, T]."""
    points = [{entry["step"]: entry[name] for entry in log if name in entry} for log in logs]
    points = [point for point in points if point]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return np.array(steps, dtype=float), np.array([[p[step] for step in steps] for p in points], dtype=float)


def _flagged(logs: Sequence[Log], name: str) -> set[float]:
    """Steps at which a metric was measured of something flagged."""
    return {entry["step"] for log in logs for entry in log if name in entry and entry.get("flagged")}


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, smooth: int, label: str, look: Look) -> None:
    width = round(smooth / np.diff(steps).mean()) if len(steps) > 1 else 1
    smoothed = [_running_mean(steps, row, width) for row in values]
    at, lines = smoothed[0][0], np.stack([line for _, line in smoothed])
    axes.plot(
        at, lines.mean(0), color=look.color, linestyle=look.linestyle, label=label,
        marker=look.marker, markevery=max(1, len(at) // 6), markersize=3,
    )  # fmt: skip
    if len(lines) > 1:
        axes.fill_between(at, lines.min(0), lines.max(0), color=look.color, alpha=0.18, linewidth=0)


def _running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    width = min(width, len(values))
    if width < 2:
        return steps, values
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")
