"""What a card shows of a model: the numbers of its evaluation, and clips to hear before downloading anything."""

import os
from collections.abc import Sequence
from pathlib import Path

from transformers import GenerationConfig

from diverse_cfg import cards
from diverse_cfg.evaluation.metrics import METRICS
from diverse_cfg.evaluation.results import Results
from diverse_cfg.evaluation.systems import Mixture, System
from diverse_cfg.policies.families import family_of, load_generation_config
from diverse_cfg.policies.files import generate_files
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.provenance import read_provenance

_BETTER = {1: "higher", -1: "lower"}


def add_results(
    folder: str | os.PathLike,
    evaluation: str | os.PathLike | Results,
    system: str,
    metrics: Sequence[str] | None = None,
) -> list[cards.CardMetric]:
    """Put one row of an evaluation beside the weights, so that the card shows it.

    Args:
        folder: the model folder.
        evaluation: what `diverse-cfg evaluate` wrote, or its results.
        system: the row's name.
        metrics: names of those that are shown; None takes all that the row has.

    Returns:
        What the card will show.

    Raises:
        ValueError: the row failed, is another model's, or was sampled in another way than the folder is
            played.
    """
    results = evaluation if isinstance(evaluation, Results) else Results.load(evaluation)
    row = results[system]
    if not row.ok:
        raise ValueError(f"system {system!r} failed ({row.error}): there are no numbers for a card")
    if not any(_is_this(Path(folder), mixture) for mixture in row.system.replicates):
        raise ValueError(f"system {system!r} is made of {row.system.replicates}, which is not {folder}")
    _require_same_sampling(Path(folder), row.system)
    features = results.settings.get("features", {})
    judges = {name: features[name]["encoder"] for name in ("heldout", "reward") if name in features}
    judges |= {"judge": "attribute judge", "rules": "rules, no network"}
    shown = []
    for name in metrics or row.metrics:
        found = row.metrics.get(name)
        if found is not None and found.estimate is not None and name in METRICS:
            known = METRICS[name]
            judge = next((judges[need] for need in known.needs if need in judges), None)
            better = _BETTER.get(known.better)
            shown.append(cards.CardMetric(known.axis, found.estimate, found.low, found.high, judge, better))
    if not shown:
        raise ValueError(f"system {system!r} has no numbers for a card")
    prompts = f"{len(results.prompts)} prompts" + "".join(f"; note: {flag}" for flag in row.flags)
    seeds = len(results.settings.get("seeds", [0])) * len(row.system.replicates)
    clips = len(results.prompts) * results.settings.get("num_generations", 1) * seeds
    cards.write_metrics(folder, shown, prompts=prompts, num_clips=clips)
    return shown


def _is_this(folder: Path, mixture: Mixture) -> bool:
    """Whether one model of the evaluation is the folder: its path, or the merge that it records."""
    mixture = tuple((checkpoint, weight) for checkpoint, weight in mixture if weight)
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
    own = load_generation_config(folder) or GenerationConfig()
    wanted = {"guidance_scale": 1.0, "temperature": own.temperature, "top_k": own.top_k}
    for name, value in wanted.items():
        if value is not None and getattr(system, name) != value:
            raise ValueError(
                f"system {system.name!r} was evaluated with {name}={getattr(system, name):g}, but {folder} "
                f"is played with {value:g}: its card would show another model's numbers"
            )


def add_samples(folder: str | os.PathLike, prompts: Sequence[str]) -> list[cards.Sample]:
    """Generate one clip per prompt with the folder's own settings and list them for its card.

    The WAV files go into `samples/` inside the folder. Clips that the same call has made before are kept.

    Args:
        folder: the model folder.
        prompts: texts, one clip each.

    Raises:
        ValueError: there are samples of other prompts already, or the model cannot be loaded.
    """
    target = Path(folder) / Path(cards.SAMPLES_FILE).parent
    model = load_policy(folder)
    settings = model.generation_config
    tokens = settings.max_new_tokens or settings.max_length
    if not tokens:
        raise ValueError(
            f"{folder}/generation_config.json names no max_new_tokens: how long shall a sample be?"
        )
    usual = {"temperature": 1.0, "top_k": cards.TRANSFORMERS_TOP_K, "top_p": 1.0, "min_p": 0.0}
    own = {name: value for name in usual if (value := getattr(settings, name)) is not None}
    clips = generate_files(
        model,
        list(prompts),
        target,
        processor=load_processor(folder),
        num_frames=tokens - family_of(model).num_frames_to_tokens(0, model.config),
        resume=True,
        model_name=Path(folder).resolve().name,
        **(usual | own),
    )
    samples = [cards.Sample(f"{target.name}/{clip['file']}", clip["prompt"], clip["seed"]) for clip in clips]
    cards.write_samples(folder, samples)
    return samples
