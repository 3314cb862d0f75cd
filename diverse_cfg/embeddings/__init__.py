"""Embedders: clips in, vectors out; the space in which diversity is a distance.

An embedder is anything with the attributes and the one method of `Embedder`. Three kinds are provided:

* `clap.ClapEmbedder`: CLAP's audio tower (default for released checkpoints), with its text tower for adherence;
* `sentence.SentenceTransformerEmbedder`: any audio model that sentence-transformers loads;
* `contrastive.ContrastiveEmbedder`: the small self-supervised encoder of arXiv 2410.06084, trained by
  `train_contrastive`. It may read codes instead of audio, which saves the decoding.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from diverse_cfg.assets import shipped_embedder

if TYPE_CHECKING:
    from torch import Tensor


@runtime_checkable
class Embedder(Protocol):
    """What the diversity reward and the evaluation need of an embedding model.

    Attributes:
        name: identifies the model in cards, tables and caches.
        sampling_rate: Hz the model works at; `embed` resamples whatever it is given.
        reads: "waveforms" [B, L] or [B, 2, L] in −1 … 1, or "codes" [B, K, T].

    One that has a method `distances` ([P, G, D] → [P, G, G]) is compared by it, all others by the cosine.
    """

    name: str
    sampling_rate: int
    reads: Literal["waveforms", "codes"]

    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        """Embeddings [B, D], float32, not normalised."""
        ...


def load_embedder(name_or_path: str | Path, *, device: str | None = None) -> Embedder:
    """Load an embedder by id or folder.

    Args:
        name_or_path: a folder of ours (`encoder.json`); one of nano's, `reward-encoder`, `within-encoder` or
            `eval-encoder`; a CLAP checkpoint, or any sentence-transformers audio model.
        device: torch device; default: the GPU when there is one.

    Raises:
        FileNotFoundError: a path that does not exist.
    """
    from diverse_cfg.embeddings.clap import ClapEmbedder, is_clap
    from diverse_cfg.embeddings.contrastive import CONFIG_NAME, ContrastiveEmbedder
    from diverse_cfg.embeddings.sentence import SentenceTransformerEmbedder

    name_or_path = shipped_embedder(str(name_or_path))
    path = Path(name_or_path)
    if path.is_absolute() and not path.exists():
        raise FileNotFoundError(f"no embedder at {path}: give an existing folder or the id of a model")
    if (path / CONFIG_NAME).is_file():
        return ContrastiveEmbedder.from_pretrained(path, device=device)
    if is_clap(str(name_or_path)):
        return ClapEmbedder(str(name_or_path), device=device)
    return SentenceTransformerEmbedder(str(name_or_path), device=device)
