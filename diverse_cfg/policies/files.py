"""Clips as a folder: one WAV per clip, and `generations.json`, which says how each was made.

The list of clips is written first and a WAV only ever appears complete, so an interrupted run goes on where
it stopped: a clip depends on its seed and sample id alone, so what is generated later equals what would have
been.
"""

import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diverse_cfg.atomic import alone, replacing, write_text
from diverse_cfg.policies.policy import as_policy, plain
from diverse_cfg.policies.sampler.draws import require_64_bits
from diverse_cfg.policies.sampler.rollout import (
    RolloutWeights,
    SamplingSettings,
    check_request,
    fast_generate,
)
from diverse_cfg.provenance import library_versions
from diverse_cfg.types import Clips
from diverse_cfg.untrusted import slug

logger = logging.getLogger(__name__)

MANIFEST = "generations.json"

SAMPLE_FORMATS = {"int16": "PCM_16", "float32": "FLOAT"}
"""Name of a sample format → libsndfile's name of it."""

_BATCH = 16


def generate_files(
    model: nn.Module,
    prompts: str | Sequence[str],
    output: str | os.PathLike,
    *,
    processor: Any,
    num_frames: int,
    num_generations: int = 1,
    guidance_scale: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    negative_prompt: str | None = None,
    sample_format: str = "int16",
    resume: bool = False,
    model_name: str | None = None,
    batch_size: int = _BATCH,
    rollout_backend: str = "fast",
    dtype: torch.dtype | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Generate clips for prompts and write them into a folder.

    Args:
        model: see `fast_generate`; so are the arguments that are not listed here.
        prompts: P texts.
        output: folder to write; must be new or empty, unless `resume`.
        processor: the model's processor or tokenizer.
        num_frames: T.
        num_generations: G clips per prompt.
        guidance_scale: γ, or one for each of T frames.
        temperature: 0 is greedy.
        top_k: 0 keeps all codes.
        top_p: 1 keeps all codes.
        min_p: 0 keeps all codes.
        seed: clip g of prompt p is the sample p·G + g of this seed.
        negative_prompt: text in the place of the null prompt.
        sample_format: "int16" (samples beyond full scale are clipped) or "float32".
        resume: go on with a folder that the same call has begun.
        model_name: what the list of clips calls the model.
        batch_size: clips at once, and so the step in which files appear.
        rollout_backend: "fast" or "transformers".
        dtype: of the rollout's weights.
        progress: show a bar.

    Returns:
        One entry per clip, as in `generations.json`: file, prompt, generation, seed, sample_id, seconds.

    Raises:
        ValueError: the folder holds something else, `resume` with other settings, or see `fast_generate`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if sample_format not in SAMPLE_FORMATS:
        raise ValueError(f"sample_format={sample_format!r} must be one of {', '.join(SAMPLE_FORMATS)}")
    settings = SamplingSettings(guidance_scale, temperature, top_k, top_p, min_p)
    require_64_bits("seed", seed)
    check_request(
        model,
        processor,
        prompts,
        num_frames,
        settings,
        num_generations=num_generations,
        batch_size=batch_size,
        rollout_backend=rollout_backend,
        negative_prompt=negative_prompt,
        dtype=dtype,
    )
    policy = as_policy(model)
    manifest = {
        "model": model_name,
        "weights": _fingerprint(model),
        "dtype": str(dtype or policy.dtype).removeprefix("torch."),
        "sampling_rate": policy.sampling_rate,
        "sample_format": sample_format,
        "settings": asdict(settings) | {"negative_prompt": negative_prompt, "num_frames": num_frames},
        "clips": _plan(prompts, num_generations, seed, num_frames / policy.frame_rate),
    }
    folder = Path(output)
    _open_folder(folder, manifest, resume)
    pending = [clip for clip in manifest["clips"] if not (folder / clip["file"]).is_file()]
    weights = RolloutWeights.from_model(model, dtype) if pending and rollout_backend == "fast" else None
    play = functools.partial(
        fast_generate,
        model,
        processor=processor,
        num_frames=num_frames,
        **asdict(settings),
        seed=seed,
        batch_size=batch_size,
        rollout_backend=rollout_backend,
        negative_prompt=negative_prompt,
        weights=weights,
    )
    done = len(manifest["clips"]) - len(pending)
    bar = tqdm(total=len(manifest["clips"]), initial=done, unit="clip", disable=not progress)
    with alone(folder), bar:
        loud = _play_clips(folder, pending, play, batch_size, sample_format, bar)
    if loud and sample_format == "int16":
        logger.warning(
            "%d of %d clips exceed full scale and were clipped; sample_format='float32' keeps them",
            loud,
            len(pending),
        )
    return manifest["clips"]


def _play_clips(
    folder: Path,
    clips: list[dict[str, Any]],
    play: Callable[..., Clips],
    batch_size: int,
    sample_format: str,
    bar: tqdm,
) -> int:
    """Generate and write clips, batch after batch; return how many exceed full scale."""
    loud = 0
    for start in range(0, len(clips), batch_size):
        batch = clips[start : start + batch_size]
        prompts, sample_ids = [clip["prompt"] for clip in batch], [clip["sample_id"] for clip in batch]
        loud += _write_clips(folder, batch, play(prompts, sample_ids=sample_ids), sample_format, bar)
    return loud


def _write_clips(
    folder: Path, clips: list[dict[str, Any]], rollout: Clips, sample_format: str, bar: tqdm
) -> int:
    """Write the WAVs of one batch; return how many exceed full scale."""
    assert rollout.waveforms is not None
    waveforms = rollout.waveforms.float().cpu()
    for clip, waveform in zip(clips, waveforms, strict=True):
        write_wav(folder / clip["file"], waveform, rollout.sampling_rate, sample_format)
        bar.update()
    return int((waveforms.abs().flatten(1).amax(1) > 1).sum())


def write_wav(
    path: str | os.PathLike, waveform: Tensor, sampling_rate: int, sample_format: str = "int16"
) -> None:
    """Write a waveform [L] or [2, L] as a WAV file, all of it or nothing."""
    path = Path(path)
    samples = waveform.detach().float().cpu()
    if sample_format == "int16":
        samples = samples.clamp(-1, 1)
    subtype = SAMPLE_FORMATS[sample_format]
    with replacing(path) as temporary:
        soundfile.write(temporary, samples.numpy().T, sampling_rate, subtype, format="WAV")


def _fingerprint(model: nn.Module) -> str:
    """Of the weights that clips depend on, adapters included; of a few numbers of each, which training changes."""
    digest = hashlib.sha256()
    for name, tensor in plain(model).state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plan(prompts: list[str], num_generations: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    clips = []
    for row, prompt in enumerate(prompts):
        for generation in range(num_generations):
            clips.append(
                {
                    "file": f"{row:04d}-{generation:02d}-{slug(prompt, 40)}.wav",
                    "prompt": prompt,
                    "generation": generation,
                    "seed": seed,
                    "sample_id": row * num_generations + generation,
                    "seconds": seconds,
                }
            )
    return clips


def _open_folder(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Make the folder and write the list of clips into it, or check that it is the one to go on with."""
    path = folder / MANIFEST
    if folder.is_dir() and any(folder.iterdir()):
        if not resume:
            raise ValueError(
                f"{folder} is not empty: choose another output folder, or resume to go on with it"
            )
        if not path.is_file():
            raise ValueError(f"{folder} has no {MANIFEST}, so it cannot be resumed: choose another folder")
        try:
            begun = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is not valid JSON ({error}): choose another output folder") from error
        wanted = json.loads(json.dumps(manifest))
        other = [name for name, value in wanted.items() if begun.get(name) != value]
        if other:
            raise ValueError(
                f"{folder} was begun with another {', '.join(other)} (see {MANIFEST}): repeat that call, or "
                "choose another output folder"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    content = manifest | {"versions": library_versions()}
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
