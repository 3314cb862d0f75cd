"""Clips as a folder: one WAV per clip, and `generations.json`, which says how each was made.

The list of clips is written first and a WAV only ever appears complete, so an interrupted run goes on where
it stopped: a clip depends on its seed and sample id alone, so what is generated later equals what would have
been.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diverse_cfg.atomic import alone, replacing, write_text, writing
from diverse_cfg.policies.policy import Policy, as_policy, plain
from diverse_cfg.policies.sampler.draws import require_64_bits
from diverse_cfg.policies.sampler.extension import extend, longest_window
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

_MANIFEST = "generations.json"
_LONGEST = 600  # seconds of a clip, whose audio is decoded at once

_SAMPLE_FORMATS = {"int16": "PCM_16", "float32": "FLOAT"}
"""Name of a sample format → libsndfile's name of it."""


def generate_files(
    model: nn.Module,
    prompts: str | Sequence[str],
    output: str | os.PathLike,
    *,
    processor: Any,
    num_frames: int,
    num_generations: int = 1,
    seed: int = 0,
    negative_prompt: str | None = None,
    sample_format: str = "int16",
    resume: bool = False,
    model_name: str | None = None,
    batch_size: int = 16,
    rollout_backend: str = "fast",
    dtype: torch.dtype | None = None,
    progress: bool = True,
    **sampling: Any,
) -> list[dict[str, Any]]:
    """Generate clips for prompts and write them into a folder.

    Args:
        model: see `fast_generate`; so are the arguments that are not listed here.
        prompts: P texts.
        output: folder to write; must be new or empty, unless `resume`.
        processor: the model's processor or tokenizer.
        num_frames: T; what a model cannot sample at once is sampled window by window, see `extend`.
        num_generations: G clips per prompt.
        seed: clip g of prompt p is the sample p·G + g of this seed.
        negative_prompt: text in the place of the null prompt.
        sample_format: "int16" (samples beyond full scale are clipped) or "float32".
        resume: go on with a folder that the same call has begun.
        model_name: what the list of clips calls the model.
        batch_size: clips at once, and so the step in which files appear.
        rollout_backend: "fast" or "transformers".
        dtype: of the rollout's weights.
        progress: show a bar.
        sampling: `SamplingSettings` by name.

    Returns:
        One entry per clip, as in `generations.json`: file, prompt, generation, seed, sample_id, seconds.

    Raises:
        ValueError: the folder holds something else, `resume` with other settings, or see `fast_generate`.
    """
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if sample_format not in _SAMPLE_FORMATS:
        raise ValueError(f"sample_format={sample_format!r} must be one of {', '.join(_SAMPLE_FORMATS)}")
    settings, policy = SamplingSettings(**sampling), as_policy(model)
    require_64_bits("seed", seed)
    window = _window_of(policy, num_frames, settings, rollout_backend)
    check_request(
        model,
        processor,
        prompts,
        min(num_frames, window),
        settings,
        num_generations=num_generations,
        batch_size=batch_size,
        rollout_backend=rollout_backend,
        negative_prompt=negative_prompt,
        dtype=dtype,
    )
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
    length = round(num_frames / policy.frame_rate * policy.sampling_rate)
    pending = [clip for clip in manifest["clips"] if not _is_whole(folder / clip["file"], length)]
    weights = RolloutWeights.from_model(model, dtype) if pending and rollout_backend == "fast" else None
    loud, total = 0, len(manifest["clips"])
    bar = tqdm(total=total, initial=total - len(pending), unit="clip", disable=not progress)
    with alone(folder), bar:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            clips = _sample(
                model,
                batch,
                num_frames,
                window,
                seed,
                **asdict(settings),
                processor=processor,
                batch_size=batch_size,
                rollout_backend=rollout_backend,
                negative_prompt=negative_prompt,
                weights=weights,
            )
            assert clips.waveforms is not None
            for clip, waveform in zip(batch, clips.waveforms.float().cpu(), strict=True):
                write_wav(folder / clip["file"], waveform, clips.sampling_rate, sample_format)
                loud += int(waveform.abs().max() > 1)
                bar.update()
    if loud and sample_format == "int16":
        logger.warning(
            "%d of %d clips exceed full scale and were clipped; sample_format='float32' keeps them",
            loud,
            len(pending),
        )
    return manifest["clips"]


def _window_of(policy: Policy, num_frames: int, settings: SamplingSettings, rollout_backend: str) -> int:
    """Frames that the policy samples at once; raises for a clip that windows cannot make."""
    window, seconds = longest_window(policy), num_frames / policy.frame_rate
    if seconds > _LONGEST:
        raise ValueError(f"num_frames={num_frames} is {seconds:g} s: ask for at most {_LONGEST} s")
    if num_frames > window and (rollout_backend != "fast" or isinstance(settings.guidance_scale, tuple)):
        raise ValueError(
            f"num_frames={num_frames} takes several windows of {window}, which need rollout_backend='fast' and one "
            "guidance_scale for all frames"
        )
    return window


def _sample(
    model: nn.Module, batch: list[dict[str, Any]], num_frames: int, window: int, seed: int, **how: Any
) -> Clips:
    """The clips of a batch, window after window where one does not hold them."""
    texts = [clip["prompt"] for clip in batch]
    how["sample_ids"] = [clip["sample_id"] for clip in batch]
    first, long = min(num_frames, window), num_frames > window
    clips = fast_generate(model, texts, num_frames=first, seed=seed, decode=not long, **how)
    if not long:
        return clips
    return extend(model, clips.codes, texts, num_frames=num_frames, seed=(seed + 1) % 2**64, **how)


def write_wav(
    path: str | os.PathLike,
    waveform: Tensor,
    sampling_rate: int,
    sample_format: str = "int16",
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a waveform [L] or [2, L] as a WAV file, all of it or nothing.

    Args:
        path: of the file.
        waveform: in −1 … 1.
        sampling_rate: in Hz.
        sample_format: "int16" or "float32".
        texts: metadata by libsndfile's names (title, comment, software…), each below 2 kB: readers skip longer ones.
    """
    path = Path(path)
    samples = waveform.detach().float().cpu()
    if sample_format == "int16":
        samples = samples.clamp(-1, 1)
    subtype = _SAMPLE_FORMATS[sample_format]
    audio, channels = samples.numpy().T, 1 if samples.ndim == 1 else len(samples)
    with (
        replacing(path) as temporary,
        soundfile.SoundFile(temporary, "w", sampling_rate, channels, subtype, format="WAV") as file,
    ):
        for name, text in (texts or {}).items():
            setattr(file, name, text)
        file.write(audio)


def _is_whole(path: Path, length: int) -> bool:
    """Whether a clip is there and can be played to its end; one that cannot be is made again."""
    if not path.is_file():
        return False
    try:
        found = len(soundfile.read(path, dtype="int16")[0])
    except soundfile.LibsndfileError as error:
        logger.warning("%s is damaged (%s) and is made again", path, error)
        return False
    if found != length:
        logger.warning("%s has %d samples instead of %d and is made again", path, found, length)
    return found == length


def _fingerprint(model: nn.Module) -> str:
    """Of the weights that clips depend on, adapters included; of a few numbers of each, which training changes."""
    digest = hashlib.sha256()
    for name, tensor in plain(model).state_dict().items():
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten()[:64].double().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _plan(prompts: list[str], num_generations: int, seed: int, seconds: float) -> list[dict[str, Any]]:
    return [
        {
            "file": f"{row:04d}-{generation:02d}-{slug(prompt, 40)}.wav",
            "prompt": prompt,
            "generation": generation,
            "seed": seed,
            "sample_id": row * num_generations + generation,
            "seconds": seconds,
        }
        for row, prompt in enumerate(prompts)
        for generation in range(num_generations)
    ]


def _open_folder(folder: Path, manifest: dict[str, Any], resume: bool) -> None:
    """Make the folder and write the list of clips into it, or check that it is the one to go on with."""
    path = folder / _MANIFEST
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        empty = not any(folder.iterdir())
    if empty:
        content = manifest | {"versions": library_versions()}
        write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        return
    if not resume:
        raise ValueError(f"{folder} is not empty: choose another output folder, or resume to go on with it")
    if not path.is_file():
        raise ValueError(f"{folder} has no {_MANIFEST}, so it cannot be resumed: choose another folder")
    try:
        begun = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): choose another output folder") from error
    wanted = json.loads(json.dumps(manifest))
    if other := [name for name, value in wanted.items() if begun.get(name) != value]:
        raise ValueError(
            f"{folder} was begun with another {', '.join(other)} (see {_MANIFEST}): repeat that call, or "
            "choose another output folder"
        )
