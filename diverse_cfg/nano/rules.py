"""What a clip is, without any network: its onsets, pitch and key, against what its prompt names.

These rules are the second opinion beside the trained judge: no model can have learned to please them.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from scipy.signal import find_peaks
from torch import Tensor

from diverse_cfg.embeddings.audio import LogMel, resample, to_mono
from diverse_cfg.nano.attributes import KEYS, REGISTERS, TEMPI, key_scores, parse_prompt

RATE = 16_000  # Hz; every check works at this rate
HOP = 160  # samples between onset frames: 10 ms
PITCH_HOP = 320
ONSET_RISE = 0.08  # nepers of mean rise that count as an onset


def _prepared(waveforms: Tensor, sampling_rate: int) -> Tensor:
    return resample(to_mono(waveforms).cpu(), sampling_rate, RATE)


def onset_counts(waveforms: Tensor, sampling_rate: int) -> np.ndarray:
    """Note onsets per clip [B]: peaks of the spectral flux against the loudest of the neighbouring bands before.

    Taking the maximum over neighbouring bands keeps vibrato from counting as notes (SuperFlux, Böck & Widmer 2013).
    """
    mel = LogMel(RATE, 1024, HOP, 96)(_prepared(waveforms, sampling_rate)).clamp_min(
        -7.0
    )  # [B, bands, frames]
    before = torch.nn.functional.max_pool2d(mel[:, None], (3, 1), stride=1, padding=(1, 0))[:, 0]
    flux = (mel[:, :, 4:] - before[:, :, :-4]).clamp_min(0).mean(1).numpy()
    flux = np.pad(flux, ((0, 0), (4, 1)))
    return np.array(
        [len(find_peaks(row, height=ONSET_RISE, prominence=0.6 * ONSET_RISE, distance=6)[0]) for row in flux]
    )


def pitches(waveforms: Tensor, sampling_rate: int, low: float = 75.0, high: float = 1900.0) -> np.ndarray:
    """Fundamental frequency in Hz every 20 ms [B, frames], NaN where unvoiced (YIN, de Cheveigné & Kawahara 2002)."""
    audio = _prepared(waveforms, sampling_rate)
    window, longest, shortest = 640, int(RATE / low) + 2, int(RATE / high)
    frames = torch.nn.functional.pad(audio, (0, window)).unfold(1, window + longest, PITCH_HOP)
    level = frames[..., :window].square().mean(-1)
    size = 2 ** (window + longest).bit_length()
    head = torch.fft.rfft(frames[..., :window], size)
    correlation = torch.fft.irfft(head.conj() * torch.fft.rfft(frames, size), size)[..., : longest + 1]
    energy = torch.nn.functional.pad(frames.double().square().cumsum(-1), (1, 0))
    energy = (energy[..., window : window + longest + 1] - energy[..., : longest + 1]).float()
    difference = (energy[..., :1] + energy - 2 * correlation).clamp_min(0)[..., 1:]
    lags = torch.arange(1, longest + 1)
    normal = difference * lags / difference.cumsum(-1).clamp_min(1e-9)
    normal[..., : shortest - 1] = 1.0
    # The first local minimum below the threshold, else the deepest one.
    inner = normal[..., 1:-1]
    dip = (inner < 0.15) & (inner <= normal[..., :-2]) & (inner < normal[..., 2:])
    first = torch.where(dip.any(-1), dip.float().argmax(-1), inner.argmin(-1)) + 1
    left, middle, right = (normal.gather(-1, (first + k)[..., None])[..., 0] for k in (-1, 0, 1))
    shift = (left - right) / (2 * (left - 2 * middle + right)).clamp_min(1e-9)
    frequency = RATE / (first + 1 + shift.clamp(-0.5, 0.5))
    frequency[(middle > 0.25) | (level < 1e-5)] = torch.nan
    return frequency.numpy()


def median_pitches(waveforms: Tensor, sampling_rate: int) -> np.ndarray:
    """Median MIDI pitch of the voiced frames of each clip [B]; NaN when fewer than five are voiced."""
    hertz = pitches(waveforms, sampling_rate)
    midi = 69 + 12 * np.log2(hertz / 440.0)
    enough = np.isfinite(midi).sum(1) >= 5
    out = np.full(len(midi), np.nan)
    if enough.any():
        out[enough] = np.nanmedian(midi[enough], axis=1)
    return out


def chroma(waveforms: Tensor, sampling_rate: int) -> np.ndarray:
    """Energy per pitch class [B, 12] from the peaks of a 0.26 s spectrum between 110 and 2100 Hz."""
    audio = _prepared(waveforms, sampling_rate)
    spectrum = torch.stft(
        audio,
        4096,
        640,
        window=torch.hann_window(4096),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    magnitude = spectrum.abs()
    peak = torch.zeros_like(magnitude)
    inner = magnitude[:, 1:-1]
    peak[:, 1:-1] = inner * ((inner > magnitude[:, :-2]) & (inner >= magnitude[:, 2:]))
    hertz = torch.arange(2049) * RATE / 4096
    classes = (torch.round(12 * torch.log2(hertz.clamp_min(1) / 440.0)).long() + 69) % 12
    usable = (hertz > 110) & (hertz < 2100)
    out = torch.zeros(len(audio), 12)
    out.index_add_(1, classes[usable], peak[:, usable].sqrt().sum(2))
    return out.numpy()


def classify(waveforms: Tensor, sampling_rate: int) -> dict[str, np.ndarray]:
    """Class indices [B] of tempo, register and key by rule; −1 where the rule cannot tell."""
    onsets, pitch = onset_counts(waveforms, sampling_rate), median_pitches(waveforms, sampling_rate)
    register = np.searchsorted(_midpoints(REGISTERS), np.nan_to_num(pitch))
    return {
        "tempo": np.searchsorted(_midpoints(TEMPI), onsets),
        "register": np.where(np.isfinite(pitch), register, -1),
        "key": key_scores(chroma(waveforms, sampling_rate)).argmax(1),
    }


def _midpoints(classes: dict[str, tuple[int, int]]) -> np.ndarray:
    bounds = list(classes.values())
    return np.array([(a[1] + b[0]) / 2 for a, b in pairwise(bounds)])


def rule_adherence(waveforms: Tensor, sampling_rate: int, prompts: list[str]) -> dict[str, np.ndarray]:
    """Whether each clip has the tempo, register and key its prompt names, judged by rule.

    Returns:
        `tempo`, `register`, `key` and their `mean` over the named ones: 1.0, 0.0 or NaN (not named) [B].
    """
    found = classify(waveforms, sampling_rate)
    names = {"tempo": list(TEMPI), "register": list(REGISTERS), "key": list(KEYS)}
    return scores_of(found, names, prompts)


def scores_of(
    found: dict[str, np.ndarray], names: dict[str, list[str]], prompts: list[str]
) -> dict[str, np.ndarray]:
    """Compare class indices `found` [B] with what the prompts name → 1.0 / 0.0 / NaN per attribute, and `mean`."""
    if any(len(values) != len(prompts) for values in found.values()):
        raise ValueError(
            f"{len(prompts)} prompts for {len(next(iter(found.values())))} clips: one prompt per clip"
        )
    wanted = [parse_prompt(prompt) for prompt in prompts]
    table = {}
    for attribute, classes in names.items():
        target = np.array([classes.index(w[attribute]) if attribute in w else -2 for w in wanted])
        table[attribute] = np.where(target == -2, np.nan, (found[attribute] == target).astype(float))
    stacked = np.stack(list(table.values()))
    named = np.isfinite(stacked).sum(0)
    table["mean"] = np.where(named > 0, np.nansum(stacked, 0) / np.maximum(named, 1), np.nan)
    return table
