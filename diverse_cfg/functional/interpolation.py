"""Weighted sums of weights: tensors of several models, and LoRA factors."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def weighted_sum(
    tensors: Sequence[Tensor], weights: Sequence[float], dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weighted sum of one tensor of several models.

        θ = Σ_i w_i · θ_i                                        (model soups, arXiv 2203.05482; 2410.06084)

    Args:
        tensors: of one shape and device.
        weights: one finite number per tensor; negative ones extrapolate.
        dtype: of the result, float32 or float64. Half precision would lose what fine-tuning changed (1e-4
            relative), so that bfloat16 inputs are widened too.

    Returns:
        A new tensor; the sum itself is taken in float64, so that what the models share comes out bit for bit.

    Raises:
        ValueError: nothing to sum, counts differ, a weight is not finite, all are 0, or dtype is half precision.
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    _check_weights(len(tensors), weights)
    total = tensors[0].double() * weights[0]
    for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
        total.add_(tensor.double(), alpha=weight)
    return total.to(dtype)


class LoraFactors(NamedTuple):
    """One layer's low-rank update ΔW = scaling · B A."""

    lora_a: Tensor
    """A [r, in]."""
    lora_b: Tensor
    """B [out, r]."""
    scaling: float
    """lora_alpha / r in plain LoRA."""


def lora_delta(lora_a: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    """The weight update that LoRA factors stand for.

        ΔW = scaling · B A                                                               (arXiv 2106.09685)

    Args:
        lora_a: A [r, in].
        lora_b: B [out, r].
        scaling: lora_alpha / r in plain LoRA.

    Returns:
        ΔW [out, in], float32 (float64 if an input is).

    Raises:
        ValueError: the factors do not fit each other, or scaling is not finite.
    """
    _check_factors(lora_a, lora_b, scaling)
    dtype = torch.promote_types(torch.promote_types(lora_a.dtype, lora_b.dtype), torch.float32)
    return scaling * (lora_b.to(dtype) @ lora_a.to(dtype))


def concatenate_lora(factors: Sequence[LoraFactors], weights: Sequence[float]) -> LoraFactors:
    """One adapter that is exactly the weighted sum of several, at the sum of their ranks.

        Σ_i w_i·s_i·B_i A_i = [w_1 s_1 B_1, w_2 s_2 B_2, …] · [A_1; A_2; …]

    Averaging A and B separately is not this: it adds cross terms B_i A_j. Negative weights are exact too,
    since the weight goes into B alone (a square root in each factor would lose the sign).

    Args:
        factors: of the same layer, ranks may differ.
        weights: one finite number per adapter; a weight of exactly 0 drops its adapter.

    Returns:
        Factors with rank Σ r_i and scaling 1, float32 (float64 if an input is).

    Raises:
        ValueError: nothing to merge, counts differ, a weight is not finite, all are 0, or the layers' sizes
            differ.
    """
    _check_weights(len(factors), weights)
    for lora_a, lora_b, scaling in factors:
        _check_factors(lora_a, lora_b, scaling)
    sizes = {(len(lora_b), lora_a.shape[1]) for lora_a, lora_b, _ in factors}
    if len(sizes) > 1:
        raise ValueError(f"the factors belong to layers of different sizes [out, in]: {sorted(sizes)}")
    dtype = torch.float32
    for lora_a, lora_b, _ in factors:
        dtype = torch.promote_types(torch.promote_types(lora_a.dtype, lora_b.dtype), dtype)
    used = [(factor, weight) for factor, weight in zip(factors, weights, strict=True) if weight != 0]
    return LoraFactors(
        torch.cat([factor.lora_a.to(dtype) for factor, _ in used], dim=0),
        torch.cat([weight * factor.scaling * factor.lora_b.to(dtype) for factor, weight in used], dim=1),
        1.0,
    )


def _check_weights(count: int, weights: Sequence[float]) -> None:
    if count == 0 or len(weights) != count:
        raise ValueError(f"need one weight for each of at least one model, got {len(weights)} for {count}")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights must be finite, got {list(weights)}")
    if not any(weights):
        raise ValueError(f"all weights are zero: {list(weights)}")


def _check_factors(lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
    if lora_a.ndim != 2 or lora_b.ndim != 2 or lora_b.shape[1] != len(lora_a):
        raise ValueError(
            f"need A [r, in] and B [out, r], got {tuple(lora_a.shape)} and {tuple(lora_b.shape)}"
        )
    if not math.isfinite(scaling):
        raise ValueError(f"scaling must be finite, got {scaling}")
