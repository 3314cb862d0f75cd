"""From a configuration to a folder of results: numbers, figures, and a page to look and listen."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diverse_cfg.atomic import alone, write_text
from diverse_cfg.evaluation.cache import digest
from diverse_cfg.evaluation.figures import front, merge_curve, trajectories
from diverse_cfg.evaluation.gallery import Picture, how_measured, write_audio, write_gallery
from diverse_cfg.evaluation.generations import describe
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
from diverse_cfg.evaluation.results import Results, SystemResult
from diverse_cfg.evaluation.signatures import Arms, signatures, to_markdown
from diverse_cfg.evaluation.sweep import Sweep
from diverse_cfg.evaluation.systems import System
from diverse_cfg.untrusted import markdown, slug


def evaluate(
    config: SweepConfig,
    *,
    progress: bool = True,
    title: str | None = None,
    introduction: str = "",
    columns: Sequence[str] | None = None,
    pictures: Sequence[Picture] = (),
) -> Results:
    """Run a sweep and write everything about it into `config.output`.

    Results are saved before anything is drawn, so that a figure that cannot be made costs no numbers.

    Args:
        config: see `SweepConfig`.
        progress: show a progress bar.
        title: of the page to listen; None counts what is on it.
        introduction: of that page, plain text.
        columns: metrics in its table; None takes all.
        pictures: more figures, of files that are in the folder already.

    Raises:
        ValueError, FileNotFoundError: whatever is wrong with the configuration, before anything is
            generated; or every system failed.
    """
    for name in (config.x, config.y):
        if name is not None and name not in METRICS:
            raise ValueError(f"unknown metric {name!r} for an axis; known: {', '.join(METRICS)}")
    sweep, systems = build_sweep(config)
    _check_axes(config, sweep, systems)
    with alone(config.output):
        results = sweep.run(systems, config.compare_to, progress=progress)
        results.settings["clips"] = _clips(results, sweep)
        results.settings["timed_on"] = _timed_on(results, sweep)
        results.save(config.output)
        if not results.usable:
            write_text(Path(config.output) / "results.md", results.table() + "\n")
            raise ValueError(f"every system failed; the first: {results.systems[0].error}")
        pictures = [*draw(results, config.output, config.x, config.y), *pictures]
        write_text(Path(config.output) / "results.md", to_page(results, pictures, config))
        if config.gallery_prompts and config.gallery_generations:
            files = write_audio(
                results, sweep, config.output, config.gallery_prompts, config.gallery_generations
            )
            title = title or f"{len(results.systems)} systems on {len(results.prompts)} prompts"
            columns = [name for name in columns or results.metrics if name in results.metrics]
            write_gallery(
                results, files, config.output,
                title=title, introduction=introduction, metrics=columns, pictures=pictures,
            )  # fmt: skip
    return results


def _check_axes(config: SweepConfig, sweep: Sweep, systems: Sequence[System]) -> None:
    """Axes that the figures and findings of this sweep can be made of."""
    measured = [metric.name for metric in sweep.chosen]
    lerp = any(system.merge_weight is not None for system in systems)
    for axis, name in (("x", config.x), ("y", config.y)):
        if name is None:
            continue
        if name not in measured:
            raise ValueError(
                f"{axis}={name!r} is not measured here: add it to metrics, with what it needs, or take one of "
                f"{', '.join(measured)}"
            )
        if METRICS[name].cells is None and (lerp or config.arms):
            raise ValueError(
                f"{axis}={name!r} is a number of all prompts together, and merges and arms are compared prompt "
                "by prompt: take another metric"
            )
        if not METRICS[name].better and config.arms:
            raise ValueError(
                f"{axis}={name!r} is neither better when larger nor when smaller, and arms compare fronts: take "
                "another metric"
            )


def _described(row: SystemResult, sweep: Sweep) -> list[dict[str, Any]]:
    """Descriptions of a system's clips, by replicate and seed."""
    return [
        describe(row.system, mixture, sweep.clips, seed)
        for mixture in row.system.replicates
        for seed in sweep.clips.seeds
    ]


def _clips(results: Results, sweep: Sweep) -> dict[str, list[str]]:
    """What identifies the clips of each system: the keys under which they are kept."""
    return {row.system.name: list(map(digest, _described(row, sweep))) for row in results.usable}


def _timed_on(results: Results, sweep: Sweep) -> list[str]:
    """Machines on which the clips were sampled and timed; kept clips may be another machine's."""
    facts = [
        sweep.cache.facts("generations", description)
        for row in results.usable
        for description in _described(row, sweep)
    ]
    return sorted({found.get("machine", "a machine that was not recorded") for found in facts})


def to_page(results: Results, pictures: Sequence[Picture], config: SweepConfig) -> str:
    """Everything as one Markdown page: findings, figures, table, glossary, how it was measured."""
    lines = ["# Results", ""]
    if config.arms:
        x, y = config.x or first_metric(results, DIVERSITIES), config.y or first_metric(results, QUALITIES)
        if x and y:
            arms = Arms(**{**config.arms, "sweeps": tuple(config.arms.get("sweeps") or ())})
            found = signatures(results, arms, quality=y, diversity=x)
            lines += ["## The paper's findings", "", to_markdown(found)]
    for picture in pictures:
        caption = markdown(picture.caption)
        lines += [f"![{caption}]({picture.file})", "", caption, ""]
    settings = results.settings
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    how = f"{how_measured(results)} Sampling seeds {settings['seeds']}; {settings['machine']}; {versions}."
    if "seconds" in results.metrics and (machines := settings.get("timed_on")):
        how += f" Sampling was timed on {'; '.join(machines)}."
        how += " Times of different machines do not compare." if len(machines) > 1 else ""
    lines += ["## Numbers", "", results.table(), "", how]
    lines += ["", "## What the columns mean", ""]
    lines += [f"- **{METRICS[name].label}**: {METRICS[name].explanation}" for name in results.metrics]
    return "\n".join(lines) + "\n"


def draw(
    results: Results, folder: str | os.PathLike, x: str | None = None, y: str | None = None
) -> list[Picture]:
    """Every figure that these results have the numbers for: front, LERPs, trajectories.

    Args:
        results: of a sweep.
        folder: where the files go.
        x: horizontal axis; None takes diversity under the held-out encoder.
        y: vertical axis; None takes adherence.

    Returns:
        The figures, for a page in the same folder; none when there is no quality or no diversity to draw.
    """
    folder = Path(folder)
    x, y = x or first_metric(results, DIVERSITIES), y or first_metric(results, QUALITIES)
    if x is None or y is None:
        return []
    front(results, x, y, folder / "front")
    pictures = [
        Picture("front.svg", "Quality against diversity, with 95 % intervals. Up and to the right is better.")
    ]
    for series in dict.fromkeys(row.system.series for row in results.usable):
        rows = [row.system for row in results.usable if row.system.series == series]
        weights = {system.merge_weight for system in rows}
        if {0.0, 1.0} < weights - {None}:
            name = f"lerp-{slug(series, default='series')}"
            merge_curve(results, series, [x, y], folder / name)
            caption = (
                f"{_title(series)}: the merge weight is a knob. Dashed: the straight line between the ends."
            )
            pictures.append(Picture(f"{name}.svg", caption))
    in_runs = Counter(row.system.series for row in results.usable if row.system.step is not None)
    if max(in_runs.values(), default=0) > 1:  # one checkpoint alone is no path
        trajectories(results, x, y, folder / "trajectories")
        pictures.append(Picture("trajectories.svg", "Training runs in the plane of quality and diversity."))
    return pictures


QUALITIES = ("adherence", "rules", "aesthetics_ce", "text")
DIVERSITIES = ("diversity_heldout", "diversity_reward")


def first_metric(results: Results, names: tuple[str, ...]) -> str | None:
    """The first of these metrics that the results have."""
    return next((name for name in names if name in results.metrics), None)


def _title(text: str) -> str:
    return text[:1].upper() + text[1:]
