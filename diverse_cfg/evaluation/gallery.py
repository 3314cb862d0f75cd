"""One static page to listen to: prompt × system with players, the numbers beside, and the figures above.

The folder is complete in itself (relative paths, no script or font from elsewhere), so it can be zipped,
mailed or put on any web server. Clips are copies at one loudness; the clips that were measured are their
codes in the cache.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diverse_cfg.acoustics import TARGET_LUFS, normalised
from diverse_cfg.atomic import write_text
from diverse_cfg.evaluation.generations import Player, describe
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Estimate, Results, SystemResult
from diverse_cfg.evaluation.sweep import Sweep
from diverse_cfg.evaluation.systems import System
from diverse_cfg.musicgen.files import write_wav
from diverse_cfg.untrusted import render, slug


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Args:
        file: path relative to the page.
        caption: what it shows.
    """

    file: str
    caption: str


def write_audio(
    results: Results, sweep: Sweep, folder: str | os.PathLike, num_prompts: int, num_generations: int
) -> dict[tuple[str, int], list[str]]:
    """Write the first clips of the first prompts of every system as WAV files of one loudness.

    Nothing is generated: the clips are those that were measured. Files that are there already are kept: they
    are named after the content of their clips.

    Args:
        results: of the sweep; failed systems have no clips.
        sweep: that made them; its cache holds the codes.
        folder: of the page; the files go to `audio/` below it.
        num_prompts: how many prompts.
        num_generations: how many clips of each.

    Returns:
        (system, prompt index) → paths relative to `folder`.

    Raises:
        ValueError: clips that are not in the cache.
    """
    folder = Path(folder)
    num_prompts = min(num_prompts, len(sweep.clips.prompts))
    num_generations = min(num_generations, sweep.clips.num_generations)
    files: dict[tuple[str, int], list[str]] = {}
    for index, row in enumerate(results.systems):
        if not row.ok:
            continue
        codes = kept_codes(row.system, sweep)
        player = Player(row.system.replicates[0], sweep.device)
        place = Path("audio") / f"{index:02d}-{slug(row.system.name, default='system')}"
        (folder / place).mkdir(parents=True, exist_ok=True)
        for prompt in range(num_prompts):
            first = prompt * sweep.clips.num_generations
            files[row.system.name, prompt] = _write_clips(
                folder, place, prompt, codes[first : first + num_generations], player
            )
    return files


def kept_codes(system: System, sweep: Sweep) -> np.ndarray:
    """Codes [P·G, K, T] that the evaluation kept of a system: its first replicate under the first sampling seed.

    Raises:
        ValueError: they are not in the cache.
    """
    description = describe(system, system.replicates[0], sweep.clips, sweep.clips.seeds[0])
    kept = sweep.cache.load("generations", description)
    if kept is None:
        raise ValueError(
            f"the clips of system {system.name!r} are not in {sweep.cache.folder}: the cache was deleted, or "
            "the model was written over; run `diverse-cfg evaluate` with this configuration again"
        )
    return kept["codes"]


def _write_clips(folder: Path, place: Path, prompt: int, codes: Any, player: Player) -> list[str]:
    names = [
        f"{prompt:02d}-{number}-{hashlib.blake2b(clip.tobytes(), digest_size=4).hexdigest()}.wav"
        for number, clip in enumerate(codes)
    ]
    missing = [number for number, name in enumerate(names) if not (folder / place / name).is_file()]
    if missing:
        audio = player.decode(torch.from_numpy(codes[missing].astype("int64")))
        for number, waveform in zip(missing, audio, strict=True):
            loud = torch.from_numpy(normalised(waveform.numpy(), player.sampling_rate))
            write_wav(folder / place / names[number], loud, player.sampling_rate)
    return [(place / name).as_posix() for name in names]


def write_gallery(
    results: Results,
    files: dict[tuple[str, int], list[str]],
    folder: str | os.PathLike,
    *,
    title: str,
    introduction: str = "",
    metrics: Sequence[str] | None = None,
    pictures: Sequence[Picture] = (),
) -> Path:
    """Write `index.html`.

    Args:
        results: table and numbers per prompt.
        files: from `write_audio`.
        folder: of the page.
        title: heading.
        introduction: a paragraph of plain text.
        metrics: columns of the table; None takes all.
        pictures: figures, in order.

    Returns:
        Path of the page.

    Raises:
        ValueError: a metric that does not exist.
    """
    names = list(metrics or results.metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown:
        raise ValueError(f"unknown metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    shown = sorted({prompt for _, prompt in files})
    beside = [name for name in names if METRICS[name].cells is not None and METRICS[name].better]
    page = {
        "title": title,
        "introduction": introduction,
        "pictures": list(pictures),
        "metrics": [METRICS[name] for name in names],
        "rows": [_table_row(row, names) for row in results.systems],
        "prompts": [
            {
                "text": results.prompts[prompt],
                "rows": [
                    {
                        "name": row.system.name,
                        "flagged": bool(row.flags),
                        "files": files[row.system.name, prompt],
                        "numbers": _of_prompt(row, prompt, beside[:3]),
                    }
                    for row in results.usable
                    if (row.system.name, prompt) in files
                ],
            }
            for prompt in shown
        ],
        "how": how_measured(results),
        "beside": _beside(results),
        "target": TARGET_LUFS,
    }
    return write_text(Path(folder) / "index.html", render("gallery.html.jinja", page))


def _table_row(row: SystemResult, names: Sequence[str]) -> dict[str, Any]:
    return {
        "name": row.system.name,
        "error": row.error,
        "flags": row.flags,
        "cells": [row.metrics.get(name, Estimate(None)).parts() for name in names],
    }


def how_measured(results: Results) -> str:
    """What the table's numbers are means over, and what their intervals hold for."""
    settings = results.settings
    seeds, clips = len(settings["seeds"]), settings["num_generations"]
    each = f"{clips} clips of each" + (f" under each of {seeds} sampling seeds" if seeds > 1 else "")
    training = max((len(row.system.replicates) for row in results.usable), default=1)
    drawn = "prompts"
    if training > 1:
        each += f", of students with up to {training} training seeds"
    if training >= 3:
        drawn += ", and over training seeds where a system has three or more"
    return (
        f"Means over {settings['num_prompts']} held-out prompts, {each}, with 95 % intervals over {drawn}."
    ) + (" Sampling times are resampled by batch." if "seconds" in results.metrics else "")


def _beside(results: Results) -> str:
    """Which clips the small numbers belong to."""
    settings = results.settings
    count = len(settings["seeds"]) * settings["num_generations"]
    training = any(len(row.system.replicates) > 1 for row in results.usable)
    whose = " of the system's first training seed" if training else ""
    return (
        f"The small numbers belong to all {count} clips{whose} for the prompt; the players hold the first of "
        "them."
    )


def _of_prompt(row: SystemResult, prompt: int, names: Sequence[str]) -> str:
    """The first replicate's numbers for one prompt, over all its clips: the players hold the first of them."""
    parts = []
    for name in names:
        cells = row.cells.get(name)
        if cells is not None and cells[prompt, 0] == cells[prompt, 0]:
            parts.append(f"{METRICS[name].label} {cells[prompt, 0]:.2f}")
    return " · ".join(parts)
