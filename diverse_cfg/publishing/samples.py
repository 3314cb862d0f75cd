"""Clips for a card: what a reader hears before downloading anything."""

import os
from collections.abc import Sequence
from pathlib import Path

from diverse_cfg.cards import SAMPLES_FILE, TRANSFORMERS_TOP_K, Sample, write_samples
from diverse_cfg.policies.families import family_of
from diverse_cfg.policies.files import generate_files
from diverse_cfg.policies.loading import load_policy, load_processor


def add_samples(folder: str | os.PathLike, prompts: Sequence[str]) -> list[Sample]:
    """Generate one clip per prompt with the folder's own settings and list them for its card.

    The WAV files go into `samples/` inside the folder. Clips that the same call has made before are kept.

    Args:
        folder: the model folder.
        prompts: texts, one clip each.

    Raises:
        ValueError: there are samples of other prompts already, or the model cannot be loaded.
    """
    target = Path(folder) / Path(SAMPLES_FILE).parent
    model = load_policy(folder)
    settings = model.generation_config
    tokens = settings.max_new_tokens or settings.max_length
    if not tokens:
        raise ValueError(
            f"{folder}/generation_config.json names no max_new_tokens: how long shall a sample be?"
        )
    usual = {"temperature": 1.0, "top_k": TRANSFORMERS_TOP_K, "top_p": 1.0, "min_p": 0.0}
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
    samples = [Sample(f"{target.name}/{clip['file']}", clip["prompt"], clip["seed"]) for clip in clips]
    write_samples(folder, samples)
    return samples
