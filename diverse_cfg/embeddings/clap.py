"""CLAP (Wu et al., arXiv 2211.06687) as an embedder: deterministic, batched, on the device of the audio."""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diverse_cfg.embeddings.audio import resample, to_mono
from diverse_cfg.reading import load_complete, reading


def is_clap(name: str) -> bool:
    """Whether `name` is a CLAP checkpoint, by its configuration (read from the folder, the cache or the Hub)."""
    from transformers import AutoConfig

    try:
        with reading(name):
            return AutoConfig.from_pretrained(name).model_type == "clap"
    except (OSError, ValueError):
        return False


class ClapEmbedder:
    """CLAP's audio tower with its text tower beside it.

    `ClapFeatureExtractor` works clip by clip in NumPy and crops clips over ten seconds at random, which makes a
    reward random. Here the same log-mel is computed in torch for the whole batch, and a long clip is the mean of
    consecutive ten-second windows; a short one is repeated to ten seconds, as CLAP was trained.

    Args:
        model: id or folder; `laion/larger_clap_music` (Apache-2.0) is the default of the music recipes.
        device: torch device; default: the GPU when there is one.

    Raises:
        OSError: neither a folder, nor cached, nor reachable.
    """

    reads: Literal["waveforms", "codes"] = "waveforms"

    def __init__(self, model: str = "laion/larger_clap_music", *, device: str | None = None):
        from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel

        try:
            self.model = load_complete(ClapModel, model).eval().requires_grad_(False)
            with reading(model):
                extractor = ClapFeatureExtractor.from_pretrained(model)
                self.tokenizer = AutoTokenizer.from_pretrained(model)
        except OSError as error:
            if os.path.isdir(model):
                raise
            raise OSError(
                f"CLAP checkpoint {model!r} is neither a folder nor in the cache, and could not be downloaded: connect "
                f"once and run `hf download {model}`, or pass another embedder"
            ) from error
        if getattr(self.model.config.audio_config, "enable_fusion", False):
            raise ValueError(
                f"{model!r} is a fused CLAP, whose features are not supported; use an unfused checkpoint"
            )
        self.name = model
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model.to(self.device)
        self.sampling_rate: int = extractor.sampling_rate
        self.window_samples: int = extractor.nb_max_samples
        self._n_fft, self._hop = extractor.fft_window_size, extractor.hop_length
        self._filters = torch.tensor(extractor.mel_filters_slaney, dtype=torch.float32, device=self.device)
        self._window = torch.hann_window(self._n_fft, device=self.device)

    def log_mel(self, windows: Tensor) -> Tensor:
        """CLAP's input features in dB of windows [B, L] → [B, 1, frames, bands]."""
        spectrum = torch.stft(
            windows,
            self._n_fft,
            self._hop,
            window=self._window,
            center=True,
            pad_mode="reflect",
            return_complex=True,
        )
        power = spectrum.real.square() + spectrum.imag.square()
        mel = power.transpose(1, 2) @ self._filters
        return 10 * mel.clamp_min(1e-10).log10()[:, None]

    @torch.no_grad()
    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        """Embeddings [B, 512] of waveforms [B, L] or [B, 2, L] at `sampling_rate` Hz (default: the model's own)."""
        audio = to_mono(inputs.to(self.device))
        audio = resample(audio, sampling_rate or self.sampling_rate, self.sampling_rate)
        length = audio.shape[1]
        if length == 0:
            raise ValueError("the clips are empty: there is nothing to embed")
        if length < self.window_samples:
            audio = audio.repeat(1, self.window_samples // length)
        windows = (
            audio.unfold(1, self.window_samples, self.window_samples)
            if length >= self.window_samples
            else None
        )
        if windows is None:
            parts = [F.pad(audio, (0, self.window_samples - audio.shape[1]))]
        else:
            parts = list(windows.unbind(1))
            if length % self.window_samples:
                parts.append(audio[:, -self.window_samples :])
        vectors = [self._features(self.model.get_audio_features(self.log_mel(part))) for part in parts]
        return torch.stack(vectors).mean(0).float()

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """Embeddings [B, 512] of `texts` in the same space."""
        tokens = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        return self._features(self.model.get_text_features(**tokens)).float()

    @staticmethod
    def _features(output) -> Tensor:
        # transformers returns a tensor or, from 5 on, an output object whose pooled vector it is.
        return output if isinstance(output, Tensor) else output.pooler_output
