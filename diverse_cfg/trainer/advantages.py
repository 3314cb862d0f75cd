"""From rewards to one advantage per code.

The diversity reward of a clip contains its distances to the others, so it takes the pairwise estimator of
`functional.diversity`; every other reward takes the ordinary leave-one-out baseline. `diversity_coef` (β) multiplies the
former, `reward_weights` the latter.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.functional.diversity import diversity_advantages
from diverse_cfg.functional.policy_gradient import leave_one_out_advantages
from diverse_cfg.rewards import is_pairwise
from diverse_cfg.types import Rollout


class Advantages:
    """Turns the rewards of a generation batch into advantages.

    Args:
        args: the run's settings.
        reward_funcs: in the order of the rewards' columns.
        reward_weights: one per function; the pairwise ones are 1 (their weight is `args.diversity_coef`).
    """

    def __init__(self, args: CFGDiversityConfig, reward_funcs: list[Callable], reward_weights: Tensor):
        self.reward_funcs = reward_funcs
        self.pairwise = [is_pairwise(reward_func) for reward_func in reward_funcs]
        self.coefs = [
            args.diversity_coef if pairwise else float(weight)
            for pairwise, weight in zip(self.pairwise, reward_weights, strict=True)
        ]
        # The policy gradient averages over the student's clips, the distillation over all.
        self.student_share = 1 - args.teacher_fraction if args.rollout_source == "mix" else 1.0
        self.wanted = any(self.coefs) and args.rollout_source != "teacher"

    def __call__(
        self, rewards: Tensor, rollout: Rollout, num_generations: int, from_teacher: Tensor, training: bool
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages with all coefficients applied, and what is worth logging.

        Args:
            rewards: of this process's clips [N, F]; NaN where a function does not apply.
            rollout: the clips [N, K, T].
            num_generations: G.
            from_teacher: rows that the student did not sample [N]; they get no policy gradient.
            training: False leaves the advantages at zero: an evaluation has nothing to follow.

        Returns:
            Advantages [N, K, T], and metrics.
        """
        advantages = torch.zeros(rollout.codes.shape, device=rollout.codes.device)
        metrics: dict[str, float] = {}
        groups = rewards.to(advantages.device).float().unflatten(0, (-1, num_generations))
        for index, (pairwise, coef) in enumerate(zip(self.pairwise, self.coefs, strict=True)):
            column = groups[..., index]
            if pairwise:
                metrics["reward/diversity"] = column.mean().item()
                if num_generations > 1:
                    metrics["reward/diversity_variance"] = column.var(dim=1).mean().item()
            if not (training and self.wanted and coef):
                continue
            estimate = diversity_advantages(column) if pairwise else _leave_one_out(column)
            advantages += coef * estimate.flatten()[:, None, None]
        advantages[from_teacher] = 0
        return advantages / self.student_share, metrics


def _leave_one_out(rewards: Tensor) -> Tensor:
    """Leave-one-out advantages [P, G]; a clip whose reward is missing (NaN) neither gets one nor counts for others."""
    missing = rewards.isnan()
    if not bool(missing.any()):
        return leave_one_out_advantages(rewards)
    known = (~missing).sum(dim=1, keepdim=True)
    mean_of_others = (rewards.nansum(dim=1, keepdim=True) - rewards) / (known - 1)
    return torch.where(missing | (known < 2), 0, rewards - mean_of_others)
