"""Classifier-free guidance on logits: the teacher of the distillation."""

import math

import torch
from torch import Tensor

from diverse_cfg.functional._checks import promote, require_same_shape


def guided_logits(cond: Tensor, uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guided logits.

        l_γ = l_uncond + γ · (l_cond − l_uncond)

    (arXiv 2410.06084, the teacher π_γ; arXiv 2306.05284 for MusicGen.) γ = 1 is no guidance and returns
    `cond` exactly, γ = 0 is the unconditional model. `uncond` may come from the null prompt or from a
    negative prompt.

    Args:
        cond: logits under the prompt [..., V].
        uncond: logits under the null or negative prompt [..., V].
        guidance_scale: γ, a number, or a tensor that broadcasts to the logits without their last dimension:
            [T] is a schedule over frames for logits [N, K, T, V], [N, 1, 1] one scale per clip,
            [N, K, T] one per code.

    Returns:
        Guided logits [..., V], float32 (float64 if an input is).

    Raises:
        ValueError: shapes differ, a number γ is not finite, or a tensor γ does not broadcast.
    """
    require_same_shape("cond", cond, "uncond", uncond)
    cond, uncond = promote(cond, uncond)
    if isinstance(guidance_scale, Tensor):
        guidance_scale = expand_scale(guidance_scale, cond[..., 0]).unsqueeze(-1)
    elif not math.isfinite(guidance_scale):
        raise ValueError(f"guidance_scale must be finite, got {guidance_scale}")
    elif guidance_scale == 1:
        return cond
    return uncond + guidance_scale * (cond - uncond)


def expand_scale(guidance_scale: Tensor, like: Tensor) -> Tensor:
    """Expand a tensor γ to one value per code, the shape of `like` (the logits without their vocabulary).

    Args:
        guidance_scale: γ, any shape that broadcasts.
        like: [...], such as [N, K, T].

    Returns:
        γ [...] in the dtype and on the device of `like`.

    Raises:
        ValueError: it does not broadcast.
    """
    try:
        return guidance_scale.to(like).expand(like.shape)
    except RuntimeError:
        raise ValueError(
            f"guidance_scale has shape {tuple(guidance_scale.shape)}, which does not broadcast to "
            f"{tuple(like.shape)}, the logits' shape without the vocabulary"
        ) from None


def interval_schedule(
    num_frames: int, guidance_scale: float, start: float = 0.0, stop: float = 1.0, outside: float = 1.0
) -> Tensor:
    """Guidance on a part of the clip only: a schedule over frames for `guided_logits`.

        γ_t = γ for start ≤ t / T < stop, and `outside` elsewhere

    Guidance acts mostly on the first part of a generation (arXiv 2404.07724 and 2312.12487 for diffusion).

    Args:
        num_frames: T, frames of the clip.
        guidance_scale: γ inside the interval.
        start: first guided frame, as a fraction of the clip.
        stop: end of the guided frames, as a fraction of the clip.
        outside: γ of the other frames; 1 is no guidance.

    Returns:
        γ_t [T], float32.

    Raises:
        ValueError: T < 1, or not 0 ≤ start < stop ≤ 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if not 0 <= start < stop <= 1:
        raise ValueError(
            f"need 0 <= start < stop <= 1 (fractions of the clip), got start={start}, stop={stop}"
        )
    position = torch.arange(num_frames, dtype=torch.float64) / num_frames
    inside = (position >= start) & (position < stop)
    return torch.where(inside, guidance_scale, outside).float()
