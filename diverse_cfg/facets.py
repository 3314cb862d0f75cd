"""What differs between clips, facet by facet: melody, rhythm, pitch content, timbre, level and rests.

An embedding mixes them, and may hear little of a melody and much of a sound. Each facet is a plain measure of one
clip and a distance in [0, 1] between two, by rules and without a network; clips are mixed to mono and, for all but
level, brought to the same loudness (ITU-R BS.1770-4) first.

| facet | of one clip | distance of two |
|---|---|---|
| melody | the successive pitches of its notes | edits that turn the intervals of one into those of the other |
| rhythm | the onset times of its notes | edits that turn the times between onsets of one into those of the other |
| pitch | share of the time that each pitch class sounds | half the sum of absolute differences |
| timbre | mean strength of the harmonics of its pitch | difference in dB; 1 from 20 dB on |
| level | RMS level of the frames that are not quiet | difference in dB; 1 from 20 dB on |
| rests | share of quiet frames, 40 dB below the loudness | absolute difference |

Edits are counted from the first note on and as a share of the shorter sequence, so that a clip that ends early does
not differ by what it lacks, and of at least four, so that two notes are no other melody. An interval that is changed
in size alone counts half; octaves do not count, as pitch trackers confuse them. A time that is doubled counts one.
Every distance but that of rests is multiplied by the share of both clips that is alive (outside of silences of 0.4 s
and more): a clip that dies or rests earns less.

Melody and rhythm are those of one voice: of a dense mix little has a pitch that YIN finds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from scipy.ndimage import median_filter
from scipy.signal import find_peaks
from torch import Tensor

from diverse_cfg.acoustics import DYING_SECONDS, loudness
from diverse_cfg.config import GuardConfig
from diverse_cfg.embeddings.audio import LogMel, resample, to_mono
from diverse_cfg.nano.rules import PITCH_HOP, RATE, pitches
from diverse_cfg.rewards import DiversityReward

FACETS = ("melody", "rhythm", "pitch", "timbre", "level", "rests")

REWARDED_FACETS = FACETS[:-1]
"""A reward for different rests would pay for clips that die."""

_LOUDNESS = -20.0  # LUFS at which all but level is measured
_QUIET = -40.0  # dB below the loudness
_FRAME = 0.02  # seconds
_NOTE_FRAMES = 4  # of a stable pitch class make a note: 80 ms
_ONSET_HOP, _ONSET_LAG, _ONSET_RISE = 160, 3, 0.1  # samples, frames, nepers of mean rise
_ONSET_GAP = 0.06  # seconds between two onsets, at least
_SAME_ONSET = 0.1  # seconds between an attack and the change of pitch that it brings
_FEWEST_EDITS = 4
_HARMONICS, _FFT = 8, 2048
_WHOLE_DECIBELS = 20.0  # a difference that counts 1
_SECONDS_AT_ONCE = 200  # of audio, whose frames are all in memory
_NOTHING = -1.0  # fills up sequences, whose own values are positive


# ---- one clip ----------------------------------------------------------------------------------------


def measure(waveforms: Tensor, sampling_rate: int, facets: Collection[str] = FACETS) -> dict[str, np.ndarray]:
    """What each facet is in clips [N, L] or [N, 2, L] → facet → [N, M].

    The last of the M columns is the share of the clip that is alive; before stand a sequence (melody: MIDI pitches,
    rhythm: onsets in seconds), filled up with −1 to a length that depends on L alone, or a fixed number of values.
    """
    audio = torch.nan_to_num(to_mono(waveforms).cpu(), nan=0.0, posinf=0.0, neginf=0.0)
    audio = resample(audio, sampling_rate, RATE)
    at_once = max(1, _SECONDS_AT_ONCE * RATE // audio.shape[1])
    parts = [_measure(part, facets) for part in audio.split(at_once)]
    return {facet: np.concatenate([part[facet] for part in parts]) for facet in facets}


def _measure(audio: Tensor, facets: Collection[str]) -> dict[str, np.ndarray]:
    loud = np.array([loudness(clip, RATE) for clip in audio.numpy()])
    gain = np.where(np.isfinite(loud), _LOUDNESS - loud, 0)  # dB
    audio = audio * torch.from_numpy(10 ** (gain / 20)).to(audio)[:, None]
    power = _frame_power(audio, RATE)
    quiet = power < 10 ** ((_LOUDNESS + _QUIET) / 10)
    alive = 1 - np.array([_long_rests(row) for row in quiet])
    seconds = audio.shape[1] / RATE
    found: dict[str, np.ndarray] = {}
    if {"melody", "rhythm", "pitch", "timbre"} & set(facets):
        hertz = pitches(audio, RATE)
        notes = _notes(hertz)
        found["melody"] = _filled([pitch for pitch, _, _ in notes], seconds)
        found["pitch"] = np.stack([_pitch_classes(pitch, length) for pitch, _, length in notes])
    if "rhythm" in facets:
        found["rhythm"] = _filled(_onsets(audio, [start for _, start, _ in notes]), seconds)
    if "timbre" in facets:
        found["timbre"] = _harmonics(audio, hertz)
    sounding = np.where(quiet, 0, power).sum(1) / np.maximum((~quiet).sum(1), 1)
    found["level"] = (10 * np.log10(np.maximum(sounding, 1e-12)) - gain)[:, None]
    found["rests"] = quiet.mean(1, keepdims=True)
    return {facet: np.column_stack([found[facet], alive]) for facet in facets}


def _frame_power(waveforms: Tensor, sampling_rate: int) -> np.ndarray:
    """Mean square of the 20 ms frames of clips [N, L] → [N, frames]."""
    size = min(max(round(_FRAME * sampling_rate), 1), waveforms.shape[1])
    frames = waveforms[:, : waveforms.shape[1] // size * size].unflatten(1, (-1, size))
    return frames.square().mean(2).numpy()


def _long_rests(quiet: np.ndarray) -> float:
    """Share of the frames that lie in silences of `DYING_SECONDS` and more."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], quiet, [0]])))
    lengths = edges[1::2] - edges[::2]
    return lengths[lengths >= round(DYING_SECONDS / _FRAME)].sum() / len(quiet)


def _notes(hertz: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """MIDI pitch, start and length (seconds) of the notes of each clip: stretches of one pitch class.

    Repeated notes are one, and octaves do not divide: YIN takes one for the other within a tone.
    """
    found = []
    for row in 69 + 12 * np.log2(hertz / 440):
        classes = np.where(np.isfinite(row), np.round(np.nan_to_num(row)) % 12, _NOTHING)
        classes = median_filter(classes, 3, mode="nearest")
        start = np.flatnonzero(np.diff(classes, prepend=-2))
        length = np.diff(start, append=len(classes))
        kept = (length >= _NOTE_FRAMES) & (classes[start] != _NOTHING)
        start, length = start[kept], length[kept]
        pitch = np.array([np.round(np.nanmedian(row[s : s + n])) for s, n in zip(start, length, strict=True)])
        found.append((pitch, start * PITCH_HOP / RATE, length * PITCH_HOP / RATE))
    return found


def _onsets(audio: Tensor, starts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Onsets in seconds: attacks (SuperFlux, Böck & Widmer 2013) and changes of pitch without one."""
    mel = LogMel(RATE, 1024, _ONSET_HOP, 96)(audio).clamp_min(-7.0)
    before = torch.nn.functional.max_pool2d(mel[:, None], (3, 1), stride=1, padding=(1, 0))[:, 0]
    flux = (mel[:, :, _ONSET_LAG:] - before[:, :, :-_ONSET_LAG]).clamp_min(0).mean(1).numpy()
    flux = np.pad(flux, ((0, 0), (_ONSET_LAG, 1)))
    gap = round(_ONSET_GAP * RATE / _ONSET_HOP)
    found = []
    for row, changes in zip(flux, starts, strict=True):
        peaks = find_peaks(row, height=_ONSET_RISE, prominence=0.6 * _ONSET_RISE, distance=gap)[0]
        attacks = peaks * _ONSET_HOP / RATE
        near = np.abs(changes[:, None] - attacks).min(1, initial=np.inf) <= _SAME_ONSET
        found.append(np.sort(np.concatenate([attacks, changes[~near]])))
    return found


def _pitch_classes(pitch: np.ndarray, length: np.ndarray) -> np.ndarray:
    """Share of the time of the notes that belongs to each pitch class [12]; zeros without notes."""
    weights = np.bincount(pitch.astype(int) % 12, weights=length, minlength=12)
    return weights / max(weights.sum(), 1e-9)


def _harmonics(audio: Tensor, hertz: np.ndarray) -> np.ndarray:
    """Mean strength in dB of the harmonics of the pitch as shares of their energy [N, 8]; zeros without a pitch.

    Unlike the spectrum's envelope it hardly depends on which notes are played.

    Args:
        audio: [N, L].
        hertz: of `pitches` [N, frames].
    """
    spectrum = torch.stft(
        audio,
        _FFT,
        PITCH_HOP,
        window=torch.hann_window(_FFT),
        center=True,
        pad_mode="constant",
        return_complex=True,
    ).abs()
    power = torch.nn.functional.max_pool1d(spectrum.transpose(1, 2), 3, 1, 1).square()  # [N, frames, bins]
    # A frame of `pitches` begins where its samples do; the middle of those is two frames on.
    power = power[:, 2 : 2 + hertz.shape[1]]
    hertz = hertz[:, : power.shape[1]]
    pitched = np.isfinite(hertz)
    bins = np.nan_to_num(hertz)[:, :, None] * np.arange(1, _HARMONICS + 1) * _FFT / RATE
    heard = power.numpy()
    heard = np.take_along_axis(heard, np.minimum(np.round(bins), _FFT // 2).astype(int), axis=2)
    heard = np.where(bins < _FFT // 2, heard, 0)
    shares = heard / np.maximum(heard.sum(2, keepdims=True), 1e-12)
    decibels = (10 * np.log10(shares + 1e-4) * pitched[:, :, None]).sum(1)
    return decibels / np.maximum(pitched.sum(1), 1)[:, None] / math.sqrt(_HARMONICS)


def _filled(sequences: Sequence[np.ndarray], seconds: float) -> np.ndarray:
    """Sequences as rows of one length, which depends on the clips' length alone."""
    out = np.full((len(sequences), math.ceil(seconds / _ONSET_GAP) + 1), _NOTHING)
    for row, sequence in zip(out, sequences, strict=True):
        row[: len(sequence)] = sequence[: len(row)]
    return out


# ---- two clips ---------------------------------------------------------------------------------------


def facet_distances(facet: str, values: Tensor | np.ndarray) -> Tensor:
    """Distances in [0, 1] between the clips of each prompt [..., G, M] → float64 [..., G, G], 0 on the diagonal.

    Args:
        facet: one of `FACETS`.
        values: rows of `measure`.
    """
    rows = np.asarray(values, dtype=np.float64)
    *groups, count, width = rows.shape
    rows = rows.reshape(-1, count, width)
    first, second = np.triu_indices(count, 1)
    a, b = rows[:, first].reshape(-1, width), rows[:, second].reshape(-1, width)
    found = _DISTANCES[facet](a[:, :-1], b[:, :-1])
    if facet != "rests":
        found = found * a[:, -1] * b[:, -1]
    out = np.zeros((len(rows), count, count))
    out[:, first, second] = out[:, second, first] = found.reshape(len(rows), -1)
    return torch.from_numpy(out.reshape(*groups, count, count))


def _melody_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def change(interval: np.ndarray, other: np.ndarray) -> np.ndarray:
        size = np.where(np.sign(interval) == np.sign(other), 0.5, 1)
        return np.where((interval - other) % 12 == 0, 0, size)

    return _edit_distance(_steps(a), _steps(b), change)


def _rhythm_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    def change(time: np.ndarray, other: np.ndarray) -> np.ndarray:
        return np.minimum(1, np.abs(np.log2(time / other)))

    return _edit_distance(_steps(a), _steps(b), change)


def _steps(sequences: np.ndarray) -> np.ndarray:
    """Differences of neighbours [B, M − 1]; NaN behind the end."""
    known = np.where(sequences == _NOTHING, np.nan, sequences)
    return np.diff(known, axis=1)


def _edit_distance(
    a: np.ndarray, b: np.ndarray, change: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray:
    """Edits per element of the shorter of two sequences, from the start on; what the longer has more is free.

    Args:
        a: sequences [B, M], NaN behind their end.
        b: sequences [B, M].
        change: cost in [0, 1] of one element in the place of another; leaving one out or putting one in costs 1.
    """
    shorter = np.isfinite(a).sum(1) <= np.isfinite(b).sum(1)
    a, b = np.where(shorter[:, None], a, b), np.where(shorter[:, None], b, a)
    length, other = np.isfinite(a).sum(1), np.isfinite(b).sum(1)
    places = np.arange(b.shape[1] + 1)
    beyond = places > other[:, None]
    costs = np.tile(places.astype(float), (len(a), 1))
    total = np.zeros(len(a))
    for row in range(length.max(initial=0)):
        with np.errstate(invalid="ignore"):
            changed = np.nan_to_num(change(a[:, row, None], b), nan=1.0)
        best = costs + 1
        best[:, 1:] = np.minimum(best[:, 1:], costs[:, :-1] + changed)
        # Putting in several: the least of best[k] + (j − k) over k ≤ j.
        costs = np.minimum.accumulate(best - places, axis=1) + places
        ended = length == row + 1
        total[ended] = np.where(beyond, np.inf, costs)[ended].min(1)
    return np.minimum(1, total / np.maximum(length, _FEWEST_EDITS))


def _pitch_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    both = (a.sum(1) > 0) & (b.sum(1) > 0)
    return np.where(both, np.abs(a - b).sum(1) / 2, 0)


def _timbre_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.where(a.any(1) & b.any(1), _decibel_distance(a, b), 0)


def _decibel_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.minimum(1, np.linalg.norm(a - b, axis=1) / _WHOLE_DECIBELS)


def _rests_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.abs(a - b)[:, 0]


_DISTANCES = {
    "melody": _melody_distance,
    "rhythm": _rhythm_distance,
    "pitch": _pitch_distance,
    "timbre": _timbre_distance,
    "level": _decibel_distance,
    "rests": _rests_distance,
}


# ---- as a reward -------------------------------------------------------------------------------------


class FacetEmbedder:
    """A facet in the place of an encoder: rows of `measure`, with a distance of their own instead of the cosine.

    Args:
        facet: one of `FACETS` but "rests", which would pay for clips that die.
    """

    sampling_rate = RATE
    reads = "waveforms"

    def __init__(self, facet: str):
        if facet not in REWARDED_FACETS:
            raise ValueError(f"facet {facet!r} is no reward; known: {', '.join(REWARDED_FACETS)}")
        self.facet = facet
        self.name = f"facet {facet}"

    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        """Rows [N, M] of clips [N, L] or [N, 2, L], on their device."""
        rows = measure(inputs, sampling_rate or self.sampling_rate, [self.facet])[self.facet]
        return torch.from_numpy(rows).float().to(inputs.device)

    def distances(self, embeddings: Tensor) -> Tensor:
        """Distances [P, G, G] of rows [P, G, M], on their device."""
        return facet_distances(self.facet, embeddings.cpu()).to(embeddings)


class FacetReward(DiversityReward):
    """r_i: mean distance of a clip to the other clips of its prompt in one facet of the music.

    Args:
        facet: "melody", "rhythm", "pitch", "timbre" or "level".
        guards: see `GuardConfig`; none by default.
    """

    def __init__(self, facet: str, guards: GuardConfig | None = None):
        super().__init__(FacetEmbedder(facet), guards)
        self.__name__ = f"diversity_{facet}"
