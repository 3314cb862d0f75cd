"""Loudness as broadcasters measure it (ITU-R BS.1770-4), so that nobody prefers a clip for being louder."""

import math

import numpy as np
from scipy.signal import lfilter

TARGET_LUFS = -23.0
"""Quiet enough that music of a wide dynamic range reaches it without clipping (EBU R 128)."""

_BLOCK, _STEP = 0.4, 0.1  # seconds
_ABSOLUTE_GATE, _RELATIVE_GATE = -70.0, -10.0
_PEAK = 10 ** (-1 / 20)  # −1 dBFS


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
