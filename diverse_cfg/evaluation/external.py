"""Judges from elsewhere as features: text adherence under CLAP, Audiobox-Aesthetics. For models beyond the
nano world."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from diverse_cfg import rewards
from diverse_cfg.embeddings import audio
from diverse_cfg.evaluation.cache import content_digest, weights_digest
from diverse_cfg.evaluation.features import Batch, code_digest
from diverse_cfg.rewards import AestheticsReward, TextAdherenceReward

AESTHETICS_AXES = {"aesthetics_ce": "CE", "aesthetics_pq": "PQ"}


class TextAdherenceFeature:
    """Cosine between a clip and its prompt, `score`. Where it was a reward, it is no judge.

    Args:
        embedder: with `embed` and `embed_text`, such as `ClapEmbedder`.
        source: its folder or id.
    """

    name = "text"

    def __init__(self, embedder: Any, source: str):
        self.score = TextAdherenceReward(embedder)
        self.fingerprint = {
            "feature": "text",
            "encoder": embedder.name,
            "content": content_digest(source),
            "code": code_digest(rewards.__name__, type(embedder).__module__, audio.__name__),
        }

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        scores = self.score(batch.prompts, sampling_rate=batch.sampling_rate, waveforms=batch.waveforms)
        return {"score": np.array(scores, dtype=np.float64)}


class AestheticsFeature:
    """One axis of Audiobox-Aesthetics, `score`, about 1 to 10.

    Args:
        name: one of `AESTHETICS_AXES`.
        model: an `AesMultiOutput`; by default that of the Hub. Both axes may share it.
        device: where it runs.
    """

    def __init__(self, name: str, model: Any = None, device: str | None = None):
        self.name = name
        self.score = AestheticsReward(AESTHETICS_AXES[name], model, device)
        try:
            package = version("audiobox_aesthetics")
        except PackageNotFoundError:
            package = "none"
        self.fingerprint = {
            "feature": name,
            "model": type(self.score.model).__name__,
            "package": package,
            "weights": weights_digest(self.score.model),
            "scale": {key: float(value) for key, value in self.score.scale.items()},
            "code": code_digest(rewards.__name__, audio.__name__),
        }

    def compute(self, batch: Batch) -> dict[str, np.ndarray]:
        scores = self.score(sampling_rate=batch.sampling_rate, waveforms=batch.waveforms)
        return {"score": np.array(scores, dtype=np.float64)}
