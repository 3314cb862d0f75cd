"""Longer music than a model was trained on, window by window: each begins with the end of what is there."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diverse_cfg.policies.policy import Policy, as_policy
from diverse_cfg.policies.sampler.rollout import MAX_SECONDS, decode_codes, fast_generate
from diverse_cfg.policies.sampler.weights import RolloutWeights
from diverse_cfg.types import Clips


def longest_window(policy: Policy) -> int:
    """Frames that a model samples at once: what it has positions for, at most 30 s."""
    return min(policy.max_steps - max(policy.delays), int(MAX_SECONDS * policy.frame_rate))


def extend(
    model: nn.Module,
    codes: Tensor,
    prompts: Sequence[str],
    *,
    processor: Any,
    num_frames: int,
    window: int | None = None,
    overlap: int | None = None,
    seed: int = 0,
    decode: bool = True,
    weights: RolloutWeights | None = None,
    **options: Any,
) -> Clips:
    """Continue clips with a sliding window, as AudioCraft does (its `extend_stride` is window − overlap).

    A decoder step of the overlap is computed again in the next window: T frames take about
    T · window / (window − overlap) decoder rows, in the memory of one window.

    Args:
        model: see `fast_generate`.
        codes: what the clips begin with [N, K, T0], such as `Clips.codes`.
        prompts: of the clips [N].
        processor: the model's processor or tokenizer.
        num_frames: T, of the whole clip.
        window: frames that are sampled at once, the overlap included; by default what the model has positions for,
            at most 30 s.
        overlap: frames that a window repeats; by default two fifths of it (12 s of 30).
        seed: window w has the random numbers of seed + w.
        decode: also make waveforms, of the whole clip at once.
        weights: see `fast_generate`.
        options: others of `fast_generate`.

    Returns:
        N clips; their first T0 frames are `codes`.

    Raises:
        ValueError: windows that do not overlap or do not move on, or a clip that is long enough already; and see
            `fast_generate`.
    """
    policy = as_policy(model)
    window = longest_window(policy) if window is None else window
    overlap = max(1, 2 * window // 5) if overlap is None else overlap
    if not 0 < overlap < window:
        raise ValueError(f"overlap={overlap} must be at least 1 frame and less than window={window}")
    if num_frames <= codes.shape[-1]:
        raise ValueError(
            f"num_frames={num_frames}: the clips have {codes.shape[-1]} frames already; ask for more"
        )
    weights = weights or RolloutWeights.from_model(model)
    rows, number = torch.zeros(len(codes), dtype=torch.long), 0
    while codes.shape[-1] < num_frames:
        begun = codes[..., -overlap:]
        sampled = min(window, begun.shape[-1] + num_frames - codes.shape[-1])
        clips = fast_generate(
            model,
            list(prompts),
            processor=processor,
            num_frames=sampled,
            seed=(seed + number) % 2**64,
            prefix=begun,
            decode=False,
            weights=weights,
            **options,
        )
        codes = torch.cat([codes.to(clips.codes.device), clips.codes[..., begun.shape[-1] :]], dim=-1)
        rows, number = rows + clips.decoder_rows, number + 1
    waveforms = decode_codes(model, codes) if decode else None
    return Clips(codes, policy.sampling_rate, prompts=list(prompts), waveforms=waveforms, decoder_rows=rows)
