"""Merge weights: one number per expert, checked before anything is opened."""

import math
from collections.abc import Iterable, Sequence

_TOLERANCE = 1e-6


def resolve_weights(
    weights: float | Sequence[float] | None,
    num_experts: int,
    *,
    extrapolate: bool = False,
    unnormalized: bool = False,
) -> list[float]:
    """One weight per expert.

    Args:
        weights: None for the uniform average; a number λ for two experts, (1 − λ)·first + λ·second, the
            paper's LERP; or one number per expert.
        num_experts: how many experts there are.
        extrapolate: allow weights outside [0, 1].
        unnormalized: allow weights that do not sum to 1 (the differences from the base are then scaled).

    Raises:
        ValueError: the wrong number of weights, or weights that were not asked for.
    """
    if num_experts < 1:
        raise ValueError("there is nothing to merge: give at least one checkpoint")
    if weights is None:
        return [1 / num_experts] * num_experts
    if isinstance(weights, Iterable):
        resolved = [float(weight) for weight in weights]
    elif num_experts == 2:
        resolved = [1 - float(weights), float(weights)]
    else:
        raise ValueError(
            "a single merge weight is the weight of the second of two checkpoints, but there are "
            f"{num_experts}: give one weight per checkpoint"
        )
    if len(resolved) != num_experts:
        raise ValueError(f"got {len(resolved)} merge weights for {num_experts} checkpoints: give one each")
    if not all(math.isfinite(weight) for weight in resolved):
        raise ValueError(f"merge weights must be finite, got {resolved}")
    if not extrapolate and not all(-_TOLERANCE <= weight <= 1 + _TOLERANCE for weight in resolved):
        raise ValueError(
            f"merge weights {resolved} leave [0, 1]: pass extrapolate=True (--extrapolate) if meant so"
        )
    if not unnormalized and abs(sum(resolved) - 1) > _TOLERANCE:
        raise ValueError(
            f"merge weights {resolved} sum to {sum(resolved):g} instead of 1: pass unnormalized=True "
            "(--unnormalized) to scale the differences from the base"
        )
    return resolved


def parse_sweep(text: str) -> list[float]:
    """The weights of "start:stop:step", ends included: "0:1:0.05" is 0, 0.05 … 1.

    Raises:
        ValueError: not three numbers, or no number of steps that makes sense.
    """
    parts = text.split(":")
    try:
        start, stop, step = (float(part) for part in parts)
    except ValueError:
        raise ValueError(f"a sweep is written start:stop:step, e.g. 0:1:0.05, got {text!r}") from None
    if not (math.isfinite(start) and math.isfinite(stop) and step > 0 and stop >= start):
        raise ValueError(f"a sweep needs finite numbers, start <= stop and step > 0, got {text!r}")
    count = (stop - start) / step
    if count > 1000:
        raise ValueError(f"the sweep {text!r} has {count + 1:.0f} points: take a larger step")
    points = [round(start + index * step, 10) for index in range(math.floor(count + _TOLERANCE) + 1)]
    if abs(points[-1] - stop) > _TOLERANCE:
        raise ValueError(
            f"the sweep {text!r} does not reach {stop:g} in steps of {step:g}: change one of them"
        )
    return points
