"""Guards that need more than one clip's audio: another reward, or a measurement before training.

`DiversityReward` itself masks silent, clipped and noisy clips. Here distances are weighted by what another
reward function says of both clips, and the limits that depend on the base model are measured once, before the
first step.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diverse_cfg.config import GuardConfig
from diverse_cfg.rewards import (
    checked,
    embed_clips,
    embedding_distances,
    is_async,
    mask_pairs,
    mean_distances,
)

CALIBRATION_PROMPTS = 16


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

    def measure_distances(self, reward_func: Any, inputs: Tensor, num_generations: int, rate: int) -> None:
        """Set the cap of the diversity reward from clips of the unguided base."""
        assert self.guards.distance_quantile is not None
        embeddings = embed_clips(reward_func.embedder, inputs, rate)
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
