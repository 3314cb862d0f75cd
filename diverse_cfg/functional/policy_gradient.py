"""Policy gradient over codes: ordinary advantages, and REINFORCE with its clipped surrogate.

The weights carry the count that the distillation loss is divided by, so that the paper's β keeps its meaning.
"""

import torch
from torch import Tensor

from diverse_cfg.functional._checks import promote, require_ndim


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """Advantages against the mean reward of the other generations of the prompt (RLOO).

        A_i = r_i − 1/(G − 1) · Σ_{j≠i} r_j = G/(G − 1) · (r_i − mean_j r_j)            (arXiv 2402.14740)

    For rewards that depend on one generation alone. The diversity reward depends on pairs: it has its own,
    `diversity.diversity_advantages`.

    Args:
        rewards: [P, G].

    Returns:
        Advantages [P, G], which sum to zero over a group.

    Raises:
        ValueError: wrong number of dimensions, or G < 2.
    """
    require_ndim("rewards", rewards, "P G")
    num_generations = rewards.shape[1]
    if num_generations < 2:
        raise ValueError(f"a leave-one-out baseline needs num_generations >= 2, got {num_generations}")
    (rewards,) = promote(rewards)
    return num_generations / (num_generations - 1) * (rewards - rewards.mean(dim=1, keepdim=True))


def surrogate(
    logps: Tensor,
    weights: Tensor,
    old_logps: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """REINFORCE per code, or PPO's clipped surrogate for samples of a slightly older policy.

        w · log π_θ(y_nkt | y_<)                                              (Williams 1992; arXiv 2402.14740)
        max( w·ρ, w·clip(ρ, 1 − ε, 1 + ε_high) ),   ρ = π_θ / π_old                          (arXiv 1707.06347)

    with w = −A / count, to be minimised. At ρ = 1 both have the same slope. The ratio is per code, never the
    product over the clip: over thousands of codes a rounding error of 0.1 nat is normal.

    Args:
        logps: log-probs under the current policy, any shape.
        weights: w, the same shape.
        old_logps: log-probs recorded while sampling, the same shape; None on the strictly on-policy path.
        epsilon: ε, how far below 1 a ratio may matter.
        epsilon_high: ε_high, how far above 1; None takes `epsilon`.

    Returns:
        Value and slope, its derivative with respect to `logps`, both in their shape.

    Raises:
        ValueError: see `clip_bounds`.
    """
    if old_logps is None:
        return weights * logps, weights
    low, high = clip_bounds(epsilon, epsilon_high)
    ratios = (logps - old_logps).exp()
    values = torch.maximum(weights * ratios, weights * ratios.clamp(low, high))
    clipped = ((ratios > high) & (weights < 0)) | ((ratios < low) & (weights > 0))
    return values, torch.where(clipped, 0, weights * ratios)


def clip_bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The interval (1 − ε, 1 + ε_high) that ratios are clipped to; raises on values that make none."""
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0 < epsilon < 1 and 0 < high < float("inf")):
        raise ValueError(f"need 0 < epsilon < 1 and epsilon_high > 0, got {epsilon} and {high}")
    return 1 - epsilon, 1 + high
