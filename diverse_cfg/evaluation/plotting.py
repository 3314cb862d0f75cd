"""How the figures look, and how they are written: a paper's column, readable in black and white, SVG + PNG
+ CSV."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from diverse_cfg.atomic import replacing, write_text
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Estimate
from diverse_cfg.untrusted import csv_text

COLUMN_WIDTH = 3.4  # inches
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


def axis_label(metric: str) -> str:
    """Label with the unit, if it has one."""
    known = METRICS[metric]
    return f"{known.label} ({known.unit})" if known.unit else known.label


def new_figure(panels: int, height: float) -> tuple[Figure, list[Axes]]:
    """Panels beside each other, at most two in a row of a column's width."""
    columns = min(panels, 2)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(COLUMN_WIDTH, height * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]


def save(figure: Figure, stem: str | os.PathLike, table: list[list[Any]]) -> list[Path]:
    stem = Path(stem)
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = []
    for ending, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
        paths.append(stem.with_name(f"{stem.name}.{ending}"))
        with replacing(paths[-1]) as temporary:
            figure.savefig(temporary, format=ending, metadata=metadata)
    paths.append(write_text(stem.with_name(f"{stem.name}.csv"), csv_text(table)))
    return paths


def running_mean(steps: np.ndarray, values: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    width = min(width, len(values))
    if width < 2:
        return steps, values
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def error_bars(values: Sequence[Estimate]) -> np.ndarray | None:
    """Lengths of error bars below and above [2, C]; None if there are none."""
    if any(value.low is None or value.high is None or value.estimate is None for value in values):
        return None
    return np.array(
        [
            [max(0.0, value.estimate - value.low) for value in values],  # type: ignore[operator]
            [max(0.0, value.high - value.estimate) for value in values],  # type: ignore[operator]
        ]
    )
