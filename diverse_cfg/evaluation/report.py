"""From a configuration to a folder of results: numbers, figures, and a page to look and listen.

The folder is complete in itself (relative paths, no script or font from elsewhere), so it can be zipped, mailed or
put on any web server. Clips are copies at one loudness; the clips that were measured are their codes in the cache.
"""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diverse_cfg.acoustics import TARGET_LUFS
from diverse_cfg.atomic import alone, write_text
from diverse_cfg.evaluation.figures import front, merge_curve, on_surface, surface, trajectories
from diverse_cfg.evaluation.levels import level_tables, levels_of, save_levels
from diverse_cfg.evaluation.metrics import METRICS, require_known
from diverse_cfg.evaluation.protocol import SweepConfig, build_sweep
from diverse_cfg.evaluation.results import Results, SystemResult
from diverse_cfg.evaluation.signatures import Arms, signatures, to_markdown
from diverse_cfg.evaluation.sweep import Sweep, write_audio
from diverse_cfg.evaluation.systems import System
from diverse_cfg.untrusted import markdown, render, slug

QUALITIES = ("adherence", "rules", "aesthetics_ce", "text")
DIVERSITIES = ("diversity_heldout", "diversity_reward")


@dataclass(frozen=True)
class Picture:
    """A figure on the page.

    Args:
        file: path relative to the page.
        caption: what it shows.
    """

    file: str
    caption: str


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
    require_known(name for name in (config.x, config.y) if name is not None)
    sweep, systems = build_sweep(config)
    _check_axes(config, sweep, systems)
    with alone(config.output):
        results = sweep.run(systems, config.compare_to, progress=progress)
        results.save(config.output)
        save_levels(results, config.output)
        if not results.usable:
            write_text(Path(config.output) / "results.md", results.table() + "\n")
            raise ValueError(f"every system failed; the first: {results.systems[0].error}")
        pictures = [*_draw(results, config.output, config.x, config.y), *pictures]
        write_text(Path(config.output) / "results.md", _to_page(results, pictures, config))
        if config.gallery_prompts and config.gallery_generations:
            files = write_audio(
                results, sweep, config.output, config.gallery_prompts, config.gallery_generations
            )
            title = title or f"{len(results.systems)} systems on {len(results.prompts)} prompts"
            columns = [name for name in columns or results.metrics if name in results.metrics]
            _write_gallery(
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


def _to_page(results: Results, pictures: Sequence[Picture], config: SweepConfig) -> str:
    """Everything as one Markdown page: findings, figures, table, glossary, how it was measured."""
    lines = ["# Results", ""]
    x, y = config.x or first_metric(results, DIVERSITIES), config.y or first_metric(results, QUALITIES)
    if config.arms and x and y:
        found = signatures(results, Arms(**config.arms), quality=y, diversity=x)
        lines += ["## The paper's findings", "", to_markdown(found)]
    for picture in pictures:
        caption = markdown(picture.caption)
        lines += [f"![{caption}]({picture.file})", "", caption, ""]
    settings = results.settings
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    how = f"{_how_measured(results)} Sampling seeds {settings['seeds']}; {settings['machine']}; {versions}."
    if "seconds" in results.metrics and (machines := settings.get("timed_on")):
        how += f" Sampling was timed on {'; '.join(machines)}."
        how += " Times of different machines do not compare." if len(machines) > 1 else ""
    lines += ["## Numbers", "", results.table(), "", how]
    if len(levels_of(results)) > 1:
        lines += ["", "## Numbers by level", "", level_tables(results)]
    lines += ["", "## What the columns mean", ""]
    lines += [f"- **{METRICS[name].label}**: {METRICS[name].explanation}" for name in results.metrics]
    return "\n".join(lines) + "\n"


def _write_gallery(
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
    """
    names = list(metrics or results.metrics)
    settings = results.settings
    whose = f"all {len(settings['seeds']) * settings['num_generations']} clips"
    if any(len(row.system.replicates) > 1 for row in results.usable):
        whose += " of the system's first training seed"
    shown = sorted({prompt for _, prompt in files})
    beside = [name for name in names if METRICS[name].cells is not None and METRICS[name].better]
    page = {
        "title": title,
        "introduction": introduction,
        "pictures": pictures,
        "metrics": [METRICS[name] for name in names],
        "systems": results.systems,
        "prompts": [
            (
                results.prompts[prompt],
                [row for row in results.usable if (row.system.name, prompt) in files],
                prompt,
            )
            for prompt in shown
        ],
        "files": files,
        "beside": lambda row, prompt: _of_prompt(row, prompt, beside[:3]),
        "how": _how_measured(results),
        "whose": f"The small numbers belong to {whose} for the prompt; the players hold the first of them.",
        "target": TARGET_LUFS,
    }
    return write_text(Path(folder) / "index.html", render("gallery.html.jinja", page))


def _how_measured(results: Results) -> str:
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


def _of_prompt(row: SystemResult, prompt: int, names: Sequence[str]) -> str:
    """The first replicate's numbers for one prompt, over all its clips: the players hold the first of them."""
    parts = []
    for name in names:
        cells = row.cells.get(name)
        if cells is not None and cells[prompt, 0] == cells[prompt, 0]:
            parts.append(f"{METRICS[name].label} {cells[prompt, 0]:.2f}")
    return " · ".join(parts)


def _draw(
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
        if on_surface(results, series):
            name = f"surface-{slug(series, default='series')}"
            surface(results, series, [x, y], folder / name)
            caption = "γ and the merge weight are two knobs of one model."
            pictures.append(Picture(f"{name}.svg", f"{series[:1].upper()}{series[1:]}: {caption}"))
            continue
        rows = [row.system for row in results.usable if row.system.series == series]
        weights = {system.merge_weight for system in rows}
        if {0.0, 1.0} < weights - {None}:
            name = f"lerp-{slug(series, default='series')}"
            merge_curve(results, series, [x, y], folder / name)
            caption = "the merge weight is a knob. Dashed: the straight line between the ends."
            pictures.append(Picture(f"{name}.svg", f"{series[:1].upper()}{series[1:]}: {caption}"))
    in_runs = Counter(row.system.series for row in results.usable if row.system.step is not None)
    if max(in_runs.values(), default=0) > 1:  # one checkpoint alone is no path
        trajectories(results, x, y, folder / "trajectories")
        pictures.append(Picture("trajectories.svg", "Training runs in the plane of quality and diversity."))
    return pictures


def first_metric(results: Results, names: tuple[str, ...]) -> str | None:
    """The first of these metrics that the results have a number of: prompts may ask for nothing that a judge hears."""
    measured = {n for row in results.usable for n in results.metrics if row.number(n).estimate is not None}
    return next((name for name in names if name in measured), None)
