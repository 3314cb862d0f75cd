"""Judge and embedders of the nano world, trained on rendered clips only.

* judge: log-mel CNN + semitone spectrum → instrument, tempo, register, key; hears real and coded clips (evaluation);
* reward encoder: contrastive, reads codes, so that training needs no decoding (reward);
* within encoder: as the reward encoder, but it only learnt to tell clips of the same attributes apart (experiment);
* evaluation encoder: contrastive, reads audio, other seed, features and shape (evaluation).
"""

from __future__ import annotations

import numpy as np
import torch
from data import Clips
from torch import nn
from tqdm import tqdm

from diverse_cfg.embeddings.contrastive import (
    ContrastiveConfig,
    ContrastiveEmbedder,
    retrieval_at_1,
    train_contrastive,
)
from diverse_cfg.nano.attributes import ATTRIBUTES
from diverse_cfg.nano.judge import AttributeJudge

IGNORE = -100


def targets_of(clips: Clips, indices) -> dict[str, torch.Tensor]:
    """Class indices per attribute [B]; −100 where the clip has none."""
    rows = [clips.attributes[i] for i in indices]
    return {
        name: torch.tensor([IGNORE if row[name] is None else classes.index(row[name]) for row in rows])
        for name, classes in ATTRIBUTES.items()
    }


def augmented(waveforms: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Level, a gentle random equaliser and a little noise: what a codec may change without changing the music."""
    count = len(waveforms)
    gain = torch.from_numpy(rng.uniform(0.4, 1.2, (count, 1))).float()
    spectrum = torch.fft.rfft(waveforms)
    knots = torch.from_numpy(rng.uniform(-0.5, 0.5, (count, 1, 12))).float()
    curve = nn.functional.interpolate(knots, spectrum.shape[1], mode="linear", align_corners=True)[:, 0].exp()
    level = torch.from_numpy(10 ** rng.uniform(-4.0, -2.2, (count, 1))).float()
    noise = torch.from_numpy(rng.standard_normal(waveforms.shape, dtype=np.float32)) * level
    return torch.fft.irfft(spectrum * curve, waveforms.shape[1]) * gain + noise


def train_judge(
    clips: Clips,
    held_out: Clips,
    decoded: dict[int, np.ndarray],
    seed: int,
    steps: int = 3000,
    batch: int = 32,
) -> AttributeJudge:
    """A judge of real clips, half of a batch, and of clips that went through the codec, the other half.

    Whatever a model plays has gone through the codec: a judge that never heard one mistakes its texture for notes.

    Args:
        decoded: clip → its samples [L] after the codec, int16.
    """
    torch.manual_seed(seed + 10)
    known = np.array(sorted(decoded))
    judge = AttributeJudge().train()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng([seed, 10])
    bar = tqdm(range(steps), desc="judge", unit="step")
    for _ in bar:
        real = rng.integers(len(clips), size=batch // 2)
        other = known[rng.integers(len(known), size=batch - batch // 2)]
        played = torch.from_numpy(np.stack([decoded[i] for i in other]).astype(np.float32) / 32767)
        index = np.concatenate([real, other])
        logits = judge(augmented(torch.cat([clips.waveforms(real), played]), rng))
        targets = targets_of(clips, index)
        loss = sum(nn.functional.cross_entropy(logits[k], targets[k], ignore_index=IGNORE) for k in targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    tqdm.write(
        "judge on held-out clips: "
        + ", ".join(f"{k} {v:.3f}" for k, v in judge_accuracy(judge, held_out).items())
    )
    return judge.eval()


def judge_accuracy(judge: AttributeJudge, clips: Clips, count: int = 600) -> dict[str, float]:
    """Accuracy per attribute on clips that have it."""
    index = np.linspace(0, len(clips) - 1, min(count, len(clips))).astype(int)
    found, targets = judge.classify(clips.waveforms(index), 16_000), targets_of(clips, index)
    return {
        name: float((found[name] == target.numpy())[target.numpy() != IGNORE].mean())
        for name, target in targets.items()
    }


def same_attributes(clips: Clips, smallest: int = 32) -> list[np.ndarray]:
    """Recordings grouped by instrument, tempo and register: what a prompt fixes is the same within a group."""
    groups: dict[tuple, list[int]] = {}
    for recording in range(len(clips) // 2):
        row = clips.attributes[2 * recording]
        groups.setdefault((row["instrument"], row["tempo"], row["register"]), []).append(recording)
    return [np.array(group) for group in groups.values() if len(group) >= smallest]


ENCODERS = {
    "reward-encoder": (ContrastiveConfig(reads="codes", patch=3), 20),
    "within-encoder": (ContrastiveConfig(reads="codes", patch=3), 20),
    "eval-encoder": (
        ContrastiveConfig(
            reads="waveforms", bands=80, n_fft=1024, hop=320, patch=4, hidden_size=80, num_layers=2
        ),
        21,
    ),
}
"""Settings of each embedder, and what is added to the seed."""


def train_encoder(name: str, clips: Clips, codes: np.ndarray, seed: int, steps: int) -> ContrastiveEmbedder:
    """An embedder; positives are the two clips of a recording (disjoint in time, same song and instrument)."""
    recordings, groups = len(clips) // 2, same_attributes(clips)
    sizes = torch.tensor([float(len(group)) for group in groups])

    def halves(chosen: np.ndarray) -> tuple[torch.Tensor, ...]:
        if name == "eval-encoder":
            return tuple(clips.waveforms(2 * chosen + half) for half in (0, 1))
        return tuple(torch.from_numpy(codes[2 * chosen + half].astype(np.int64)) for half in (0, 1))

    def draw(batch: int, generator: torch.Generator) -> tuple[torch.Tensor, ...]:
        if name != "within-encoder":
            return halves(torch.randint(recordings, (batch,), generator=generator).numpy())
        group = groups[int(torch.multinomial(sizes, 1, generator=generator))]
        return halves(group[torch.randperm(len(group), generator=generator)[:batch].numpy()])

    config, offset = ENCODERS[name]
    return train_contrastive(config, draw, steps=steps, seed=seed + offset, progress=name)


def retrieval(name: str, embedder: ContrastiveEmbedder, clips: Clips, codes: np.ndarray) -> float:
    """Share of 64 held-out clips whose nearest is the other half of their recording."""
    chosen = np.arange(64)
    if name == "eval-encoder":
        halves = [clips.waveforms(2 * chosen + half) for half in (0, 1)]
    else:
        halves = [torch.from_numpy(codes[2 * chosen + half].astype(np.int64)) for half in (0, 1)]
    return retrieval_at_1(embedder, *halves)
