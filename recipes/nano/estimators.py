"""Signal and noise of the diversity's policy gradient, estimator by estimator, on one student.

    python recipes/nano/estimators.py --student runs/nano/quality      # → results/estimators.csv and README.md

Every estimator sees the same clips. With g the gradient of one batch, in the metric of Adam (every parameter divided by
the root of its own root mean square), and g₀ that of the unbiased estimator with a prefix baseline:

    signal = E⟨g, g₀'⟩ / |E g₀|   over *different* batches,      noise = √E|g|²,      batches = (noise / signal)²

*batches* is how many of them it takes until the mean gradient is as much signal as noise: what an estimator is worth.
Errors are jackknife standard errors over batches.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from pages import write_section
from torch import Tensor
from tqdm import trange

from diverse_cfg.assets import nano_path
from diverse_cfg.atomic import replacing
from diverse_cfg.embeddings import load_embedder
from diverse_cfg.functional.diversity import diversity_advantages, diversity_reward
from diverse_cfg.functional.prefix_baseline import (
    code_segments,
    predict_values,
    prefix_rewards,
    ridge_statistics,
    segment_advantages,
    update_ridge,
)
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from diverse_cfg.prompts import load_prompts
from diverse_cfg.trainer.objective import LossSettings, student_terms

HERE = Path(__file__).parent
FRAMES, PREFIXES, DELAYS = 75, (10, 20, 30, 45, 60), (0, 1, 2, 3)
PROMPTS, GENERATIONS = 8, 8
LEARNING = 8  # first batches only teach the prefix baseline
REFERENCE = "prefix baseline"
LOSS = LossSettings("reverse_kl", 0.5, 1.0, 0.2, None, DELAYS, 256)


def estimators(rewards: Tensor, values: Tensor, shape: torch.Size) -> dict[str, Tensor]:
    """Advantages per code [N, K, T] of every estimator, from rewards [P, G] and prefix values [P, G, M]."""
    whole = diversity_advantages(rewards)
    segments = code_segments(PREFIXES, FRAMES, DELAYS)
    every = {
        "paper": whole.flatten()[:, None, None].expand(shape),
        REFERENCE: segment_advantages(values, whole, 1.0).flatten(0, 1)[:, segments],
        "λ = 0.6": segment_advantages(values, whole, 0.6).flatten(0, 1)[:, segments],
    }
    first = torch.arange(shape[1])[:, None] == 0
    leading = {f"{name}, codebook 0": advantages * first for name, advantages in every.items()}
    return every | leading | {f"{REFERENCE}, codebooks 1–3": every[REFERENCE] * ~first}


def gradients(student: str, batches: int, seed: int) -> dict[str, Tensor]:
    """Gradients of the policy-gradient loss [batches, parameters]; the student is not trained."""
    model = load_policy(student).eval()
    policy = as_policy(model)
    policy.freeze()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    tokenizer, weights = load_processor(student).tokenizer, RolloutWeights.from_model(model)
    encoder = load_embedder(str(nano_path("reward-encoder")))
    captions = list(load_prompts(str(nano_path("prompts")), split="train")["prompt"])
    generator = torch.Generator().manual_seed(seed)
    statistics, kept = None, {}
    for batch in trange(LEARNING + batches, unit="batch"):
        chosen = torch.randperm(len(captions), generator=generator)[:PROMPTS].tolist()
        condition = encode_text(model, tokenizer, [captions[i] for i in chosen for _ in range(GENERATIONS)])
        clips = sample_codes(model, condition, FRAMES, seed=2**20 * seed + batch, weights=weights)
        codes = clips.codes
        groups = (PROMPTS, GENERATIONS)
        whole = encoder.embed(codes).unflatten(0, groups)
        beginnings = torch.stack([encoder.embed(codes[..., :frames]) for frames in PREFIXES], dim=1)
        features = prefix_rewards(beginnings.unflatten(0, groups), whole)
        rewards, values = diversity_reward(whole), predict_values(statistics, features)
        statistics = update_ridge(statistics, ridge_statistics(features, diversity_advantages(rewards)), 0.98)
        if batch < LEARNING:
            continue
        for name, advantages in estimators(rewards, values, codes.shape).items():
            loss = student_terms(policy, replace(clips, advantages=advantages), LOSS)[0].loss
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            flat = [g.flatten() for g in found if g is not None]
            kept.setdefault(name, []).append(torch.cat(flat))
    return {name: torch.stack(rows) for name, rows in kept.items()}


def compare(found: dict[str, Tensor]) -> list[dict[str, str | float]]:
    """Signal, noise and batches of every estimator, with jackknife errors."""
    reference = found[REFERENCE]
    metric = reference.square().mean(dim=0).sqrt()
    metric = (metric + 1e-3 * metric.mean()).rsqrt()
    own = _products(reference * metric, reference * metric)
    rows = []
    for name, each in found.items():
        products = _products(each * metric, reference * metric)
        squares = (each * metric).square().sum(dim=1).double().numpy()
        estimates = _estimates(products, own, squares, np.arange(len(squares)))
        left_out = [np.delete(np.arange(len(squares)), b) for b in range(len(squares))]
        leaves = np.array([_estimates(products, own, squares, rest) for rest in left_out])
        errors = np.sqrt((len(leaves) - 1) * leaves.var(axis=0))
        rows.append(
            {"estimator": name}
            | dict(zip(("signal", "noise", "signal_to_noise"), estimates, strict=True))
            | dict(zip(("signal_se", "noise_se", "signal_to_noise_se"), errors, strict=True))
            | {"batches": estimates[2] ** -2}
        )
    return rows


def _products(left: Tensor, right: Tensor) -> np.ndarray:
    return (left @ right.T).double().numpy()


def _estimates(products, own, squares, chosen) -> tuple[float, float, float]:
    """Signal, noise and their ratio from the batches `chosen`; products of a batch with itself are left out."""
    pick, count = np.ix_(chosen, chosen), len(chosen)

    def between(matrix):
        part = matrix[pick]
        return (part.sum() - np.trace(part)) / (count * (count - 1))

    signal = between(products) / np.sqrt(max(between(own), 1e-12))
    noise = np.sqrt(squares[chosen].mean())
    return signal, noise, signal / noise


def to_markdown(rows: list[dict[str, str | float]]) -> str:
    """Signal and noise in units of the reference's signal."""
    [unit] = [float(row["signal"]) for row in rows if row["estimator"] == REFERENCE]
    lines = ["| estimator | signal | noise | batches until as much signal as noise |", "|---|---|---|---|"]
    for row in rows:
        signal, error, noise = (float(row[key]) / unit for key in ("signal", "signal_se", "noise"))
        batches = f"{row['batches']:.0f}" if signal > 2 * error else "–"
        lines.append(f"| {row['estimator']} | {signal:.2f} ± {error:.2f} | {noise:.1f} | {batches} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", required=True, help="folder of a student with β = 0")
    parser.add_argument("--batches", type=int, default=64, help=f"of {PROMPTS} prompts × {GENERATIONS} clips")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "estimators.csv")
    parser.add_argument("--page", type=Path, default=HERE / "README.md", help="has the section `estimators`")
    arguments = parser.parse_args(argv)
    rows = compare(gradients(arguments.student, arguments.batches, arguments.seed))
    with replacing(arguments.output) as temporary, temporary.open("w", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({k: v if isinstance(v, str) else f"{v:.4g}" for k, v in row.items()})
    write_section(arguments.page, "estimators", to_markdown(rows))
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
