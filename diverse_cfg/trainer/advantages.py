"""From rewards to one advantage per code, by way of the guards that look at more than one clip's audio.

The diversity reward of a clip contains its distances to the others, so it takes the pairwise estimator of
`functional.diversity`; every other reward takes the ordinary leave-one-out baseline. `diversity_coef` (β)
multiplies the former, `reward_weights` the latter.

`DiversityReward` itself masks silent, clipped and noisy clips. Here distances are weighted by what another
reward function says of both clips, and the limits that depend on the base model are measured once, before the
first step.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diverse_cfg.config import CFGDiversityConfig, GuardConfig
from diverse_cfg.functional.diversity import diversity_advantages
from diverse_cfg.functional.policy_gradient import leave_one_out_advantages
from diverse_cfg.functional.prefix_baseline import (
    RidgeStatistics,
    code_segments,
    explained_variance,
    predict_values,
    prefix_rewards,
    ridge_statistics,
    segment_advantages,
    update_ridge,
)
from diverse_cfg.rewards import (
    checked,
    embedding_distances,
    is_async,
    is_pairwise,
    mask_pairs,
    mean_distances,
)

CALIBRATION_PROMPTS = 16
PREFIX_FRACTIONS = (0.13, 0.27, 0.40, 0.60, 0.80)

Embed = Callable[[Tensor], Tensor]
"""Codes [N, K, F] -> embeddings [N, D], from those codes alone."""


class CrossGuards:
    """The guards of a run that look at other rewards, and their limits.

    Args:
        guards: the settings.
        names: of the reward functions, in the order of the rewards' columns.
        reward_funcs: the functions.

    Raises:
        ValueError: a guard names a function that is not there.
    """

    def __init__(self, guards: GuardConfig, names: list[str], reward_funcs: list[Callable]):
        self.guards = guards
        self.names = names
        self.reward_funcs = reward_funcs
        self.gate_threshold: float | None = None
        for field in ("gate", "quality_product"):
            name = getattr(guards, field)
            if name is not None and name not in names:
                raise ValueError(
                    f"guards.{field}={name!r} is none of the reward functions ({', '.join(names) or 'none'})"
                )

    def weights(self, rewards: Tensor) -> Tensor | None:
        """What each clip's distances are multiplied by [N], from its rewards [N, F]; None if nothing is."""
        if self.guards.gate is None and self.guards.quality_product is None:
            return None
        weights = torch.ones(len(rewards), device=rewards.device)
        if self.guards.gate is not None:
            assert self.gate_threshold is not None  # measured before the first step
            weights = weights * (rewards[:, self.names.index(self.guards.gate)] >= self.gate_threshold)
        if self.guards.quality_product is not None:
            quality = rewards[:, self.names.index(self.guards.quality_product)]
            if not bool((quality >= 0).all()):
                raise ValueError(
                    f"guards.quality_product={self.guards.quality_product!r} needs rewards ≥ 0, got "
                    f"{quality.min().item():g}: shift or scale that reward"
                )
            weights = weights * quality
        return weights

    def apply(self, rewards: Tensor, pairwise: list[bool]) -> Tensor:
        """This process's rewards [N, F] with the diversity columns guarded."""
        weights = self.weights(rewards)
        if weights is None:
            return rewards
        rewards = rewards.clone()
        for index, is_diversity in enumerate(pairwise):
            if is_diversity:
                distances = self.reward_funcs[index].distances
                rewards[:, index] = mean_distances(mask_pairs(distances, weights)).flatten().to(rewards)
        return rewards

    def measure_distances(self, reward_func: Any, embeddings: Tensor, num_generations: int) -> None:
        """Set the cap of the diversity reward from embeddings [N, D] of the unguided base's clips."""
        assert self.guards.distance_quantile is not None
        distances = embedding_distances(reward_func.embedder, embeddings, num_generations)
        pairs = torch.triu_indices(num_generations, num_generations, offset=1)
        seen = distances[:, pairs[0], pairs[1]].flatten().float()
        reward_func.distance_cap = seen.quantile(self.guards.distance_quantile).item()

    def measure_gate(self, prompts: list[str], context: dict[str, Any]) -> None:
        """Set the threshold of the gate from clips of the guided teacher."""
        name = self.guards.gate
        assert name is not None
        function = self.reward_funcs[self.names.index(name)]
        call = checked(function, name, prompts, context)
        clips = list(context["waveforms"])
        rewards = call(prompts=prompts, completions=clips)
        if is_async(function):
            rewards = asyncio.run(rewards)
        seen = torch.tensor([reward for reward in rewards if reward is not None])
        if not len(seen):
            raise ValueError(
                f"guards.gate={name!r} gave none of the teacher's clips a reward: leave the gate off"
            )
        self.gate_threshold = seen.quantile(self.guards.gate_quantile).item()


class PrefixBaseline:
    """Online regression of a clip's diversity advantage on the beginnings of the clip.

    Of several diversity rewards the sum is predicted, from embeddings of the first.

    Args:
        num_frames: T.
        gae_lambda: λ of the segment-wise estimate; 1 is unbiased.
        delays: of the model's codebooks, in decoder steps [K].
        all_reduce: sums a tensor over the processes.
    """

    def __init__(
        self,
        num_frames: int,
        gae_lambda: float,
        delays: Sequence[int],
        all_reduce: Callable[[Tensor], Tensor],
    ):
        frames = sorted({round(fraction * num_frames) for fraction in PREFIX_FRACTIONS})
        self.frames = [frame for frame in frames if 1 <= frame < num_frames]
        if not self.frames:
            raise ValueError(f"prefix_baseline needs clips of at least 2 frames, got {num_frames}")
        self.num_frames = num_frames
        self.gae_lambda = gae_lambda
        self.delays = delays
        self.all_reduce = all_reduce
        self.statistics: RidgeStatistics | None = None

    def __call__(
        self, advantages: Tensor, embeddings: Tensor, codes: Tensor, embed: Embed
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages per code, and how much each prefix explains.

        Args:
            advantages: of the whole clips [P, G].
            embeddings: of the whole clips [N, D].
            codes: [N, K, T].
            embed: embeds prefixes.

        Returns:
            Advantages [N, K, T], and metrics.
        """
        prefixes = torch.stack([embed(codes[..., :frames]) for frames in self.frames], dim=1)
        groups = advantages.shape
        features = prefix_rewards(prefixes.unflatten(0, groups), embeddings.unflatten(0, groups))
        # Predict first, learn afterwards: a regression that has seen these clips would be biased.
        values = predict_values(self.statistics, features)
        explained = explained_variance(values, advantages)
        new = ridge_statistics(features, advantages)
        summed = RidgeStatistics(self.all_reduce(new.gram), self.all_reduce(new.moments))
        self.statistics = update_ridge(self.statistics, summed)

        segments = code_segments(self.frames, self.num_frames, self.delays)
        per_segment = segment_advantages(values, advantages, self.gae_lambda).flatten(0, 1)
        metrics = {
            f"prefix_baseline/explained_variance_{frames}": value
            for frames, value in zip(self.frames, explained.tolist(), strict=True)
        }
        return per_segment[:, segments.to(per_segment.device)], metrics

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint needs."""
        return {} if self.statistics is None else self.statistics._asdict()

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from a checkpoint."""
        self.statistics = RidgeStatistics(state["gram"], state["moments"]) if state else None


class Advantages:
    """Turns the rewards of a generation batch into advantages.

    Args:
        args: the run's settings.
        reward_funcs: in the order of the rewards' columns.
        reward_weights: one per function; the pairwise ones are 1 (their weight is `args.diversity_coef`).
        delays: of the model's codebooks, in decoder steps [K].
        prefix: variance reducer of the pairwise rewards, or None.
    """

    def __init__(
        self,
        args: CFGDiversityConfig,
        reward_funcs: list[Callable],
        reward_weights: Tensor,
        delays: Sequence[int],
        prefix: PrefixBaseline | None = None,
    ):
        self.reward_funcs = reward_funcs
        self.delays = delays
        self.prefix = prefix
        self.diversity_codebooks = args.diversity_codebooks
        self.pairwise = [is_pairwise(reward_func) for reward_func in reward_funcs]
        self.coefs = [
            args.diversity_coef if pairwise else float(weight)
            for pairwise, weight in zip(self.pairwise, reward_weights, strict=True)
        ]
        # The policy gradient averages over the student's clips, the distillation over all.
        self.student_share = 1 - args.teacher_fraction if args.rollout_source == "mix" else 1.0
        self.wanted = any(self.coefs) and args.rollout_source != "teacher"

    def __call__(
        self, rewards: Tensor, codes: Tensor, num_generations: int, from_teacher: Tensor, embed: Embed
    ) -> tuple[Tensor, dict[str, float]]:
        """Advantages with all coefficients applied, and what is worth logging.

        Args:
            rewards: of this process's clips [N, F]; NaN where a function does not apply.
            codes: [N, K, T].
            num_generations: G.
            from_teacher: rows that the student did not sample [N]; they get no policy gradient.
            embed: embeds the beginnings of the clips, for the prefix baseline.

        Returns:
            Advantages [N, K, T], and metrics.
        """
        advantages = torch.zeros(codes.shape, device=codes.device)
        metrics: dict[str, float] = {}
        groups = rewards.to(codes.device).float().unflatten(0, (-1, num_generations))
        diverse = [index for index, pairwise in enumerate(self.pairwise) if pairwise]
        for index, (pairwise, coef) in enumerate(zip(self.pairwise, self.coefs, strict=True)):
            if not (self.wanted and coef) or index in diverse[1:]:
                continue
            column = groups[..., diverse].sum(-1) if pairwise else groups[..., index]
            estimate = diversity_advantages(column) if pairwise else _leave_one_out(column)
            if pairwise and self.prefix is not None:
                embeddings = self.reward_funcs[index].embeddings
                per_code, metrics = self.prefix(estimate, embeddings, codes, embed)
            else:
                per_code = estimate.flatten()[:, None, None]
            if pairwise and self.diversity_codebooks is not None:
                # The n-th codebook of a channel is delayed by n steps.
                reached = (torch.tensor(self.delays) < self.diversity_codebooks).to(advantages)
                per_code = per_code * reached[:, None]
            advantages += coef * per_code
        advantages[from_teacher] = 0
        return advantages / self.student_share, metrics

    def earned(self, rewards: Tensor) -> Tensor:
        """What the objective counts of the rewards [N, F]: Σ coefficient · reward [N]; 0 where one does not apply."""
        coefs = rewards.new_tensor(self.coefs if self.wanted else [0.0] * len(self.coefs))
        return (rewards * coefs).nansum(dim=1)

    def reward_metrics(self, rewards: Tensor, num_generations: int, from_teacher: Tensor) -> dict[str, float]:
        """The student's diversity, and its variance within prompts: all that the policy gradient has.

        Of several diversity rewards, that of the first; TRL logs the mean of each.

        Args:
            rewards: of all processes [N, F].
            num_generations: G.
            from_teacher: rows that do not count [N].
        """
        metrics: dict[str, float] = {}
        groups = rewards[~from_teacher].float().unflatten(0, (-1, num_generations))
        for index, pairwise in enumerate(self.pairwise):
            if pairwise and len(groups) and not metrics:
                column = groups[..., index]
                metrics["reward/diversity"] = column.mean().item()
                if num_generations > 1:
                    metrics["reward/diversity_variance"] = column.var(dim=1).mean().item()
        return metrics


def _leave_one_out(rewards: Tensor) -> Tensor:
    """Leave-one-out advantages [P, G]; a clip without a reward (NaN) has none and counts for no other."""
    missing = rewards.isnan()
    if not bool(missing.any()):
        return leave_one_out_advantages(rewards)
    known = (~missing).sum(dim=1, keepdim=True)
    mean_of_others = (rewards.nansum(dim=1, keepdim=True) - rewards) / (known - 1)
    return torch.where(missing | (known < 2), 0, rewards - mean_of_others)
