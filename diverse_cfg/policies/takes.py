"""A take: a clip as a WAV file with its codes beside it, so that it can be continued without loss.

`take-03.wav` has its codes in `take-03.safetensors`: `codes` int32 [K, T], and what they belong to and came from.
"""

import hashlib
import os
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from scipy.signal import resample_poly
from torch import Tensor, nn

from diverse_cfg.atomic import replacing
from diverse_cfg.policies.musicgen.model import unwrap
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.reading import reading
from diverse_cfg.types import Clips

ENDING = ".safetensors"


def codec_digest(model: nn.Module) -> str:
    """Hash of what gives codes their meaning, codebooks and rates: a base, its students and their merges share it."""
    codec = unwrap(model).audio_encoder
    found = hashlib.sha256(f"{codec.config.sampling_rate} Hz, {codec.config.hop_length} samples".encode())
    for layer in codec.quantizer.layers:
        found.update(layer.codebook.embed.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def save_codes(path: str | os.PathLike, codes: Tensor, model: nn.Module, **facts: Any) -> None:
    """Write the codes of a take beside its WAV file.

    Args:
        path: of the WAV file.
        codes: [K, T].
        model: that has the codec.
        facts: about the take, such as its prompt.
    """
    facts = {name: str(value) for name, value in facts.items()} | {"codec": codec_digest(model)}
    with replacing(Path(path).with_suffix(ENDING)) as temporary:
        save_file({"codes": codes.to("cpu", torch.int32).contiguous()}, temporary, facts)


def read_codes(path: str | os.PathLike) -> tuple[Tensor, dict[str, str]]:
    """Codes [K, T] that lie beside a WAV file, and the facts that were written with them."""
    path = Path(path).with_suffix(ENDING)
    remedy = "write the take again, or move this file away, so that the audio is read in its place"
    with reading(path, remedy), safe_open(path, framework="pt") as file:
        return file.get_tensor("codes").long(), file.metadata() or {}


def load_take(model: nn.Module, path: str | os.PathLike) -> Clips:
    """A clip as codes that `extend` can continue: those beside the WAV file, else what the codec hears in it.

        take = load_take(model, "clips/take-03.wav")
        extend(model, take.codes, take.prompts, processor=processor, num_frames=3000)

    Args:
        model: that goes on with it.
        path: an audio file; its codes, if there are any, have the same name and end in `.safetensors`.

    Returns:
        One clip, without waveform; its prompt where the codes name one.

    Raises:
        ValueError: codes of another codec or another clip, or audio that cannot be read.
        FileNotFoundError: there is no such file.
    """
    path, policy = Path(path), as_policy(model)
    with reading(path, "choose another file"), path.open("rb") as file:
        audio, rate = soundfile.read(file, dtype="float32", always_2d=True)
    if not path.with_suffix(ENDING).is_file():
        if not len(audio) or not np.isfinite(audio).all():
            raise ValueError(f"{path} holds no sound, or samples that are not finite: choose another file")
        return Clips(encode_audio(model, torch.from_numpy(audio.T)[None], rate), policy.sampling_rate)
    codes, facts = read_codes(path)
    beside = path.with_suffix(ENDING)
    away = f"move {beside} away, so that the audio is encoded"
    if facts.get("codec") != codec_digest(model) or len(codes) != len(policy.delays):
        raise ValueError(
            f"{beside} holds codes of another codec than the model's: take the model that played them, or {away}"
        )
    seconds, heard = codes.shape[-1] / policy.frame_rate, len(audio) / rate
    if abs(seconds - heard) > 1 / policy.frame_rate:
        raise ValueError(f"{path} lasts {heard:.2f} s, its codes {seconds:.2f} s: it was changed; {away}")
    prompts = [facts["prompt"]] if "prompt" in facts else None
    return Clips(codes[None], policy.sampling_rate, prompts=prompts)


@torch.no_grad()
def encode_audio(model: nn.Module, waveforms: Tensor, sampling_rate: int) -> Tensor:
    """Turn audio into codes with the policy's codec; the inverse of `decode_codes`, as far as there is one.

    Args:
        model: the policy.
        waveforms: [N, L] or [N, channels, L]; resampled, and mixed to mono or doubled to stereo, as the model wants.
        sampling_rate: in Hz.

    Returns:
        Codes [N, K, T] on the CPU; a last frame that is not full counts.
    """
    policy = unwrap(model)
    config, codec = policy.decoder.config, policy.audio_encoder
    audio = waveforms[:, None] if waveforms.ndim == 2 else waveforms
    if audio.shape[1] != config.audio_channels:
        audio = audio.mean(1, keepdim=True).expand(-1, config.audio_channels, -1)
    rate = codec.config.sampling_rate
    if sampling_rate != rate:
        common = gcd(sampling_rate, rate)
        resampled = resample_poly(audio.double().numpy(), rate // common, sampling_rate // common, axis=-1)
        audio = torch.from_numpy(resampled)
    audio = audio.to(codec.device, torch.float32)
    with torch.autocast(codec.device.type, enabled=False):
        channels = [codec.encode(audio[:, channel, None]).audio_codes[0] for channel in range(audio.shape[1])]
    return torch.stack(channels, dim=2).flatten(1, 2).cpu()
