"""Results split by level: how many attributes of the nano world a prompt names.

A prompt that names all four leaves nothing free; one that names the instrument alone leaves nearly everything. What a
method gains may lie in one and not in the other, so no table of mixed prompts stands alone. Everything is computed
from the cells per prompt, so that results that were recorded earlier can be split too; numbers of a whole set
(Fréchet, MMD, the distance between prompts) have no cells, and are in no split.
"""

import os
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Results, SystemResult, estimate_of_cells
from diverse_cfg.nano.attributes import level_of
from diverse_cfg.untrusted import frame_csv

LEVELS_FILE = "levels.csv"


def levels_of(results: Results) -> list[int]:
    """The levels that the prompts have, ascending; none where a prompt is of another world."""
    found = {level_of(prompt) for prompt in results.prompts}
    return [] if 0 in found else sorted(found)


def of_levels(results: Results, levels: Collection[int]) -> Results:
    """The results on the prompts of these levels alone.

    Raises:
        ValueError: no prompt has such a level.
    """
    chosen = [index for index, prompt in enumerate(results.prompts) if level_of(prompt) in levels]
    if not chosen:
        there = ", ".join(map(str, levels_of(results))) or "none"
        raise ValueError(f"no prompt is of level {', '.join(map(str, levels))}; there are {there}")
    return of_prompts(results, chosen)


def of_prompts(results: Results, chosen: Sequence[int]) -> Results:
    """The results on some of the prompts, by their indices."""
    rows = [_row_of_prompts(row, np.asarray(chosen)) for row in results.systems]
    settings = results.settings | {"num_prompts": len(chosen)}
    return Results([results.prompts[index] for index in chosen], rows, settings, results.compare_to)


def _row_of_prompts(row: SystemResult, chosen: np.ndarray) -> SystemResult:
    cells = {name: values[chosen] for name, values in row.cells.items()}
    clusters = {name: labels[chosen] for name, labels in row.clusters.items()}
    metrics = {
        name: estimate_of_cells(METRICS[name], values, clusters.get(name))
        for name, values in cells.items()
        if name in METRICS
    }
    return replace(row, metrics=metrics, cells=cells, clusters=clusters)


def level_frame(results: Results, metrics: Sequence[str] | None = None) -> pd.DataFrame:
    """`Results.frame` of every level, one after the other, with a column `level` in front.

    Args:
        results: on prompts of the nano world.
        metrics: names; None takes all.
    """
    frames = []
    for level in levels_of(results):
        frame = of_levels(results, [level]).frame(metrics)
        frame.insert(0, "level", level)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def level_tables(results: Results, metrics: Sequence[str] | None = None) -> str:
    """A Markdown table of every level."""
    parts = []
    for level in levels_of(results):
        part = of_levels(results, [level])
        named = "1 named attribute" if level == 1 else f"{level} named attributes"
        parts.append(f"### Prompts with {named}: {len(part.prompts)}\n\n{part.table(metrics)}")
    return "\n\n".join(parts)


def save_levels(results: Results, folder: str | os.PathLike) -> Path | None:
    """Write `levels.csv`, which is `level_frame`; nothing where all prompts are of one level."""
    if len(levels_of(results)) < 2:
        return None
    return write_text(Path(folder) / LEVELS_FILE, frame_csv(level_frame(results), float_format="%.6g"))
