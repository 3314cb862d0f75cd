"""Logged metrics along training, one line per run (or per arm of several seeds), from the trainer's logs."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from diverse_cfg.evaluation.plotting import STYLE, Look, new_figure, running_mean, save

Log = Sequence[Mapping[str, Any]]
"""What a run logged: entries with a `step` and metrics by name; one that is `flagged` is drawn hollow."""

PANELS = (("kl/clip", "KL to the teacher (nats)"), ("reward/diversity", "diversity (reward)"))


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
    logs = {label: [training_log(folder)] for label, folder in runs.items()}
    return draw_curves(logs, stem, metrics, smooth)


def draw_curves(
    arms: Mapping[str, Sequence[Log]],
    stem: str | os.PathLike,
    metrics: Sequence[tuple[str, str]] = PANELS,
    smooth: int = 1,
) -> list[Path]:
    """As `training_curves`, from logs; of an arm with several seeds the mean, over a band from least to most.

    Args:
        arms: label → the logs of its seeds; steps that not every seed has logged are left out, and seeds that
            never logged a metric.
    """
    table: list[list[Any]] = [["run", "metric", "step", "value", "least", "most"]]
    found = [
        m for m in metrics if any(m[0] in entry for logs in arms.values() for log in logs for entry in log)
    ]
    if not found:
        raise ValueError(f"none of the runs logged {', '.join(name for name, _ in metrics)}")
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(found), height=2.2)
        for axes, (name, label) in zip(panels, found, strict=True):
            for index, (arm, logs) in enumerate(arms.items()):
                steps, values = _aligned(logs, name)
                if len(steps):
                    _line(axes, steps, values, smooth, arm, Look.number(index))
                    hollow = [step in _flagged(logs, name) for step in steps]
                    if any(hollow):
                        _hollow(axes, steps[hollow], values.mean(0)[hollow], Look.number(index))
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
        figure.legend(
            handles.values(),
            handles.keys(),
            frameon=False,
            loc="outside lower center",
            ncols=2,
            handlelength=3.0,
        )
        return save(figure, stem, table)


def training_log(folder: str | os.PathLike) -> list[dict[str, Any]]:
    """What a training run logged, one entry per logged step.

    Raises:
        FileNotFoundError: neither the folder nor a checkpoint in it has a `trainer_state.json`.
    """
    folder = Path(folder)
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    for path in (folder, *reversed(checkpoints)):
        if (path / "trainer_state.json").is_file():
            return json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    raise FileNotFoundError(
        f"{folder} has no trainer_state.json, nor has a checkpoint in it: is it a training run?"
    )


def _aligned(logs: Sequence[Log], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps that every seed has logged [T], and their values [seeds, T]."""
    points = [{entry["step"]: entry[name] for entry in log if name in entry} for log in logs]
    points = [point for point in points if point]
    steps = sorted(set.intersection(*map(set, points))) if points else []
    return np.array(steps, dtype=float), np.array([[p[step] for step in steps] for p in points], dtype=float)


def _flagged(logs: Sequence[Log], name: str) -> set[float]:
    """Steps at which a metric was measured of something flagged."""
    return {entry["step"] for log in logs for entry in log if name in entry and entry.get("flagged")}


def _hollow(axes: Axes, steps: np.ndarray, values: np.ndarray, look: Look) -> None:
    axes.plot(
        steps, values, color=look.color, linestyle="none", marker=look.marker, markersize=5,
        markerfacecolor="white", markeredgewidth=0.7, zorder=3,
    )  # fmt: skip


def _line(axes: Axes, steps: np.ndarray, values: np.ndarray, smooth: int, label: str, look: Look) -> None:
    width = round(smooth / np.diff(steps).mean()) if len(steps) > 1 else 1
    smoothed = [running_mean(steps, row, width) for row in values]
    at, lines = smoothed[0][0], np.stack([line for _, line in smoothed])
    axes.plot(
        at, lines.mean(0), color=look.color, linestyle=look.linestyle, label=label,
        marker=look.marker, markevery=max(1, len(at) // 6), markersize=3,
    )  # fmt: skip
    if len(lines) > 1:
        axes.fill_between(at, lines.min(0), lines.max(0), color=look.color, alpha=0.18, linewidth=0)
