"""Training the diversity embedder of arXiv 2410.06084 on recordings, and how well it tells them apart."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diverse_cfg.embeddings.contrastive import (
    ContrastiveConfig,
    ContrastiveEmbedder,
    retrieval_at_1,
    train_contrastive,
)
from diverse_cfg.embeddings.recordings import CodeRecordings, Recordings

NEGATIVES = ("any", "same-prompt")
# Hidden size, layers, heads and output of the encoder; "paper" is arXiv 2410.06084's.
SIZES = {"small": (96, 3, 4, 64), "paper": (384, 12, 6, 256)}

_PER_GROUP = 16
_MOST_HELD_OUT = 256


@dataclass(frozen=True)
class _TrainedEmbedder:
    """An embedder with what it achieves on recordings that it has not seen.

    Args:
        embedder: ready to be saved.
        retrieval: share of the held-out recordings of which one chunk finds the other first (retrieval@1),
            among all of them or, with negatives of the same prompt, among those of the prompt.
        chance: the same of a guess.
        num_held_out: recordings that were held out.
    """

    embedder: ContrastiveEmbedder
    retrieval: float
    chance: float
    num_held_out: int


def encoder_config(recordings: Recordings, size: str = "small") -> ContrastiveConfig:
    """The shape of an encoder for these recordings; `size` is one of `SIZES`."""
    hidden, layers, heads, dim = SIZES[size]
    shape = {"hidden_size": hidden, "num_layers": layers, "num_heads": heads, "dim": dim}
    rate = recordings.sampling_rate
    if isinstance(recordings, CodeRecordings):
        return ContrastiveConfig(
            reads="codes",
            sampling_rate=rate,
            num_codebooks=recordings.num_codebooks,
            codebook_size=recordings.codebook_size,
            **shape,
        )
    hop = max(1, round(0.02 * rate))
    n_fft = 1 << (3 * hop).bit_length()
    return ContrastiveConfig(sampling_rate=rate, hop=hop, n_fft=n_fft, bands=min(96, n_fft // 8), **shape)


def check_settings(
    negatives: str, steps: int, batch_size: int, learning_rate: float, held_out: float
) -> None:
    """Raise `ValueError` for settings of `train_embedder` that cannot work, before there are recordings."""
    if negatives not in NEGATIVES:
        raise ValueError(f"negatives={negatives!r} must be one of {', '.join(NEGATIVES)}")
    if steps < 1 or batch_size < 2 or not 0 < learning_rate < 1 or not 0 < held_out < 1:
        raise ValueError(
            f"steps={steps}, batch_size={batch_size}, learning_rate={learning_rate}, held_out={held_out}: wanted "
            "are at least 1 step and a batch of 2, and numbers between 0 and 1"
        )


def train_embedder(
    recordings: Recordings,
    config: ContrastiveConfig,
    *,
    negatives: str = "any",
    steps: int = 1500,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | None = None,
) -> _TrainedEmbedder:
    """Train an encoder to which two chunks of a recording are alike, and others are not.

    Args:
        recordings: what to learn from.
        config: shape of the encoder.
        negatives: what a chunk is told apart from: "any" other recording (the paper); or "same-prompt", so
            that what the prompt fixes is of no use to it and the embedding measures what the prompt leaves
            open.
        steps: optimiser steps.
        batch_size: recordings of a step, all different.
        learning_rate: at its peak.
        held_out: share of the recordings that the result is measured on; whole prompts where they are known.
        seed: of weights, chunks and split.
        device: torch device; default: the GPU when there is one.

    Raises:
        ValueError: settings out of range, too few recordings, or negatives of prompts that are not known.
        FloatingPointError: the loss is not finite.
    """
    check_settings(negatives, steps, batch_size, learning_rate, held_out)
    same_prompt = negatives == "same-prompt"
    groups = _groups(recordings.prompts, same_prompt)
    generator = torch.Generator().manual_seed(seed)
    train, test = _split(groups, held_out, generator)
    if min(_count(train), _count(test)) < 2:
        raise ValueError(
            f"{len(recordings)} recordings are too few: at least two to learn from and two to measure on are "
            f"needed (held_out={held_out})"
        )

    def draw(batch: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        if same_prompt:
            chosen, of_group = _draw_groups(train, batch, generator)
            return *recordings.pairs(chosen, generator), torch.tensor(of_group)
        everyone = [index for group in train for index in group]
        chosen = [everyone[i] for i in torch.randperm(len(everyone), generator=generator)[:batch].tolist()]
        return recordings.pairs(chosen, generator)

    embedder = train_contrastive(
        config, draw, steps=steps, batch=batch_size, learning_rate=learning_rate, seed=seed, device=device
    )
    if not same_prompt:
        test = [[index for group in test for index in group]]
    scores = []
    for group in test:
        chosen = group[:_MOST_HELD_OUT]
        scores += [retrieval_at_1(embedder, *recordings.pairs(chosen, generator))] * len(chosen)
    # One in m for each of a group's m.
    chance = len(test) / len(scores)
    return _TrainedEmbedder(embedder, sum(scores) / len(scores), chance, len(scores))


def _groups(prompts: Sequence[str | None], same_prompt: bool) -> list[list[int]]:
    """Recordings by prompt; those without one are groups of their own."""
    by_prompt: dict[object, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_prompt.setdefault(index if prompt is None else prompt, []).append(index)
    if not same_prompt:
        return list(by_prompt.values())
    groups = [group for group in by_prompt.values() if len(group) > 1]
    if len(groups) < 2:
        raise ValueError(
            "negatives='same-prompt' needs at least two prompts with several recordings each: train on what "
            "diverse-cfg generate wrote with --num-generations, on an evaluation's codes, or with negatives='any'"
        )
    return groups


def _split(
    groups: list[list[int]], held_out: float, generator: torch.Generator
) -> tuple[list[list[int]], list[list[int]]]:
    """Whole groups to learn from and to measure on; of a single one, its members."""
    if len(groups) == 1:
        groups = [[index] for index in groups[0]]
    order = torch.randperm(len(groups), generator=generator).tolist()
    wanted = max(2.0, held_out * _count(groups))
    test: list[list[int]] = []
    while order and _count(test) < wanted:
        test.append(groups[order.pop()])
    return [groups[index] for index in order], test


def _draw_groups(
    groups: list[list[int]], batch: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Different recordings of a few groups, at least two of each; and the group of each recording."""
    sizes = torch.tensor([float(len(group)) for group in groups])
    chosen: list[int] = []
    of_group: list[int] = []
    for number in torch.multinomial(sizes, len(groups), generator=generator).tolist():
        room = min(batch - len(chosen), _PER_GROUP)
        if room < 2:
            break
        group = groups[number]
        members = torch.randperm(len(group), generator=generator)[:room].tolist()
        chosen += [group[member] for member in members]
        of_group += [number] * len(members)
    return chosen, of_group


def _count(groups: Sequence[Sequence[int]]) -> int:
    return sum(map(len, groups))
