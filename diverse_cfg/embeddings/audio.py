"""What every embedder does to audio first: mono, resampling, mel filters."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F


def to_mono(waveforms: Tensor) -> Tensor:
    """[B, L] stays, [B, C, L] is averaged over channels → [B, L], float32."""
    if waveforms.ndim == 3:
        waveforms = waveforms.mean(1)
    if waveforms.ndim != 2:
        raise ValueError(f"waveforms must be [B, L] or [B, channels, L], got shape {tuple(waveforms.shape)}")
    return waveforms.float()


@lru_cache(maxsize=16)
def _sinc_kernel(source: int, target: int, zeros: int) -> Tensor:
    cutoff = 0.95 * min(source, target) / 2  # Hz
    width = math.ceil(zeros * source / (2 * cutoff))
    offsets = torch.arange(-width, width + source, dtype=torch.float64) / source
    times = offsets - torch.arange(target, dtype=torch.float64)[:, None] / target
    window = torch.where(
        times.abs() * source <= width, torch.cos(times * source * math.pi / (2 * width)).square(), 0.0
    )
    return (2 * cutoff / source * torch.sinc(2 * cutoff * times) * window).float()


def resample(waveforms: Tensor, source: int, target: int, zeros: int = 24) -> Tensor:
    """Windowed-sinc resampling of [B, L] from `source` to `target` Hz → [B, ⌈L·target/source⌉], on the same device.

    Args:
        zeros: zero crossings of the sinc on either side (quality); the pass band ends at 95 % of the lower Nyquist.
    """
    if source == target:
        return waveforms
    common = math.gcd(source, target)
    step, phases = source // common, target // common
    kernel = _sinc_kernel(step, phases, zeros).to(waveforms)
    width = (kernel.shape[1] - step) // 2
    length = math.ceil(waveforms.shape[-1] * phases / step)
    padded = F.pad(waveforms, (width, width + step))[:, None]
    out = F.conv1d(padded, kernel[:, None], stride=step)  # [B, phases, blocks]
    return out.transpose(1, 2).flatten(1)[:, :length]


class LogMel(torch.nn.Module):
    """Waveform [B, L] → log-mel magnitudes [B, bands, frames] in nepers, floor −80 dB of full scale."""

    def __init__(self, sampling_rate: int, n_fft: int, hop: int, bands: int, low: float = 40.0):
        super().__init__()
        from transformers.audio_utils import mel_filter_bank

        filters = mel_filter_bank(
            n_fft // 2 + 1, bands, low, sampling_rate / 2, sampling_rate, norm=None, mel_scale="htk"
        )
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filters", torch.from_numpy(filters).float(), persistent=False)

    def forward(self, waveforms: Tensor) -> Tensor:
        spectrum = torch.stft(
            waveforms,
            self.n_fft,
            self.hop,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        magnitude = spectrum.abs().transpose(1, 2) / (self.window.sum() / 2)
        return (magnitude @ self.filters + 1e-4).log().transpose(1, 2)
