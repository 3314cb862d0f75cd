"""Model cards: what a folder says about itself, as the README.md that the Hub shows.

Everything on a card comes from files in the folder: `diverse_cfg.json` (what it is),
`generation_config.json` (how it is played), `evaluation.json` (metrics), `samples/` (clips to hear),
`trainer_state.json` (training curves). What is not there is not claimed. Trainer, merging and publishing
render the same card through `write_card`.
"""

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from diverse_cfg.atomic import write_text
from diverse_cfg.policies.families import family_of, load_config, load_generation_config
from diverse_cfg.provenance import Provenance, read_provenance
from diverse_cfg.reading import read_json, reading
from diverse_cfg.untrusted import inside, render, slug

CARD_FILE = "README.md"
METRICS_FILE = "evaluation.json"
SAMPLES_FILE = "samples/samples.json"
CURVES_FILE = "training_curves.png"
PAPER = "arxiv:2410.06084"

# Licences of weights whose card cannot be read without a network.
_KNOWN_LICENSES = {"facebook/musicgen-": "cc-by-nc-4.0"}
TRANSFORMERS_TOP_K = 50  # what `generate` falls back to when a configuration names none
MARK = "<!-- written by diverse-cfg; delete this line to keep your own edits -->"
_GENERATED = (MARK, "# Model Card for Model ID", "<!-- This model card has been generated automatically")
_REMEDY = "correct it, or delete it to get a card without it"
_DEFAULT_PROMPT = "a calm piano piece"


@dataclass(frozen=True)
class CardMetric:
    """One number on a card, with its interval.

    Args:
        name: what was measured, e.g. "within-prompt diversity".
        value: the mean.
        low: lower end of the 95 % interval.
        high: upper end.
        judge: encoder or model that measured it.
        better: "higher" or "lower"; None where neither is.
    """

    name: str
    value: float
    low: float | None = None
    high: float | None = None
    judge: str | None = None
    better: str | None = None


@dataclass(frozen=True)
class Sample:
    """One clip on a card: `file` is relative to the model folder."""

    file: str
    prompt: str
    seed: int | None = None


def write_metrics(
    folder: str | os.PathLike, metrics: Sequence[CardMetric], *, prompts: str, num_clips: int
) -> Path:
    """Put evaluation results beside the weights, for the card.

    Args:
        folder: the model folder.
        metrics: the numbers.
        prompts: what they were measured on, e.g. "nano test prompts (48)".
        num_clips: generated clips that went into them.
    """
    content = {"prompts": prompts, "num_clips": num_clips, "metrics": [asdict(metric) for metric in metrics]}
    return write_text(Path(folder) / METRICS_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_samples(folder: str | os.PathLike, samples: Sequence[Sample]) -> Path:
    """List clips that were written below `folder`, so that the card plays them."""
    for sample in samples:
        if not inside(folder, sample.file).is_file():
            raise FileNotFoundError(f"sample {sample.file} is not in {folder}")
    path = Path(folder) / SAMPLES_FILE
    path.parent.mkdir(exist_ok=True)
    return write_text(path, json.dumps([asdict(s) for s in samples], indent=2, ensure_ascii=False) + "\n")


def write_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
) -> Path:
    """Render README.md into a model folder; call it after PEFT, which writes one that is replaced.

    A card that somebody wrote or edited (without the line that marks ours) is left alone, with a warning.
    Where the trainer's log lies in the folder, the training curves are drawn beside it.
    """
    path = Path(folder) / CARD_FILE
    if path.is_file() and not is_generated(path.read_text(encoding="utf-8")):
        warnings.warn(f"{path} was written by somebody else and is kept; delete it to get ours", stacklevel=2)
        return path
    if state := _read_json(Path(folder) / "trainer_state.json"):
        plot_training_curves(folder, state.get("log_history", []))
    return write_text(path, render_card(folder, repo_id=repo_id, datasets=datasets, tags=tags))


def is_generated(card: str) -> bool:
    """Whether a card was written by this package or by PEFT's or transformers' placeholder, and nobody
    claimed it."""
    return any(mark in card for mark in _GENERATED)


def render_card(
    folder: str | os.PathLike,
    *,
    repo_id: str | None = None,
    base_model: str | None = None,
    license: str | None = None,
    datasets: Sequence[str] = (),
    tags: Sequence[str] = (),
    space: str | None = None,
) -> str:
    """The card of a model folder.

    Args:
        folder: student or merge, full or adapter, with its `diverse_cfg.json`.
        repo_id: Hub id that the snippets load; by default the folder's own name.
        base_model: Hub id of the base, where the folder names a place on this machine.
        license: licence of the weights; by default the base's, which they inherit.
        datasets: Hub ids of the prompts that it was trained on.
        tags: more Hub tags.
        space: Hub id of the Space that plays it.

    Returns:
        Metadata block and text.

    Raises:
        ValueError: the folder does not say what it is.
    """
    folder = Path(folder)
    provenance = read_provenance(folder)
    if provenance is None:
        raise ValueError(f"{folder} has no diverse_cfg.json, so that a card could only guess what it is")
    adapter = (folder / "adapter_config.json").is_file()
    name = repo_id or folder.resolve().name
    base = base_model or base_name(folder, provenance)
    license = license or _base_license(base, folder)
    evaluation = _read_json(folder / METRICS_FILE)
    with reading(folder / METRICS_FILE, _REMEDY):
        metrics = [CardMetric(**metric) for metric in evaluation.get("metrics", [])]
        assert not metrics or {"prompts", "num_clips"} <= {*evaluation}, "prompts or num_clips is missing"
    listed = folder / SAMPLES_FILE
    with reading(listed, _REMEDY):
        entries = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else []
        samples = [Sample(**entry) for entry in entries]
    for sample in samples:
        inside(folder, sample.file)
    own = ["musicgen", "text-to-audio", "music", "cfg-distillation", "diverse-cfg", PAPER]
    kind = "merge" if provenance.kind == "merge" else "finetune"
    data = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-to-audio",
        license=license,
        tags=[*own, *(["merge"] if kind == "merge" else []), *tags],
        base_model=base if is_hub_id(base) else None,
        base_model_relation=("adapter" if adapter else kind) if is_hub_id(base) else None,
        eval_results=[_model_index(metric, evaluation["prompts"]) for metric in metrics] or None,
        model_name=name.split("/")[-1] if metrics else None,
        datasets=[dataset for dataset in datasets if is_hub_id(dataset)] or None,
        widget=[{"text": s.prompt, "output": {"url": s.file}} for s in samples] or None,
    )
    generation = _generation(folder)
    frames, seconds = _length(folder, provenance, generation)
    values = {
        "name": name,
        "title": name.split("/")[-1],
        "p": provenance,
        "training": {
            key: public_name(value) for key, value in provenance.training.items() if value is not None
        },
        "adapter": adapter,
        "base": public_name(base) or "the base model",
        "base_link": f"[{base}](https://huggingface.co/{base})" if is_hub_id(base) else None,
        "base_path": base or "",
        "license": license,
        "evaluation": evaluation,
        "metrics": metrics,
        "samples": samples,
        "space": space,
        "prompt": samples[0].prompt if samples else _DEFAULT_PROMPT,
        "curves": CURVES_FILE if (folder / CURVES_FILE).is_file() else None,
        "generation": generation,
        "seconds": seconds,
        "fast": _fast_settings(generation, frames),
        "paper": PAPER,
        "mark": MARK,
    }
    body = render("model_card.md.jinja", values)
    return f"---\n{data.to_yaml()}\n---\n\n{body.strip()}\n"


def _base_license(base: str | None, near: str | os.PathLike | None = None) -> str | None:
    """Licence of a base's weights: from its card where that is at hand (folder or cache), else from a short
    list.

    Returns:
        None when it is not known; a card then says so, and publishing asks.
    """
    if base is None:
        return None
    candidates = [Path(base)] + ([Path(near) / base] if near is not None else [])
    cards = [path / CARD_FILE for path in candidates]
    if is_hub_id(base):
        cached = try_to_load_from_cache(base, CARD_FILE)
        cards += [Path(cached)] if isinstance(cached, str) else []
    for card in cards:
        if card.is_file():
            license = ModelCard.load(card).data.license
            if license:
                return license
    return next((license for prefix, license in _KNOWN_LICENSES.items() if base.startswith(prefix)), None)


def plot_training_curves(folder: str | os.PathLike, log_history: Sequence[Mapping[str, Any]]) -> Path | None:
    """Draw what the trainer logged (divergence, diversity, loss over steps) into `training_curves.png`.

    Args:
        folder: the model folder.
        log_history: `trainer.state.log_history`.

    Returns:
        The picture, or None when nothing of interest was logged.
    """
    from diverse_cfg.plotting import PANELS, draw_curves  # matplotlib is slow to load

    log = [row for row in log_history if "step" in row]
    curves = [panel for panel in (*PANELS, ("loss", "loss")) if sum(panel[0] in row for row in log) > 1]
    if not curves:
        return None
    stem, ending = CURVES_FILE.split(".")
    [path] = draw_curves({"": [log]}, Path(folder) / stem, curves, columns=3, pictures=[ending])
    return path


def _model_index(metric: CardMetric, prompts: str) -> EvalResult:
    return EvalResult(
        task_type="text-to-audio",
        task_name="Text-to-music generation",
        dataset_type="custom",
        dataset_name=prompts,
        metric_type=slug(metric.name, default="metric"),
        metric_name=metric.name + (f" ({metric.judge})" if metric.judge else ""),
        metric_value=metric.value,
    )


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def base_name(folder: Path, provenance: Provenance) -> str | None:
    """Id or folder of the base that a folder records; for an adapter, what PEFT loads it onto."""
    adapter = _read_json(folder / "adapter_config.json")
    return adapter.get("base_model_name_or_path") or provenance.base_model


def public_name(value: Any) -> Any:
    """A local path without the folders above it, which are nobody else's business; anything else as it is."""
    if isinstance(value, str) and (os.path.isabs(value) or Path(value).is_dir()):
        return Path(value).name
    return value


def is_hub_id(name: str | None) -> bool:
    """Whether a name is a Hub id ("user/model") and not a folder of this machine."""
    if name is None or name.count("/") != 1 or Path(name).exists():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def _generation(folder: Path) -> dict[str, Any]:
    config = load_generation_config(folder)
    if config is None:
        raise ValueError(f"{folder} has no generation_config.json: how it is sampled belongs to the model")
    names = ("do_sample", "guidance_scale", "temperature", "top_k", "top_p", "min_p", "max_new_tokens")
    return {name: value for name in names if (value := getattr(config, name, None)) is not None}


def _length(
    folder: Path, provenance: Provenance, generation: Mapping[str, Any]
) -> tuple[int | None, float | None]:
    """Frames and seconds of a clip, each None where it is not known."""
    frames, seconds = provenance.sampling.get("num_frames"), provenance.training.get("clip_seconds")
    if (folder / "config.json").is_file():
        family, config = family_of(folder), load_config(folder)
        if not frames and "max_new_tokens" in generation:
            frames = generation["max_new_tokens"] - family.num_frames_to_tokens(0, config)
        if not seconds and frames is not None:
            seconds = family.frames_to_seconds(int(frames), config)
    return (int(frames) if frames else None), (float(seconds) if seconds else None)


def _fast_settings(generation: Mapping[str, Any], frames: int | None) -> dict[str, Any] | None:
    """The same settings in the words of `fast_generate`, which has no clip length of its own."""
    if frames is None:
        return None
    settings = {"num_frames": frames, "temperature": generation.get("temperature", 1.0)}
    settings["top_k"] = generation.get("top_k", TRANSFORMERS_TOP_K)
    if generation.get("guidance_scale", 1) != 1:  # its default is none
        settings["guidance_scale"] = generation["guidance_scale"]
    return settings | {name: generation[name] for name in ("top_p", "min_p") if name in generation}
