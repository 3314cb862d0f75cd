"""Logged metrics along training, one line per run, from the logs that the trainer leaves."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from diverse_cfg.evaluation.plotting import STYLE, Look, new_figure, running_mean, save


def training_curves(
    runs: Mapping[str, str | os.PathLike],
    stem: str | os.PathLike,
    metrics: Sequence[tuple[str, str]] = (
        ("kl/clip", "KL to the teacher (nats)"),
        ("reward/diversity", "diversity (reward)"),
    ),
    smooth: int = 1,
) -> list[Path]:
    """Logged metrics along training, one line per run.

    Args:
        runs: label → folder of a training run (its `trainer_state.json` is read, or that of its last
            checkpoint).
        stem: path without ending.
        metrics: (logged name, label) of each panel; a run that did not log one has no line there.
        smooth: width of a running mean over logged values.

    Raises:
        FileNotFoundError: a run without a log.
        ValueError: no run has any of the metrics.
    """
    table: list[list[Any]] = [["run", "metric", "step", "value"]]
    histories = {label: training_log(folder) for label, folder in runs.items()}
    found = [
        metric for metric in metrics if any(metric[0] in entry for log in histories.values() for entry in log)
    ]
    if not found:
        raise ValueError(f"none of the runs logged {', '.join(name for name, _ in metrics)}")
    with matplotlib.rc_context(STYLE):
        figure, panels = new_figure(len(found), height=2.2)
        for axes, (name, label) in zip(panels, found, strict=True):
            for index, (run, log) in enumerate(histories.items()):
                points = [(entry["step"], entry[name]) for entry in log if name in entry]
                if not points:
                    continue
                steps, values = (np.array(column, dtype=float) for column in zip(*points, strict=True))
                look = Look.number(index)
                axes.plot(
                    *running_mean(steps, values, smooth),
                    color=look.color,
                    linestyle=look.linestyle,
                    label=run,
                    marker=look.marker,
                    markevery=max(1, len(steps) // 6),
                    markersize=3,
                )
                table += [[run, name, int(step), value] for step, value in zip(steps, values, strict=True)]
            axes.set_xlabel("training step")
            axes.set_ylabel(label)
            axes.grid(axis="y", linewidth=0.3, color="0.85")
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
