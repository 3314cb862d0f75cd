"""Several LoRA adapters as one: their factors side by side, so that its product is the sum of their products.

    Σ_i w_i · s_i · B_i A_i = [w_1 s_1 B_1 … w_n s_n B_n] · [A_1; …; A_n]

PEFT calls it `cat`; its `linear` mixes the factors instead, which is another model (relative error near 1).
Each layer gets the sum of the ranks of the experts that adapt it, whatever their own ranks and targets are.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diverse_cfg.functional import interpolation
from diverse_cfg.merging.experts import Experts
from diverse_cfg.policies.checkpoints import AdapterCheckpoint
from diverse_cfg.policies.tensors import TensorSpec, write_safetensors


def write_adapter(
    experts: Experts,
    weights: Sequence[float],
    folder: Path,
    dtype: torch.dtype,
    like: AdapterCheckpoint | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors of the interpolated adapter.

    Args:
        experts: adapters of one base.
        weights: one number per expert.
        folder: an existing folder without these files.
        dtype: of the factors, at least float32.
        like: an expert whose scaling its layers keep, so that its factors (with weight 1) are stored to the
            bit. By default every scaling is 1.

    Raises:
        ValueError: an expert is not an adapter (nor their base), or changes more than LoRA factors can
            express.
    """
    terms: list[tuple[AdapterCheckpoint, float]] = []
    for checkpoint, weight in zip(experts.checkpoints, weights, strict=True):
        if weight == 0 or checkpoint is experts.reference:
            continue  # the base's own difference from itself is nothing
        if not isinstance(checkpoint, AdapterCheckpoint):
            raise ValueError(
                f"{checkpoint.source} is a full model, which no adapter can hold: use format='full'"
            )
        if checkpoint.replaced:
            raise ValueError(
                f"{checkpoint.source} replaces whole tensors ({next(iter(checkpoint.replaced))}), which "
                "LoRA factors cannot express: use format='full'"
            )
        terms.append((checkpoint, weight))
    if not terms:
        raise ValueError("every adapter has weight 0, so the merge is the base itself: use format='full'")
    if dtype not in (torch.float32, torch.float64):
        dtype = torch.float32  # factors are small, and rounding them would be multiplied
    ranks = {
        name: sum(c.rank(name) for c, _ in terms if name in c.factors)
        for name in experts.names
        if any(name in c.factors for c, _ in terms)
    }
    scalings = {name: like.scaling(name) if like and name in like.factors else 1 for name in ranks}
    _write_factors(terms, ranks, scalings, folder / "adapter_model.safetensors", dtype)
    _write_config(terms, ranks, scalings, folder / "adapter_config.json")


def _write_factors(
    terms: list[tuple[AdapterCheckpoint, float]],
    ranks: dict[str, int],
    scalings: dict[str, float],
    path: Path,
    dtype: torch.dtype,
) -> None:
    specs, owners = [], {}
    for name, rank in ranks.items():
        checkpoint = next(c for c, _ in terms if name in c.factors)
        lora_a, lora_b = checkpoint.factors[name]
        for half, shape in (("A", (rank, lora_a.shape[1])), ("B", (lora_b.shape[0], rank))):
            key = checkpoint.factor_key(name, half)
            specs.append(TensorSpec(key, dtype, shape))
            owners[key] = (name, half)

    def produce(key: str) -> Tensor:
        name, half = owners[key]
        adapted = [(c, w) for c, w in terms if name in c.factors]
        factors = [c.lora_factors(name, dtype) for c, _ in adapted]
        merged = getattr(
            interpolation.concatenate_lora(factors, [w / scalings[name] for _, w in adapted]),
            f"lora_{half.lower()}",
        )
        for (checkpoint, _), factor in zip(adapted, factors, strict=True):
            if not (factor.lora_a.isfinite().all() and factor.lora_b.isfinite().all()):
                raise ValueError(
                    f"{checkpoint.source} has NaN or infinite values in {name}: its training broke"
                )
        return merged

    write_safetensors(path, specs, produce)


def _write_config(
    terms: list[tuple[AdapterCheckpoint, float]],
    ranks: dict[str, int],
    scalings: dict[str, float],
    path: Path,
) -> None:
    config = json.loads((terms[0][0].folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    largest = max(modules.values())
    # α = r makes PEFT's scaling 1, where it is inside the factors. Modules are named in full, so that PEFT
    # adapts exactly those which have factors.
    alphas = {name.removesuffix(".weight"): rank * scalings[name] for name, rank in ranks.items()}
    config |= {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {module: rank for module, rank in modules.items() if rank != largest},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != largest},
        "target_modules": sorted(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": terms[0][0].lora.base_model_name_or_path,
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
