"""Reward functions for the trainer, called as TRL calls any reward function, with audio instead of text.

    reward(prompts=…, completions=…, num_generations=…, sampling_rate=…, codes=…, waveforms=…, **columns) ->
    list[float]

`completions` holds one waveform per clip (one grid of codes when nothing asked for audio). The rows of a
prompt are adjacent and complete. A function that declares `reads = "codes"` spares the decoding when no other
wants audio.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diverse_cfg.config import GuardConfig
from diverse_cfg.embeddings import Embedder, load_embedder
from diverse_cfg.functional.diversity import pairwise_cosine_distance


class DiversityReward:
    """r_i: mean embedding distance of a clip to the other clips of its prompt (arXiv 2410.06084).

    Args:
        embedder: E, or the id or folder of one.
        guards: see `GuardConfig`; none by default.
    """

    __name__ = "diversity"
    pairwise = True

    def __init__(self, embedder: Embedder | str, guards: GuardConfig | None = None):
        self.embedder = load_embedder(embedder) if isinstance(embedder, str) else embedder
        self.guards = guards or GuardConfig()
        self.embeddings: Tensor | None = None

    @property
    def reads(self) -> str:
        """ "codes" or "waveforms": what the embedder takes."""
        return getattr(self.embedder, "reads", "waveforms")

    def __call__(
        self,
        completions: Any = None,
        *,
        num_generations: int,
        sampling_rate: int,
        codes: Tensor | None = None,
        waveforms: Tensor | None = None,
        **_: Any,
    ) -> list[float]:
        """Rewards of N clips; also keeps their embeddings [N, D] for the prefix baseline."""
        inputs = codes if self.reads == "codes" else waveforms
        if inputs is None:
            inputs = torch.stack(list(completions))
        if len(inputs) % num_generations or num_generations < 2:
            raise ValueError(
                f"DiversityReward got {len(inputs)} clips in groups of {num_generations}: it needs whole "
                "groups of at "
                "least 2 clips per prompt"
            )
        self.embeddings = embed_clips(self.embedder, inputs, sampling_rate)
        distances = pairwise_cosine_distance(self.embeddings.unflatten(0, (-1, num_generations)))
        distances = self._guarded(distances, waveforms, num_generations)
        return (distances.sum(dim=-1) / (num_generations - 1)).flatten().tolist()

    def _guarded(self, distances: Tensor, waveforms: Tensor | None, num_generations: int) -> Tensor:
        if self.guards.distance_cap is not None:
            distances = distances.clamp(max=self.guards.distance_cap)
        if self.guards.silence_dbfs is None and self.guards.max_clipping is None:
            return distances
        if waveforms is None:
            raise ValueError(
                "the guards silence_dbfs and max_clipping need audio: use an embedder that reads waveforms"
            )
        valid = valid_audio(waveforms, self.guards.silence_dbfs, self.guards.max_clipping)
        valid = valid.view(-1, num_generations).to(distances.device)
        return distances * valid[:, :, None] * valid[:, None, :]


def embed_clips(embedder: Embedder, inputs: Tensor, sampling_rate: int) -> Tensor:
    """Embeddings [N, D] in float32, checked: one finite row per clip.

    Raises:
        ValueError: wrong shape, or a clip (named) without a finite embedding.
    """
    with torch.no_grad():
        embeddings = embedder.embed(inputs, sampling_rate=sampling_rate)
    name = getattr(embedder, "name", type(embedder).__name__)
    if embeddings.ndim != 2 or len(embeddings) != len(inputs):
        raise ValueError(
            f"embedder {name!r} returned shape {tuple(embeddings.shape)} for {len(inputs)} clips; it must "
            "return [B, D]"
        )
    embeddings = embeddings.float()
    broken = ~torch.isfinite(embeddings).all(dim=1)
    if bool(broken.any()):
        raise ValueError(f"embedder {name!r} returned non-finite values for clip {int(broken.nonzero()[0])}")
    return embeddings


def valid_audio(waveforms: Tensor, silence_dbfs: float | None, max_clipping: float | None) -> Tensor:
    """Which clips are audible and not clipped [N].

    Args:
        waveforms: [N, L] or [N, 2, L].
        silence_dbfs: RMS level (dB relative to full scale) below which a clip counts as silent.
        max_clipping: largest share of samples at full scale.
    """
    flat = waveforms.flatten(1).float()
    valid = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    if silence_dbfs is not None:
        level = 20 * flat.square().mean(dim=1).sqrt().clamp(min=1e-10).log10()
        valid &= level >= silence_dbfs
    if max_clipping is not None:
        valid &= (flat.abs() >= 0.999).float().mean(dim=1) <= max_clipping
    return valid


def is_pairwise(reward_func: Any) -> bool:
    """Whether a reward depends on the other clips of its prompt, and so needs the diversity estimator."""
    return bool(getattr(reward_func, "pairwise", False))


def reads_waveforms(reward_func: Any) -> bool:
    """Whether a reward function needs decoded audio; one that does not say so does."""
    return getattr(reward_func, "reads", "waveforms") != "codes"


def checked(
    reward_func: Callable, name: str, prompts: list[str], is_async: bool, context: dict[str, Any]
) -> Callable:
    """Wrap a reward function: hand it the audio `context`, and refuse non-finite rewards by name.

    TRL turns None into NaN and then drops NaN from the sum, so a broken reward would silently train something
    else.
    """

    def verified(rewards: Any) -> list[float | None]:
        rewards = rewards.tolist() if isinstance(rewards, Tensor) else list(rewards)
        for index, reward in enumerate(rewards):
            if reward is not None and not math.isfinite(reward):
                prompt = prompts[index] if index < len(prompts) else "?"
                raise ValueError(
                    f"reward function {name!r} returned {reward} for clip {index} (prompt {prompt!r}); "
                    "return None if "
                    "it does not apply, or fix the function"
                )
        return rewards

    if is_async:

        async def wrapper(**kwargs):
            return verified(await reward_func(**kwargs, **context))
    else:

        def wrapper(**kwargs):
            return verified(reward_func(**kwargs, **context))

    return wrapper
