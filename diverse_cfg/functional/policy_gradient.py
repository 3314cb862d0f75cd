"""Policy gradient over codes: ordinary advantages, per-code ratios, REINFORCE and its clipped surrogate.

The losses are per code and to be minimised; the caller sums them and divides by the count it divides the
distillation loss by, so that the paper's β keeps its meaning.
"""

import torch
from torch import Tensor

from diverse_cfg.functional._checks import expand_per_code, promote, require_ndim, require_same_shape


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


def importance_ratios(logps: Tensor, old_logps: Tensor) -> Tensor:
    """Per-code importance ratios of the current policy to the one that sampled.

        ρ = π_θ(y_kt | y_<) / π_old(y_kt | y_<) = exp(log π_θ − log π_old)              (arXiv 1707.06347)

    Per code, never their product over the clip: over thousands of codes a rounding error of 0.1 nat is
    normal.

    Args:
        logps: log-probs under the current policy [N, K, T] (any shape).
        old_logps: log-probs recorded while sampling, same shape.

    Returns:
        Ratios, same shape; gradients flow into `logps` only.

    Raises:
        ValueError: shapes differ.
    """
    require_same_shape("logps", logps, "old_logps", old_logps)
    logps, old_logps = promote(logps, old_logps)
    return (logps - old_logps.detach()).exp()


def reinforce_loss(logps: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE per code, for samples of the current policy.

        loss_nkt = − A_n · log π_θ(y_nkt | y_<)                               (Williams 1992; arXiv
        2402.14740)

    Args:
        logps: [N, K, T].
        advantages: one per clip [N], or one per code [N, K, T]; no gradient flows into them.

    Returns:
        Loss [N, K, T].

    Raises:
        ValueError: `logps` is not [N, K, T], or the advantages are neither [N] nor [N, K, T].
    """
    logps, advantages = _per_code(advantages, logps)
    return -advantages * logps


def clipped_surrogate_loss(
    logps: Tensor,
    old_logps: Tensor,
    advantages: Tensor,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> Tensor:
    """PPO's clipped surrogate per code, for samples of a slightly older policy.

        loss_nkt = − min( ρ·A, clip(ρ, 1 − ε, 1 + ε_high)·A )                           (arXiv 1707.06347)

    At ρ = 1 its gradient is that of `reinforce_loss`.

    Args:
        logps: [N, K, T].
        old_logps: log-probs recorded while sampling [N, K, T].
        advantages: one per clip [N], or one per code [N, K, T]; no gradient flows into them.
        epsilon: ε, how far below 1 a ratio may matter.
        epsilon_high: ε_high, how far above 1; None takes `epsilon`.

    Returns:
        Loss [N, K, T].

    Raises:
        ValueError: shapes do not fit, or an epsilon is not positive.
    """
    low, high = clip_bounds(epsilon, epsilon_high)
    logps, advantages = _per_code(advantages, logps)
    ratios = importance_ratios(logps, old_logps)
    return -torch.minimum(ratios * advantages, ratios.clamp(low, high) * advantages)


def clip_bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The interval (1 − ε, 1 + ε_high) that ratios are clipped to; raises on values that make none."""
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0 < epsilon < 1 and 0 < high < float("inf")):
        raise ValueError(f"need 0 < epsilon < 1 and epsilon_high > 0, got {epsilon} and {high}")
    return 1 - epsilon, 1 + high


def _per_code(advantages: Tensor, logps: Tensor) -> tuple[Tensor, Tensor]:
    require_ndim("logps", logps, "N K T")
    logps, advantages = promote(logps, advantages)
    return logps, expand_per_code("advantages", advantages, logps)
