"""How features become numbers: per prompt (cells), or per set of prompts.

A measure per prompt maps a replicate to its *cells*, the means over the clips of each prompt [P], whose
mean over prompts is the table's number. A measure of the whole set (Fréchet, MMD, the upper bound) is a
function of which prompts it is taken of, so that an interval can leave some out; NaN where it has no value.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diverse_cfg.functional.diversity import pairwise_cosine_distance, unit_embeddings, vendi_score


@dataclass(frozen=True)
class Replicate:
    """Features of the clips of one training seed, and what they are compared with.

    Args:
        features: feature → column → rows [P, S, G, ...], S sampling seeds.
        codes: [P, S, G, K, T].
        timing: column → rows [P, S, G] of the generation (`seconds`, `batch`, `decoder_rows`).
        reference: embeddings of reference audio under the held-out encoder [C, D], or None.
    """

    features: Mapping[str, Mapping[str, np.ndarray]]
    codes: np.ndarray
    timing: Mapping[str, np.ndarray] = field(default_factory=dict)
    reference: np.ndarray | None = None

    def clips(self, feature: str, column: str) -> np.ndarray:
        """Rows [P, S·G] of one column."""
        rows = self.features[feature][column]
        return rows.reshape(rows.shape[0], -1)

    def groups(self, encoder: str) -> Tensor:
        """Embeddings [P, S, G, D]; NaN rows where a clip has none."""
        return torch.from_numpy(self.features[encoder]["values"])


Cells = Callable[[Replicate], np.ndarray]
OfSet = Callable[[Replicate], Callable[[Tensor], float]]


# ---- means over clips ----------------------------------------------------------------------------


def clip_mean(feature: str, column: str) -> Cells:
    """Cells: mean of a column over the clips of each prompt; NaN where no clip of the prompt has a value."""

    def cells(replicate: Replicate) -> np.ndarray:
        rows = replicate.clips(feature, column)
        known = np.isfinite(rows)
        counts = known.sum(axis=1)
        sums = np.where(known, rows, 0).sum(axis=1)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)

    return cells


def timing_mean(column: str) -> Cells:
    """Cells: mean over the clips of each prompt of what generating them took."""
    return lambda replicate: replicate.timing[column].reshape(len(replicate.codes), -1).mean(axis=1)


# ---- diversity -----------------------------------------------------------------------------------


def _usable(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Unit embeddings, and which clips have one; a clip without counts as a copy of its group's first that
    has."""
    usable = torch.isfinite(embeddings).all(dim=-1)
    first = usable.double().argmax(dim=-1)[..., None, None].expand_as(embeddings[..., :1, :])
    copied = torch.where(usable[..., None], embeddings, embeddings.gather(-2, first))
    anything = torch.isfinite(copied).all(dim=-1, keepdim=True)  # a group without any clip is all one clip
    return unit_embeddings(torch.where(anything, copied, torch.ones_like(copied)).double()), usable


def within_prompt_distance(encoder: str) -> Cells:
    """Cells: mean pairwise cosine distance inside each group, averaged over the sampling seeds.

    A clip without an embedding (silence) has distance 0 to every other: breaking must not pay.
    """

    def cells(replicate: Replicate) -> np.ndarray:
        embeddings, usable = _usable(replicate.groups(encoder))
        distances = pairwise_cosine_distance(embeddings.flatten(0, 1))
        known = usable.flatten(0, 1)
        distances = distances * known[:, :, None] * known[:, None, :]
        count = distances.shape[-1] * (distances.shape[-1] - 1)
        return (distances.sum(dim=(1, 2)) / count).view(usable.shape[:2]).mean(dim=1).numpy()

    return cells


def within_prompt_vendi(encoder: str) -> Cells:
    """Cells: Vendi score of each group, averaged over the sampling seeds."""

    def cells(replicate: Replicate) -> np.ndarray:
        embeddings, _ = _usable(replicate.groups(encoder))
        return vendi_score(embeddings).mean(dim=1).numpy()

    return cells


def different_prompts(encoder: str) -> OfSet:
    """Mean distance of two clips of two different prompts: the upper bound of the paper's figures.

        U = mean_{p≠q} (1 − m_p·m_q),   m_p = mean of the unit embeddings of prompt p

    which is the mean over all pairs of clips, since 1 − e·e' is linear in either clip. Clips without an
    embedding (silence), and prompts of nothing else, are left out.
    """

    def of_set(replicate: Replicate) -> Callable[[Tensor], float]:
        embeddings, usable = _usable(replicate.groups(encoder))
        known = embeddings.flatten(1, 2) * usable.flatten(1)[..., None]
        counts = usable.flatten(1).sum(dim=1)
        means = known.sum(dim=1) / counts.clamp(min=1)[:, None]
        distances = 1 - means @ means.mT

        def statistic(prompts: Tensor) -> float:
            sounding = prompts[counts[prompts] > 0]
            if len(sounding) < 2:
                return math.nan
            pairs = distances[sounding][:, sounding]
            return float((pairs.sum() - pairs.trace()) / (len(pairs) * (len(pairs) - 1)))

        return statistic

    return of_set


def codebook_entropy(codebook: int = 0) -> Cells:
    """Cells: entropy (nats) of the codes of one codebook in all clips of a prompt under one seed."""

    def cells(replicate: Replicate) -> np.ndarray:
        tokens = replicate.codes[:, :, :, codebook]
        groups = tokens.reshape(tokens.shape[0], tokens.shape[1], -1)
        return np.array([np.mean([_entropy(group) for group in of_prompt]) for of_prompt in groups])

    return cells


def _entropy(tokens: np.ndarray) -> float:
    shares = np.unique(tokens, return_counts=True)[1] / tokens.size
    return float(-(shares * np.log(shares)).sum())


# ---- distances to reference audio ----------------------------------------------------------------


def to_reference(distance: Callable[[Tensor, Tensor], float]) -> OfSet:
    """Distance of the prompts' clips to reference audio, in the held-out encoder's space; NaN for less than
    two clips with an embedding."""

    def of_set(replicate: Replicate) -> Callable[[Tensor], float]:
        embeddings = replicate.groups("heldout").flatten(1, 2).double()
        reference = torch.from_numpy(np.asarray(replicate.reference)).double()
        usable = torch.isfinite(embeddings).all(dim=-1)

        def statistic(prompts: Tensor) -> float:
            clips = embeddings[prompts][usable[prompts]]
            return distance(clips, reference) if len(clips) >= 2 else math.nan

        return statistic

    return of_set
