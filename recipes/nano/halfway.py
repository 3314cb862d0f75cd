"""Half way between two students: their weights interpolated, their logits averaged, or their clips mixed.

    python recipes/nano/halfway.py --output runs/nano/experiment      # → results/experiment/halfway; then report.py

Why is a merge less diverse than the straight line between its parents? If weights were to blame, averaging the logits
of both parents at every step would not be.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from diverse_cfg.assets import nano_path
from diverse_cfg.embeddings import load_embedder
from diverse_cfg.evaluation.generations import Player
from diverse_cfg.evaluation.results import Results, SystemResult, mean_estimate
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.functional.diversity import diversity_reward, unit_embeddings
from diverse_cfg.nano.judge import AttributeJudge
from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.sampler.decoders import EagerDecoder
from diverse_cfg.policies.sampler.draws import SamplingSettings, keyed_noise
from diverse_cfg.policies.sampler.loop import DecodeLoop
from diverse_cfg.policies.sampler.rollout import decode_codes

RECORDED = Path(__file__).parent / "results" / "experiment"
FRAMES, GENERATIONS, PROMPTS_AT_ONCE = 75, 8, 8
QUALITY, DIVERSE, LINE = "quality student", "diversity student", "straight line"


class AveragedLogits(EagerDecoder):
    """Several decoders that read the same codes; the mean of their logits is drawn from."""

    def __init__(self, decoders: Sequence[EagerDecoder]):
        self.decoders, first = decoders, decoders[0]
        self.adaptive, self.agreed, self.null_rows = first.adaptive, first.agreed, first.null_rows

    def step(self, ids: Tensor, step: int) -> Tensor:
        logits = [decoder.step(ids, step) for decoder in self.decoders]
        return torch.stack(logits).mean(dim=0)


@torch.no_grad()
def sample(players: Sequence[Player], prompts: Sequence[str], seed: int, first_clip: int = 0) -> Tensor:
    """Codes [P · G, K, T] drawn from the mean of the players' logits."""
    first = players[0]
    condition = encode_text(first.model, first.processor.tokenizer, prompts).repeat_interleave(GENERATIONS)
    loop = DecodeLoop(first.weights, condition, len(condition), FRAMES, SamplingSettings(), mode="eager")
    assert isinstance(loop.decoder, EagerDecoder)
    others = [
        EagerDecoder(player.weights, len(condition), loop.context, condition, 1.0) for player in players[1:]
    ]
    loop.decoder = AveragedLogits([loop.decoder, *others])
    clips = range(first_clip, first_clip + len(condition))
    loop.run(keyed_noise(seed, clips, len(loop.delays), FRAMES, first.weights.shape.vocab_size))
    steps = [loop.codes[delay : delay + FRAMES, :, codebook] for codebook, delay in enumerate(loop.delays)]
    return torch.stack(steps).permute(2, 0, 1)


def play(players: Sequence[Player], prompts: Sequence[str], seed: int) -> tuple[Tensor, np.ndarray]:
    """Embeddings [P, G, D] under the held-out encoder, and mean adherence [P]."""
    encoder = load_embedder(nano_path("eval-encoder"))
    judge = AttributeJudge.from_pretrained(nano_path("judge"))
    rate, embeddings, adherence = players[0].sampling_rate, [], []
    for start in tqdm(range(0, len(prompts), PROMPTS_AT_ONCE), leave=False):
        part = prompts[start : start + PROMPTS_AT_ONCE]
        waveforms = decode_codes(players[0].model, sample(players, part, seed, start * GENERATIONS)).float()
        embeddings.append(encoder.embed(waveforms, rate).unflatten(0, (len(part), GENERATIONS)))
        repeated = [prompt for prompt in part for _ in range(GENERATIONS)]
        heard = np.nan_to_num(judge.adherence(waveforms, rate, repeated)["mean"])
        adherence.append(heard.reshape(len(part), GENERATIONS).mean(1))
    return torch.cat(embeddings), np.concatenate(adherence)


def mixed_clips(first: Tensor, second: Tensor) -> np.ndarray:
    """Mean cosine distance of two clips [P] that each come from either student with probability ½."""
    between = 1 - unit_embeddings(first) @ unit_embeddings(second).transpose(1, 2)
    within = [diversity_reward(embeddings).mean(1) for embeddings in (first, second)]
    return (sum(within) / 4 + between.mean((1, 2)) / 2).numpy()


def half_way(
    quality: str, diverse: str, prompts: Sequence[str], seed: int
) -> dict[str, dict[str, np.ndarray]]:
    """System → metric → value per prompt, for the students of one training seed."""
    parents = [Player(((student, 1.0),)) for student in (quality, diverse)]
    merge = Player(((quality, 0.5), (diverse, 0.5)))
    teams = {QUALITY: parents[:1], DIVERSE: parents[1:], "weights": [merge], "logits": parents}
    played = {name: play(team, prompts, seed) for name, team in teams.items()}
    cells = {
        name: {"diversity_heldout": diversity_reward(embeddings).mean(1).numpy(), "adherence": adherence}
        for name, (embeddings, adherence) in played.items()
    }
    cells[LINE] = {metric: (cells[QUALITY][metric] + cells[DIVERSE][metric]) / 2 for metric in cells[QUALITY]}
    cells["clips"] = cells[LINE] | {"diversity_heldout": mixed_clips(played[QUALITY][0], played[DIVERSE][0])}
    return cells


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", default="runs/nano/experiment", help="of experiment.py")
    parser.add_argument("--quality", default="beta-0", help="arm")
    parser.add_argument("--diverse", default="beta-80", help="arm")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of training")
    parser.add_argument("--sampling-seed", type=int, default=2, help="which no sweep has used")
    parser.add_argument("--recorded", type=Path, default=RECORDED)
    arguments = parser.parse_args(argv)
    prompts = Results.load(arguments.recorded / "test").prompts
    found = []
    for seed in arguments.seeds:
        students = [
            str(Path(arguments.output) / arm / f"seed-{seed}")
            for arm in (arguments.quality, arguments.diverse)
        ]
        found.append(half_way(*students, prompts, arguments.sampling_seed))
        means = {
            name: round(float(cells["diversity_heldout"].mean()), 4) for name, cells in found[-1].items()
        }
        tqdm.write(f"seed {seed}: diversity {means}")
    rows = []
    for name in found[0]:
        cells: dict[str, Any] = {
            metric: np.stack([each[name][metric] for each in found], axis=1) for metric in found[0][name]
        }
        estimates = {metric: mean_estimate(values) for metric, values in cells.items()}
        system = System(name, single(name) * len(found))
        rows.append(SystemResult(system, metrics=estimates, cells=cells))
    settings = {"num_generations": GENERATIONS, "seeds": [arguments.sampling_seed]}
    Results(prompts, rows, settings).save(arguments.recorded / "halfway")


if __name__ == "__main__":
    main()
