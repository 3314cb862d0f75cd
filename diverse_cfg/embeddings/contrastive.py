"""The diversity embedding of arXiv 2410.06084: a small transformer to which two chunks of a recording are alike.

Positives are two non-overlapping chunks of a recording, the loss is a semi-hard triplet loss on cosine distances. The
encoder is a module of sentence-transformers, so that one interface serves every embedder. It reads log-mel patches of
audio or, to spare the decoding during training, the codes themselves.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module
from torch import Tensor, nn
from torch.nn import functional as F

from diverse_cfg.embeddings.audio import LogMel, resample, to_mono
from diverse_cfg.reading import read_json, reading

CONFIG_NAME = "encoder.json"


@dataclass
class ContrastiveConfig:
    """Shape of a `ContrastiveEncoder`. The paper's is 12 layers of 6 heads; the defaults are the nano model's.

    Attributes:
        reads: "waveforms" or "codes". sampling_rate: Hz of the audio (for codes: that of their codec).
        num_codebooks, codebook_size: of the codes; ignored for waveforms.
        bands, n_fft, hop: of the log-mel; ignored for codes.
        patch: frames that form one token.
    """

    reads: Literal["waveforms", "codes"] = "waveforms"
    sampling_rate: int = 16_000
    num_codebooks: int = 4
    codebook_size: int = 512
    bands: int = 96
    n_fft: int = 1024
    hop: int = 320
    patch: int = 3
    hidden_size: int = 96
    num_layers: int = 3
    num_heads: int = 4
    dim: int = 64
    dropout: float = 0.1

    def __post_init__(self):
        if self.reads not in ("waveforms", "codes"):
            raise ValueError(f"reads={self.reads!r}: an encoder reads 'waveforms' or 'codes'")


class ContrastiveEncoder(Module):
    """Clips → `sentence_embedding` [B, D]: patches → transformer encoder → mean over time → linear."""

    def __init__(self, config: ContrastiveConfig):
        super().__init__()
        self.config = config
        width = config.hidden_size
        if config.reads == "codes":
            self.books = nn.Embedding(config.num_codebooks * config.codebook_size, width)
            self.patches = nn.Linear(width * config.patch, width)
        else:
            self.log_mel = LogMel(config.sampling_rate, config.n_fft, config.hop, config.bands)
            self.patches = nn.Linear(config.bands * config.patch, width)
        layer = nn.TransformerEncoderLayer(
            width, config.num_heads, 4 * width, config.dropout, "gelu", batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, config.dim)

    def frames(self, clips: Tensor) -> Tensor:
        """Clips → frame vectors [B, frames, width or bands]."""
        if self.config.reads == "codes":
            offsets = (
                torch.arange(self.config.num_codebooks, device=clips.device)[:, None]
                * self.config.codebook_size
            )
            return self.books(clips + offsets).sum(1)
        # Log-magnitudes between the floor and full scale, brought to about −1 … 1.
        return self.log_mel(clips).transpose(1, 2) / 4.6 + 1

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        frames = self.frames(features["clips"])
        patch = self.config.patch
        tokens = frames.shape[1] // patch
        if tokens == 0:
            raise ValueError(
                f"a clip of {frames.shape[1]} frames is shorter than one patch of {patch} frames"
            )
        hidden = self.patches(frames[:, : tokens * patch].unflatten(1, (tokens, patch)).flatten(2))
        hidden = self.layers(hidden + _positions(tokens, hidden.shape[-1]).to(hidden))
        return {**features, "sentence_embedding": self.head(self.norm(hidden).mean(1))}

    def preprocess(self, inputs: list[dict[str, Any]], **_: Any) -> dict[str, Any]:
        """Clips as sentence-transformers hands them over: `{"array", "sampling_rate"}` or `{"codes"}`, equally long."""
        if self.config.reads == "codes":
            return {"clips": torch.stack([torch.as_tensor(item["codes"]) for item in inputs])}
        clips = [
            resample(
                torch.as_tensor(item["array"]).float()[None], item["sampling_rate"], self.config.sampling_rate
            )[0]
            for item in inputs
        ]
        return {"clips": torch.stack(clips)}

    @property
    def modalities(self) -> list[str]:
        """What sentence-transformers may hand to `preprocess`."""
        return ["audio"]

    def get_sentence_embedding_dimension(self) -> int:
        return self.config.dim

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write `encoder.json` and `model.safetensors` (float16) into `output_path`."""
        folder = Path(output_path)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).write_text(json.dumps(dataclasses.asdict(self.config), indent=2) + "\n")
        weights = {k: v.detach().half().contiguous().cpu() for k, v in self.state_dict().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    @classmethod
    def load(cls, model_name_or_path: str, **_: Any) -> ContrastiveEncoder:
        folder = Path(model_name_or_path)
        settings = read_json(folder / CONFIG_NAME)
        with reading(folder / CONFIG_NAME):
            encoder = cls(ContrastiveConfig(**settings))
        with reading(folder / "model.safetensors"):
            encoder.load_state_dict(
                {k: v.float() for k, v in load_file(folder / "model.safetensors").items()}
            )
        return encoder


def _positions(tokens: int, width: int) -> Tensor:
    """Sinusoidal positions [tokens, width]: any length, also the prefixes of a clip."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    angles = torch.arange(tokens)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)[:, :width]


class ContrastiveEmbedder:
    """A trained `ContrastiveEncoder` behind the `Embedder` interface; `sentence_transformer` is the same model there.

    Args:
        encoder: the module. name: how cards and caches call it.
    """

    def __init__(self, encoder: ContrastiveEncoder, name: str = "contrastive", *, device: str | None = None):
        self.encoder = encoder.eval().requires_grad_(False)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.encoder.to(self.device)
        self.reads: Literal["waveforms", "codes"] = encoder.config.reads
        self.name, self.sampling_rate = name, encoder.config.sampling_rate

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: str | None = None) -> ContrastiveEmbedder:
        """Load a folder written by `save_pretrained` or `train_contrastive`."""
        folder = Path(folder)
        if not (folder / CONFIG_NAME).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {CONFIG_NAME}: it is not a contrastive encoder of this package"
            )
        return cls(ContrastiveEncoder.load(str(folder)), folder.name, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        self.encoder.save(str(folder))

    @property
    def sentence_transformer(self) -> SentenceTransformer:
        """The encoder as a `SentenceTransformer`, for its `encode`, `similarity` and the like."""
        return SentenceTransformer(modules=[self.encoder], device=str(self.device))

    @torch.no_grad()
    def embed(self, inputs: Tensor, sampling_rate: int | None = None) -> Tensor:
        """Embeddings [B, D] of waveforms [B, L] at `sampling_rate` Hz, or of codes [B, K, T]."""
        if self.reads == "codes":
            books = self.encoder.config.num_codebooks
            if inputs.ndim != 3 or inputs.shape[1] != books or inputs.is_floating_point():
                raise ValueError(
                    f"{self.name!r} reads codes [B, {books}, T], got {inputs.dtype} {tuple(inputs.shape)}"
                )
            clips = inputs.to(self.device)
        else:
            audio = to_mono(inputs.to(self.device))
            clips = resample(audio, sampling_rate or self.sampling_rate, self.sampling_rate)
        return self.encoder({"clips": clips})["sentence_embedding"].float()


def semi_hard_triplet_loss(
    first: Tensor, second: Tensor, margin: float = 0.2, groups: Tensor | None = None
) -> Tensor:
    """Semi-hard triplet loss (Schroff et al., arXiv 1503.03832) over a batch of positive pairs, on cosine distances.

    For each anchor the negative is the closest one that is farther than the positive; where there is none, the
    farthest. Both chunks serve as anchors.

    Args:
        first, second: [B, D]; row i of both comes from one recording, all other rows are negatives.
        groups: [B]; only rows of one group are negatives of each other. What a group has in common is then of no
            use, and in the way of keeping its members apart.

    Raises:
        ValueError: a group of one, which has no negatives.
    """
    vectors = F.normalize(torch.cat([first, second]), dim=1)
    distance = 1 - vectors @ vectors.T
    count = len(first)
    partner = torch.arange(2 * count, device=first.device).roll(count)
    positive = distance.gather(1, partner[:, None])
    excluded = torch.eye(2 * count, dtype=torch.bool, device=first.device)
    excluded = excluded | excluded[partner]
    if groups is not None:
        both = torch.cat([groups, groups])
        excluded = excluded | (both[:, None] != both)
    if bool(excluded.all(1).any()):
        raise ValueError("a recording has no negatives: a batch needs at least two of every group")
    harder = distance.masked_fill(excluded | (distance <= positive), torch.inf).min(1, keepdim=True).values
    farthest = distance.masked_fill(excluded, -torch.inf).max(1, keepdim=True).values
    negative = torch.where(harder.isinf(), farthest, harder)
    return F.relu(positive - negative + margin).mean()


def train_contrastive(
    config: ContrastiveConfig,
    draw_pairs: Callable[[int, torch.Generator], tuple[Tensor, ...]],
    *,
    steps: int,
    batch: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: str = "encoder",
    device: str | None = None,
) -> ContrastiveEmbedder:
    """Train an encoder on pairs of chunks.

    Args:
        draw_pairs: `(batch, generator)` → two stacks of clips; row i of both are disjoint chunks of one recording.
            A third value gives the group of each row, see `semi_hard_triplet_loss`.
        device: torch device; default: the GPU when there is one.

    Raises:
        FloatingPointError: the loss, or what the last step made of the weights, is not finite.
    """
    from tqdm import tqdm

    torch.manual_seed(seed)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    encoder = ContrastiveEncoder(config).train().to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps, pct_start=0.05
    )
    generator = torch.Generator().manual_seed(seed)
    bar = tqdm(range(steps), desc=progress, unit="step")
    for step in bar:
        first, second, *groups = (part.to(device) for part in draw_pairs(batch, generator))
        embeddings = [encoder({"clips": clips})["sentence_embedding"] for clips in (first, second)]
        loss = semi_hard_triplet_loss(*embeddings, groups=groups[0] if groups else None)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: lower learning_rate={learning_rate}"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    if not all(p.isfinite().all() for p in encoder.parameters()):
        raise FloatingPointError(
            f"the last step made weights inf or nan: lower learning_rate={learning_rate}"
        )
    return ContrastiveEmbedder(encoder, progress, device=device)


def retrieval_at_1(embedder: ContrastiveEmbedder, first: Tensor, second: Tensor) -> float:
    """Share of clips in `first` whose nearest clip of `second` is its own partner (chance: 1 / B)."""
    a, b = (F.normalize(embedder.embed(clips), dim=1) for clips in (first, second))
    return ((a @ b.T).argmax(1) == torch.arange(len(a), device=a.device)).float().mean().item()
