"""Classifier-free guidance on logits: the teacher of the distillation."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Self

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


def guidance_schedule(
    schedule: str | Sequence[float], guidance_scale: float, num_frames: int
) -> tuple[float, ...]:
    """γ of every frame t, with u = t / (T − 1) the place in the clip.

    | schedule | γ(u) |
    |---|---|
    | "constant" | γ |
    | "linear" | γ + (1 − γ)·u: all of it at the start, none at the end |
    | "cosine" | 1 + (γ − 1)·(1 + cos πu) / 2 |
    | "interval A B" | γ for A ≤ u ≤ B, else 1 (guidance in an interval, arXiv 2404.07724) |
    | numbers | one per frame, as they are |

    Args:
        schedule: its name, or T numbers.
        guidance_scale: γ.
        num_frames: T.

    Raises:
        ValueError: an unknown schedule, an interval that is none in [0, 1], or another number of frames.
    """
    if not isinstance(schedule, str):
        if len(schedule) != num_frames:
            raise ValueError(f"guidance_schedule has {len(schedule)} numbers, the clip {num_frames} frames")
        return tuple(float(scale) for scale in schedule)
    places = [frame / max(num_frames - 1, 1) for frame in range(num_frames)]
    match schedule.split():
        case ["constant"]:
            return (guidance_scale,) * num_frames
        case ["linear"]:
            return tuple(guidance_scale + (1 - guidance_scale) * u for u in places)
        case ["cosine"]:
            return tuple(1 + (guidance_scale - 1) * (1 + math.cos(math.pi * u)) / 2 for u in places)
        case ["interval", *ends]:
            try:
                first, last = map(float, ends)
            except ValueError:
                first, last = 1.0, 0.0
            if not 0 <= first <= last <= 1:
                raise ValueError(
                    f"guidance_schedule={schedule!r} must name two places in the clip, such as 'interval 0 0.5'"
                )
            return tuple(guidance_scale if first <= u <= last else 1.0 for u in places)
    raise ValueError(
        f"guidance_schedule={schedule!r} must be constant, linear, cosine, 'interval A B', or one number per frame"
    )


@dataclass(frozen=True)
class GuidanceRange:
    """The guidance scales that one student learns, and is told (arXiv 2210.03142).

    Args:
        knots: γ in rising order, at least two; what lies between them is interpolated.
        listed: whether the knots alone are drawn, instead of all that lies between the first and the last.
    """

    knots: tuple[float, ...]
    listed: bool = False

    @classmethod
    def of(cls, value: Any) -> Self:
        """Read `{"low": 1, "high": 5}`, which gets five evenly spaced knots and the reference, or a list of γ.

        Raises:
            ValueError: other names, or not two different numbers of at least 1.
        """
        listed = not isinstance(value, Mapping)
        ends: list[Any] = list(value) if listed else [value.get("low"), value.get("high")]
        numbers = all(isinstance(x, Real) and not isinstance(x, bool) and 1 <= x < math.inf for x in ends)
        named = listed or value.keys() == {"low", "high"}
        if not named or not numbers or len(set(ends)) < 2 or not (listed or ends[0] < ends[1]):
            raise ValueError(
                f"guidance_scale={value!r} must be a number, {{low: 1, high: 5}} with 1 ≤ low < high, or a list of at "
                "least two different numbers ≥ 1"
            )
        if not listed:
            low, high = ends
            # More would learn each from fewer prompts.
            ends = [low + (high - low) * knot / 4 for knot in range(5)] + [min(max(3.0, low), high)]
        return cls(tuple(sorted({float(x) for x in ends})), listed)

    @property
    def reference(self) -> float:
        """γ of a player that tells none: the paper's 3, or the nearest to it above 1 that is trained."""
        return min((knot for knot in self.knots if knot > 1), key=lambda knot: abs(knot - 3))

    def draw(self, number: float) -> float:
        """γ of a uniform random number in [0, 1)."""
        if self.listed:
            return self.knots[int(number * len(self.knots))]
        return self.knots[0] + number * (self.knots[-1] - self.knots[0])

    def require(self, guidance_scale: Any, name: str = "student_guidance") -> float:
        """γ as a number, if the student was trained with such.

        Raises:
            ValueError: it is none, or outside of the range.
        """
        number = isinstance(guidance_scale, Real) and not isinstance(guidance_scale, bool)
        if not number or not self.knots[0] <= guidance_scale <= self.knots[-1]:
            raise ValueError(
                f"{name}={guidance_scale!r} must be a number from {self.knots[0]:g} to {self.knots[-1]:g}, the γ that "
                "the student was trained for"
            )
        return float(guidance_scale)


def adaptive_guidance(schedule: str) -> tuple[float, int] | None:
    """(ε, n) of the schedule "adaptive ε n", None of another: γ until prompt and null prompt agree, 1 from then on.

    They agree in a step whose total variation, ½·Σ|p_cond − p_uncond| in its mean over codebooks, is below ε; after n
    such steps in a row no null row is computed any more (Adaptive Guidance, arXiv 2312.12487, which compares by the
    cosine).

    Raises:
        ValueError: ε not in (0, 1], or n below 1.
    """
    name, *numbers = schedule.split() or [""]
    if name != "adaptive":
        return None
    try:
        threshold, steps = float(numbers[0]), int(numbers[1])
    except (ValueError, IndexError):
        threshold, steps = 0.0, 0
    if len(numbers) != 2 or not 0 < threshold <= 1 or steps < 1:
        raise ValueError(
            f"guidance_schedule={schedule!r} must name a total variation in (0, 1] and steps, such as 'adaptive 0.1 5'"
        )
    return threshold, steps


def total_variation(cond: Tensor, uncond: Tensor) -> Tensor:
    """½·Σ|p − q| of two distributions, given as logits [..., V] → [...]."""
    return (cond.softmax(-1) - uncond.softmax(-1)).abs().sum(-1) / 2


def before_agreement(variation: Tensor, threshold: float, steps: int) -> Tensor:
    """Which steps are guided under "adaptive ε n": those before which there were no n steps in a row below ε.

    Args:
        variation: of every step, in its mean over codebooks [N, S].
        threshold: ε.
        steps: n.

    Returns:
        [N, S], true up to and with the step that is the n-th.
    """
    run, guided = torch.zeros_like(variation[:, 0]), []
    for step in variation.unbind(1):
        guided.append(run < steps)
        run = torch.where(run < steps, torch.where(step < threshold, run + 1, 0), run)
    return torch.stack(guided, dim=1)


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
