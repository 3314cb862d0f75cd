"""What can be heard of any clip without a network: whether it is sound, and how loud it is.

Validity (level, clipping, silence, noise) is what the evaluation reports and what the guards of the diversity reward
limit. Loudness is as broadcasters measure it (ITU-R BS.1770-4), so that nobody prefers a clip for being louder.
"""

import math
from itertools import pairwise

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

WHITE_FLATNESS = math.exp(-np.euler_gamma)
"""Spectral flatness of white noise, 0.56: the power of its bins scatters as an exponential distribution does."""

TARGET_LUFS = -23.0
"""Quiet enough that music of a wide dynamic range reaches it without clipping (EBU R 128)."""

DYING_SECONDS = 0.4
"""Silence at its end by which a clip counts as dying: it stopped before it was over."""

_BLOCK, _STEP = 0.4, 0.1  # seconds
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0
_PEAK = 10 ** (-1 / 20)  # −1 dBFS


def validity(waveforms: Tensor, sampling_rate: int) -> dict[str, Tensor]:
    """Level, clipping, silence and noise of clips [B, L] or [B, channels, L] → [B], and whether they are sound.

    Every channel that can be heard has to be sound: a mean over channels would hide that one of them is clipped.

    Returns:
        `level_dbfs` (RMS over channels), `peak`, `silent_fraction` (20 ms frames below −60 dBFS in all channels),
        `dying` (whether the last 0.4 s are such frames, or all of a shorter clip), and of the worst channel
        `clipped_fraction` (samples at full scale), `flatness` (geometric over arithmetic mean of the power spectrum:
        white noise has 0.56, tones 0), `noisiness` (the same inside bands of a sixth of an octave, weighted by their
        energy: 0.56 for noise of any colour, whose spectrum is rough at every scale, while tones stand out of their
        band) and `subsonic_fraction` (energy below 30 Hz, an offset included).
        `valid`: finite, audible (above −45 dBFS), under half silent, and in every audible channel under −3 dBFS, under
        0.1 % clipped, flatness under 0.3, noisiness under 0.4 and less than half subsonic. Of 600 rendered nano clips
        none has noisiness above 0.32 or 0.3 % below 30 Hz. Steady noise and snares alone are invalid.
    """
    audio = waveforms.detach().float()
    audio = audio[:, None] if audio.ndim == 2 else audio
    if audio.ndim != 3:
        raise ValueError(f"waveforms must be [B, L] or [B, channels, L], got shape {tuple(waveforms.shape)}")
    finite = torch.isfinite(audio).all(2).all(1)
    audio = torch.nan_to_num(audio, nan=0.0, posinf=0.0, neginf=0.0)
    energy = audio.square().mean(2)  # [B, channels]
    level, level_dbfs = (10 * x.clamp_min(1e-12).log10() for x in (energy, energy.mean(1)))
    clipped = (audio.abs() >= 0.999).float().mean(2)
    frame = min(max(round(0.02 * sampling_rate), 1), audio.shape[2])
    frames = audio[..., : audio.shape[2] // frame * frame].unflatten(2, (-1, frame))
    silent = (frames.square().mean(3) < 1e-6).all(1)  # [B, frames]
    dying = silent[:, -math.ceil(DYING_SECONDS * sampling_rate / frame) :].all(1)
    silent = silent.float().mean(1)
    power = torch.fft.rfft(audio).abs().square() + 1e-12
    flatness = _flatness(power)
    bottom = math.ceil(30 * audio.shape[2] / sampling_rate)  # first bin from 30 Hz on
    subsonic = power[..., :bottom].sum(2) / power.sum(2)
    noisiness = _noisiness(power[..., bottom:], bottom)
    audible = level > -45
    sound = (level < -3) & (clipped < 1e-3) & (flatness < 0.3) & (noisiness < 0.4) & (subsonic < 0.5)
    counted = audible | ~audible.any(1, keepdim=True)

    def worst(values: Tensor) -> Tensor:
        return torch.where(counted, values, 0).amax(1)

    return {
        "level_dbfs": level_dbfs,
        "peak": audio.abs().amax(2).amax(1),
        "clipped_fraction": worst(clipped),
        "silent_fraction": silent,
        "dying": dying,
        "flatness": worst(flatness),
        "noisiness": worst(noisiness),
        "subsonic_fraction": worst(subsonic),
        "valid": finite & audible.any(1) & (sound | ~audible).all(1) & (silent < 0.5),
    }


def _flatness(power: Tensor) -> Tensor:
    """Geometric over arithmetic mean of spectra [..., bins] → [...]."""
    return power.log().mean(-1).exp() / power.mean(-1)


def _noisiness(power: Tensor, first_bin: int) -> Tensor:
    """Mean flatness of bands of a sixth of an octave and at least 16 bins, weighted by energy; the first of the
    spectra's bins [..., bins] is the `first_bin`-th above 0 Hz."""
    edges = [0]
    while edges[-1] < power.shape[-1]:
        edges.append(edges[-1] + max(16, round((2 ** (1 / 6) - 1) * (first_bin + edges[-1]))))
    bands = [power[..., low:high] for low, high in pairwise(edges)]
    weighted = sum(_flatness(band) * band.sum(-1) for band in bands)
    return weighted / power.sum(-1).clamp_min(1e-12)


def loudness(waveform: np.ndarray, sampling_rate: int) -> float:
    """Integrated loudness in LUFS: K-weighted power in overlapping blocks, the quiet ones gated out.

    Args:
        waveform: [L] or [2, L].
        sampling_rate: in Hz.

    Returns:
        LUFS; −inf for silence.
    """
    channels = np.atleast_2d(np.asarray(waveform, dtype=np.float64))
    filters = [_shelf(sampling_rate), _high_pass(sampling_rate)] if sampling_rate >= 4000 else []
    for numerator, denominator in filters:  # below, there is next to nothing of what they weigh
        channels = lfilter(numerator, denominator, channels, axis=1)
    size = min(round(_BLOCK * sampling_rate), channels.shape[1])
    starts = range(0, channels.shape[1] - size + 1, max(1, round(_STEP * sampling_rate)))
    power = np.array([np.square(channels[:, start : start + size]).mean(axis=1).sum() for start in starts])
    for gate in (_ABSOLUTE_GATE, None):
        if gate is None:
            gate = _lufs(power.mean()) + _RELATIVE_GATE
        power = power[[_lufs(block) > gate for block in power]]
        if not len(power):
            return -math.inf
    return _lufs(power.mean())


def piano_roll(waveform: np.ndarray, sampling_rate: int, columns: int = 192) -> np.ndarray:
    """A spectrogram whose rows are semitones, as on a piano roll: what a thumbnail of a clip shows.

    Args:
        waveform: [L] or [2, L].
        sampling_rate: in Hz.
        columns: instants, evenly spread.

    Returns:
        [semitones, columns] in 0 … 1, 60 dB below the loudest … the loudest; the highest note first, from C2 (65 Hz)
        to the octave below the Nyquist frequency at most C9.
    """
    audio = np.atleast_2d(np.asarray(waveform, dtype=np.float64)).mean(0)
    size = 1 << round(math.log2(0.2 * sampling_rate))
    padded = np.pad(audio, size // 2)
    starts = np.linspace(0, len(audio) - 1, columns).astype(int)
    frames = np.stack([padded[start : start + size] for start in starts]) * np.hanning(size)
    magnitude = np.abs(np.fft.rfft(frames))  # [columns, bins]
    highest = min(120, int(69 + 12 * math.log2(sampling_rate / 2 / 440)) - 1)
    notes = np.arange(highest, 35, -1)[:, None] + np.linspace(-0.4, 0.4, 5)
    places = 440 * 2 ** ((notes - 69) / 12) * size / sampling_rate  # in bins
    lower = np.floor(places).astype(int)
    share = places - lower
    rows = (magnitude[:, lower] * (1 - share) + magnitude[:, lower + 1] * share).max(-1).T
    level = 20 * np.log10(np.maximum(rows, 1e-9) / max(rows.max(), 1e-9))
    return np.clip(1 + level / 60, 0, 1) if rows.max() > 1e-6 else np.zeros_like(rows)


def normalised(waveform: np.ndarray, sampling_rate: int, target: float = TARGET_LUFS) -> np.ndarray:
    """The waveform at `target` LUFS, or as near to it as its peaks allow; silence stays silence.

    Args:
        waveform: [L] or [2, L].
        sampling_rate: in Hz.
        target: LUFS.

    Raises:
        ValueError: samples that are not finite.
    """
    waveform = np.asarray(waveform, dtype=np.float32)
    if not np.isfinite(waveform).all():
        raise ValueError("the waveform holds samples that are not finite")
    level = loudness(waveform, sampling_rate)
    if math.isinf(level):
        return waveform
    peak = float(np.abs(waveform).max())
    return waveform * np.float32(min(10 ** ((target - level) / 20), _PEAK / peak))


def _lufs(power: float) -> float:
    return -0.691 + 10 * math.log10(power) if power > 0 else -math.inf


def _shelf(sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """The head's effect: a high shelf of 4 dB, by the analogue prototype behind the standard's 48 kHz
    coefficients."""
    k = math.tan(math.pi * 1681.974450955533 / sampling_rate)
    gain, q = 10 ** (3.999843853973347 / 20), 0.7071752369554196
    middle = gain**0.4996667741545416
    scale = 1 + k / q + k * k
    numerator = np.array([gain + middle * k / q + k * k, 2 * (k * k - gain), gain - middle * k / q + k * k])
    return numerator / scale, np.array([1, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale])


def _high_pass(sampling_rate: int) -> tuple[np.ndarray, np.ndarray]:
    """Low frequencies are heard less."""
    k = math.tan(math.pi * 38.13547087602444 / sampling_rate)
    q = 0.5003270373238773
    scale = 1 + k / q + k * k
    return np.array([1.0, -2.0, 1.0]), np.array([1, 2 * (k * k - 1) / scale, (1 - k / q + k * k) / scale])
