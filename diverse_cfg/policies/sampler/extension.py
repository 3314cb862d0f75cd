"""Clips that begin with given codes: one model after another, and longer music than a model was trained on, window
by window."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from diverse_cfg.policies.policy import Policy, as_policy, listed
from diverse_cfg.policies.sampler.draws import SamplingSettings
from diverse_cfg.policies.sampler.rollout import MAX_SECONDS, decode_codes, fast_generate
from diverse_cfg.policies.sampler.weights import RolloutWeights
from diverse_cfg.policies.takes import codec_digest
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
            listed(prompts),
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


def drawn_first(num_frames: int, first_frames: int, delays: Sequence[int]) -> Tensor:
    """Which codes of a clip [K, T] the first model of a hybrid draws: those of its n decoder steps, t + d_k < n."""
    return torch.arange(num_frames) + torch.tensor(delays)[:, None] < first_frames


def check_hybrid(
    first: nn.Module, model: nn.Module, first_frames: int, num_frames: int, rollout_backend: str = "fast"
) -> None:
    """Raise `ValueError` unless one model can go on from the codes of the other."""
    if (
        isinstance(first_frames, bool)
        or not isinstance(first_frames, int)
        or not 0 < first_frames < num_frames
    ):
        raise ValueError(
            f"first_frames={first_frames!r} must be an integer of at least 1 and below the clip's {num_frames} frames"
        )
    if rollout_backend != "fast":
        raise ValueError(f"a first model needs rollout_backend='fast', not {rollout_backend!r}")
    ours, theirs = as_policy(model), as_policy(first)
    if codec_digest(first) != codec_digest(model) or theirs.delays != ours.delays:
        raise ValueError(
            "the first model plays the codes of another codec, which mean nothing to the second: take two models of "
            "one base"
        )


def hybrid_generate(
    first: nn.Module,
    model: nn.Module,
    prompts: str | Sequence[str],
    *,
    processor: Any,
    num_frames: int,
    first_frames: int,
    first_guidance_scale: float = 1.0,
    guidance_scale: float | Sequence[float] = 1.0,
    negative_prompt: str | None = None,
    adaptive_guidance: tuple[float, int] | None = None,
    student_guidance: float | None = None,
    decode: bool = True,
    first_weights: RolloutWeights | None = None,
    weights: RolloutWeights | None = None,
    **options: Any,
) -> Clips:
    """Let one model begin and another go on, such as the base and then its student (arXiv 2503.10637).

    The first draws the codes of n decoder steps (`drawn_first`), the second is fed with them once and draws the rest.
    A model that follows itself plays what it plays alone. A clip takes n + D decoder rows of the first and T + D of
    the second (D: the longest delay), each twice where it is guided.

    Args:
        first: the model that begins.
        model: the model that goes on; of the same codec.
        prompts: see `fast_generate`.
        processor: of both.
        num_frames: T, of the whole clip.
        first_frames: n.
        first_guidance_scale: γ of the first model.
        guidance_scale: γ of the second.
        negative_prompt: for whichever of the two is guided.
        adaptive_guidance: likewise.
        student_guidance: that the second is told, of a student of a range.
        decode: also make waveforms.
        first_weights: a snapshot of the first model to sample from.
        weights: one of the second.
        options: others of `fast_generate`.

    Raises:
        ValueError: n that is no part of the clip, two codecs, or see `fast_generate`.
    """
    check_hybrid(first, model, first_frames, num_frames, options.get("rollout_backend", "fast"))
    guided = SamplingSettings(first_guidance_scale).guided, SamplingSettings(guidance_scale).guided
    guidance = {"negative_prompt": negative_prompt, "adaptive_guidance": adaptive_guidance}
    begun = fast_generate(
        first,
        prompts,
        processor=processor,
        num_frames=first_frames,
        guidance_scale=first_guidance_scale,
        decode=False,
        weights=first_weights,
        **(guidance if guided[0] else {}),
        **options,
    )
    known = drawn_first(first_frames, first_frames, as_policy(model).delays).to(begun.codes.device)
    clips = fast_generate(
        model,
        prompts,
        processor=processor,
        num_frames=num_frames,
        guidance_scale=guidance_scale,
        decode=decode,
        weights=weights,
        prefix=begun.codes.masked_fill(~known, -1),
        student_guidance=student_guidance,
        **(guidance if guided[1] or not guided[0] else {}),
        **options,
    )
    return replace(clips, decoder_rows=clips.decoder_rows + begun.decoder_rows)
