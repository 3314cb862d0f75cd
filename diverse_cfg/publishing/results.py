"""Numbers for a card, from an evaluation of this very model."""

import os
from pathlib import Path

from transformers import GenerationConfig

from diverse_cfg.cards import Metric, write_metrics
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Results
from diverse_cfg.evaluation.systems import Mixture, System
from diverse_cfg.musicgen import layout
from diverse_cfg.provenance import read_provenance

_BETTER = {1: "higher", -1: "lower"}


def add_results(folder: str | os.PathLike, evaluation: str | os.PathLike, system: str) -> list[Metric]:
    """Put one row of an evaluation beside the weights, so that the card shows it.

    Args:
        folder: the model folder.
        evaluation: what `diverse-cfg evaluate` wrote.
        system: the row's name.

    Returns:
        What the card will show.

    Raises:
        ValueError: the row failed, is another model's, or was sampled in another way than the folder is
            played.
    """
    results = Results.load(evaluation)
    row = results[system]
    if not row.ok:
        raise ValueError(f"system {system!r} failed ({row.error}): there are no numbers for a card")
    if not any(_is_this(Path(folder), mixture) for mixture in row.system.replicates):
        raise ValueError(f"system {system!r} is made of {row.system.replicates}, which is not {folder}")
    _require_same_sampling(Path(folder), row.system)
    metrics = []
    for name, estimate in row.metrics.items():
        if estimate.estimate is None or name not in METRICS:
            continue
        known = METRICS[name]
        label = f"{known.label} ({known.unit})" if known.unit else known.label
        judge = ", ".join(known.needs)
        metrics.append(
            Metric(label, estimate.estimate, estimate.low, estimate.high, judge, _BETTER.get(known.better))
        )
    if not metrics:
        raise ValueError(f"system {system!r} has no numbers for a card")
    prompts = f"{len(results.prompts)} prompts" + "".join(f"; note: {flag}" for flag in row.flags)
    clips = len(results.prompts) * results.settings.get("num_generations", 1) * len(row.system.replicates)
    write_metrics(folder, metrics, prompts=prompts, num_clips=clips)
    return metrics


def _is_this(folder: Path, mixture: Mixture) -> bool:
    """Whether one model of the evaluation is the folder: its path, or the merge that it records."""
    if len(mixture) == 1:
        return Path(mixture[0][0]).resolve() == folder.resolve()
    provenance = read_provenance(folder)
    experts = ((provenance and provenance.merge) or {}).get("experts", [])
    recorded = [(expert["name"], expert["weight"]) for expert in experts]
    evaluated = [(_short(name), weight) for name, weight in mixture]
    return len(recorded) == len(evaluated) and all(
        left[0] == right[0] and abs(left[1] - right[1]) < 1e-6
        for left, right in zip(recorded, evaluated, strict=True)
    )


def _short(checkpoint: str) -> str:
    return Path(checkpoint).resolve().name if Path(checkpoint).exists() else checkpoint


def _require_same_sampling(folder: Path, system: System) -> None:
    own = layout.load_generation_config(folder) or GenerationConfig()
    wanted = {"guidance_scale": 1.0, "temperature": own.temperature, "top_k": own.top_k}
    for name, value in wanted.items():
        if value is not None and getattr(system, name) != value:
            raise ValueError(
                f"system {system.name!r} was evaluated with {name}={getattr(system, name):g}, but {folder} "
                f"is played with {value:g}: its card would show another model's numbers"
            )
