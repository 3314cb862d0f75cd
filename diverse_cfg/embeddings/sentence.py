"""Any audio model that sentence-transformers loads, as an embedder."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diverse_cfg.embeddings.audio import resample, to_mono
from diverse_cfg.reading import reading


class SentenceTransformerEmbedder:
    """Wrap a `SentenceTransformer` (or its id) whose model accepts audio.

    The model always gets `{"array", "sampling_rate"}`: a bare array at another rate would be silently wrong.

    Args:
        model: a `SentenceTransformer`, or an id or folder of one. Remote code is never executed.
        sampling_rate: rate in Hz to resample to; default: that of the model's feature extractor.
    """

    reads: Literal["waveforms", "codes"] = "waveforms"

    def __init__(self, model, *, sampling_rate: int | None = None, device: str | None = None):
        from sentence_transformers import SentenceTransformer

        self.name = model if isinstance(model, str) else type(model).__name__
        if isinstance(model, str):
            with reading(model, "pass another folder or id of an embedder"):
                model = SentenceTransformer(model, device=device)
        self.model = model
        extractor = getattr(self.model[0], "processor", None)
        extractor = getattr(extractor, "feature_extractor", extractor)
        self.sampling_rate = sampling_rate or getattr(extractor, "sampling_rate", 0)
        if not self.sampling_rate:
            raise ValueError(f"the sampling rate of {self.name!r} is unknown: pass sampling_rate=…")

    @torch.no_grad()
    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        """Embeddings [B, D] of waveforms [B, L] or [B, 2, L]."""
        audio = (
            resample(to_mono(inputs), sampling_rate or self.sampling_rate, self.sampling_rate).cpu().numpy()
        )
        clips = [{"array": clip, "sampling_rate": self.sampling_rate} for clip in audio]
        vectors = self.model.encode(clips, convert_to_tensor=True, show_progress_bar=False)
        return vectors.float()
