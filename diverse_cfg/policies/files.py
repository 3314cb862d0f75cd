"""Clips as a folder: one WAV per clip, and `generations.json`, which says how each was made; takes have their codes
beside them, and a page to listen to.

The list of clips is written first and a WAV only ever appears complete, so an interrupted run goes on where
it stopped: a clip depends on its seed and sample id alone, so what is generated later equals what would have
been.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import Tensor, nn
from tqdm import tqdm

from diverse_cfg.atomic import alone, replacing, write_text, writing
from diverse_cfg.policies.musicgen.model import own_frames
from diverse_cfg.policies.policy import Policy, as_policy, listed, plain
from diverse_cfg.policies.sampler.draws import require_64_bits
from diverse_cfg.policies.sampler.extension import check_hybrid, extend, hybrid_generate, longest_window
from diverse_cfg.policies.sampler.rollout import (
    RolloutWeights,
    SamplingSettings,
    check_request,
    fast_generate,
)
from diverse_cfg.policies.takes import ENDING, read_codes, save_codes
from diverse_cfg.provenance import library_versions
from diverse_cfg.types import Clips
from diverse_cfg.untrusted import render, slug

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
    takes: bool = False,
    of: int | None = None,
    choose: Callable[[Clips], list[int]] | None = None,
    beginning: Tensor | None = None,
    first: nn.Module | None = None,
    first_frames: int = 0,
    first_guidance_scale: float = 1.0,
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
        takes: name the files `take-00.wav`, with the codes of each beside it and a page, `index.html`.
        of: M > G clips that are sampled for every prompt, of which G are written.
        choose: gives the rows of those G, of a prompt's M clips; see `subset.diverse_subset`.
        beginning: codes [1, K, T0] that every clip begins with; they are continued in windows of the model's own
            length.
        first: a model that begins; see `hybrid_generate`, also for the next two.
        first_frames: how much it plays.
        first_guidance_scale: its γ.
        sampling: `SamplingSettings` by name.

    Returns:
        One entry per clip, as in `generations.json`: file, prompt, generation, seed, sample_id, seconds. With `of`
        the sample_id is beside the take only; with `takes` there is `decoder_rows`, what a take has cost.

    Raises:
        ValueError: the folder holds something else, `resume` with other settings, or see `fast_generate`.
    """
    assert (of is None) == (choose is None)
    prompts = listed(prompts)
    if sample_format not in _SAMPLE_FORMATS:
        raise ValueError(f"sample_format={sample_format!r} must be one of {', '.join(_SAMPLE_FORMATS)}")
    settings, policy = SamplingSettings(**sampling), as_policy(model)
    require_64_bits("seed", seed)
    window = _window_of(policy, num_frames, settings, rollout_backend, beginning)
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
    how = {name: value for name, value in asdict(settings).items() if name != "adaptive_guidance" or value}
    manifest = {
        "model": model_name,
        "weights": _fingerprint(model),
        "dtype": str(dtype or policy.dtype).removeprefix("torch."),
        "sampling_rate": policy.sampling_rate,
        "sample_format": sample_format,
        "settings": how | {"negative_prompt": negative_prompt, "num_frames": num_frames},
        "clips": _plan(prompts, num_generations, seed, num_frames / policy.frame_rate, takes, of),
    }
    play: Callable[..., Clips] = fast_generate
    if first is not None:
        check_hybrid(first, model, first_frames, min(num_frames, window), rollout_backend)
        part = {"first_frames": first_frames, "first_guidance_scale": first_guidance_scale}
        SamplingSettings(first_guidance_scale)  # in range
        manifest["settings"] |= part | {"first": _fingerprint(first)}
        play = partial(hybrid_generate, first, **part)
    if of is not None:
        manifest["settings"]["of"] = of
    if beginning is not None:
        manifest["settings"]["beginning"] = hashlib.sha256(beginning.cpu().numpy().tobytes()).hexdigest()[:16]
    folder = Path(output)
    _open_folder(folder, manifest, resume)
    length = round(num_frames / policy.frame_rate * policy.sampling_rate)
    pending = [clip for clip in manifest["clips"] if not _is_whole(folder / clip["file"], length, takes)]
    weights = RolloutWeights.from_model(model, dtype) if pending and rollout_backend == "fast" else None
    if pending and first is not None:
        play = partial(play, first_weights=RolloutWeights.from_model(first, dtype))
    loud, total = 0, len(manifest["clips"])
    bar = tqdm(total=total, initial=total - len(pending), unit="clip", disable=not progress)
    with alone(folder), bar:
        for batch, ids in _batches(manifest["clips"], pending, num_generations, batch_size, of):
            clips = _sample(
                play,
                model,
                [batch[0]["prompt"]] * of if of else [clip["prompt"] for clip in batch],
                num_frames,
                window,
                seed,
                beginning,
                **how,
                sample_ids=ids,
                processor=processor,
                batch_size=batch_size,
                rollout_backend=rollout_backend,
                negative_prompt=negative_prompt,
                weights=weights,
            )
            assert clips.waveforms is not None and clips.decoder_rows is not None
            rows = range(len(batch)) if choose is None else choose(clips)
            for clip, row in zip(batch, rows, strict=True):
                waveform = clips.waveforms[row].float().cpu()
                if takes:  # before the audio: where that is, the take is whole
                    cost = (
                        float(clips.decoder_rows.sum()) / len(batch) if of else int(clips.decoder_rows[row])
                    )
                    facts = {"prompt": clip["prompt"], "seed": seed, "sample_id": ids[row]}
                    save_codes(folder / clip["file"], clips.codes[row], model, **facts, decoder_rows=cost)
                write_wav(folder / clip["file"], waveform, clips.sampling_rate, sample_format)
                loud += int(waveform.abs().max() > 1)
                bar.update(of is None or clip in pending)
    if loud and sample_format == "int16":
        logger.warning(
            "%d of %d clips exceed full scale and were clipped; sample_format='float32' keeps them",
            loud,
            len(pending),
        )
    return _write_page(folder, manifest) if takes else manifest["clips"]


def _window_of(
    policy: Policy,
    num_frames: int,
    settings: SamplingSettings,
    rollout_backend: str,
    beginning: Tensor | None,
) -> int:
    """Frames that the policy samples at once; raises for a clip that windows cannot make."""
    window, seconds = longest_window(policy), num_frames / policy.frame_rate
    if seconds > _LONGEST:
        raise ValueError(f"num_frames={num_frames} is {seconds:g} s: ask for at most {_LONGEST} s")
    if beginning is not None and num_frames <= beginning.shape[-1]:
        raise ValueError(
            f"num_frames={num_frames}: the beginning has {beginning.shape[-1]} frames "
            f"({beginning.shape[-1] / policy.frame_rate:g} s) already; ask for more"
        )
    if beginning is not None and own_frames(policy.model) > 0:
        window = min(window, own_frames(policy.model))  # it has not heard longer music
    windows = num_frames > window or beginning is not None
    if windows and (rollout_backend != "fast" or isinstance(settings.guidance_scale, tuple)):
        raise ValueError(
            f"num_frames={num_frames} takes several windows of {window}, which need rollout_backend='fast' and one "
            "guidance_scale for all frames"
        )
    return window


def _batches(
    clips: list[dict[str, Any]],
    pending: list[dict[str, Any]],
    num_generations: int,
    batch_size: int,
    of: int | None,
) -> Iterator[tuple[list[dict[str, Any]], list[int]]]:
    """What is written together, and the ids of the samples that takes; whole prompts where some are chosen."""
    if of is None:
        for start in range(0, len(pending), batch_size):
            batch = pending[start : start + batch_size]
            yield batch, [clip["sample_id"] for clip in batch]
        return
    for row in range(len(clips) // num_generations):
        batch = clips[row * num_generations : (row + 1) * num_generations]
        if any(clip in pending for clip in batch):
            yield batch, list(range(row * of, (row + 1) * of))


def _sample(
    play: Callable[..., Clips],
    model: nn.Module,
    texts: list[str],
    num_frames: int,
    window: int,
    seed: int,
    beginning: Tensor | None,
    **how: Any,
) -> Clips:
    """The clips of a batch, window after window where one does not hold them."""
    following, rows = (seed + 1) % 2**64, 0
    if beginning is None:
        first, long = min(num_frames, window), num_frames > window
        clips = play(model, texts, num_frames=first, seed=seed, decode=not long, **how)
        if not long:
            return clips
        beginning, rows = clips.codes, clips.decoder_rows
    codes = beginning.expand(len(texts), -1, -1)
    clips = extend(model, codes, texts, num_frames=num_frames, window=window, seed=following, **how)
    return replace(clips, decoder_rows=clips.decoder_rows + rows)


def _write_page(folder: Path, manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Write the page of a folder of takes; give their entries with what each has cost."""
    facts = [read_codes(folder / clip["file"])[1] for clip in manifest["clips"]]
    clips = [
        clip | {"sample_id": int(fact["sample_id"]), "decoder_rows": float(fact["decoder_rows"])}
        for clip, fact in zip(manifest["clips"], facts, strict=True)
    ]
    prompts = dict.fromkeys(clip["prompt"] for clip in clips)
    values = {
        "title": f"{len(clips)} takes",
        "prompts": [(text, [clip for clip in clips if clip["prompt"] == text]) for text in prompts],
        "model": manifest["model"] or "the model",
        "of": manifest["settings"].get("of"),
    }
    write_text(folder / "index.html", render("takes.html.jinja", values))
    return clips


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


def _is_whole(path: Path, length: int, take: bool) -> bool:
    """Whether a clip is there and can be played to its end; one that cannot be is made again."""
    if not path.is_file() or (take and not path.with_suffix(ENDING).is_file()):
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


def _plan(
    prompts: list[str], num_generations: int, seed: int, seconds: float, takes: bool, of: int | None
) -> list[dict[str, Any]]:
    def name(row: int, generation: int, prompt: str) -> str:
        if not takes:
            return f"{row:04d}-{generation:02d}-{slug(prompt, 40)}.wav"
        return f"{f'{row:04d}-' if len(prompts) > 1 else ''}take-{generation:02d}.wav"

    return [
        {
            "file": name(row, generation, prompt),
            "prompt": prompt,
            "generation": generation,
            "seed": seed,
            **({} if of else {"sample_id": row * num_generations + generation}),
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
            f"{folder} was begun with another {', '.join(other).replace('clips', 'list of clips')} (see {_MANIFEST}): "
            "repeat that call, or "
            "choose another output folder"
        )
