"""From logits to codes: filters, and draws whose randomness belongs to the clip and not to its batch.

A code is drawn by the Gumbel-max trick, written as a race: with E_v independent and exponential, the code of
the largest p_v / E_v is distributed as p. The race is run in two rounds, between groups of codes and within the
group that won, which needs about 2·√V numbers per code in place of V. They are made by a counter-based
generator (Philox) from (seed, sample id) alone: the clip is the same in every batch, order, process and backend,
and the global random state is never read.

Why not invert the cumulative distribution at one uniform number: sums are rounded differently in batches of
different size, and a draw whose uniform lies that close to any of the V boundaries comes out otherwise. A race
is decided otherwise only if its first two are that close, which is V times as rare.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor

# The exponential numbers' least: 0 would let codes of probability 0 win (0 / 0).
_LEAST = 2.0**-25


@dataclass(frozen=True)
class SamplingSettings:
    """How codes are drawn from logits, checked once; applied in the order of the fields, as `generate` does.

    Args:
        guidance_scale: γ of `uncond + γ·(cond − uncond)`; 1 samples the conditional model alone, at half the
            cost. T numbers are a schedule, γ of every frame.
        temperature: divides the logits; 0 takes the most likely code (greedy).
        top_k: keep this many codes (and those tied with the last); 0 keeps all.
        top_p: keep the most likely codes up to this probability mass; 1 keeps all.
        min_p: drop codes less likely than this fraction of the most likely one; 0 keeps all.
        adaptive_guidance: (ε, n), see `functional.guidance.adaptive_guidance`; None guides to the end.
    """

    guidance_scale: float | tuple[float, ...] = 1.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    adaptive_guidance: tuple[float, int] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.guidance_scale, Sequence) and not isinstance(self.guidance_scale, str):
            object.__setattr__(self, "guidance_scale", tuple(self.guidance_scale))
            for frame, scale in enumerate(self.guidance_scale):
                if isinstance(scale, bool) or not isinstance(scale, Real) or not 1 <= scale < math.inf:
                    raise ValueError(f"guidance_scale={scale!r} of frame {frame} must be a finite number ≥ 1")
        for name in ("guidance_scale", "temperature", "top_p", "min_p"):
            if isinstance(value := getattr(self, name), tuple):
                continue
            if isinstance(value, bool) or not isinstance(value, Real):
                raise ValueError(f"{name}={value!r} must be a number")
        if not isinstance(self.guidance_scale, tuple) and not 1 <= self.guidance_scale < math.inf:
            raise ValueError(
                f"guidance_scale={self.guidance_scale} must be a finite number ≥ 1: 1 samples the prompt "
                "alone, the paper's γ is 3, and clips without a prompt come from a null condition"
            )
        if not (math.isfinite(self.temperature) and (self.temperature == 0 or self.temperature >= 1e-6)):
            raise ValueError(
                f"temperature={self.temperature} must be 0 (greedy) or a finite number of at least 1e-6"
            )
        if isinstance(self.top_k, bool) or not isinstance(self.top_k, Integral) or self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be an integer ≥ 0 (0 keeps all codes)")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1 (1 keeps all codes)")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p={self.min_p} must be at least 0 and below 1 (0 keeps all codes)")
        if self.adaptive_guidance is not None:
            threshold, steps = self.adaptive_guidance
            if not (0 < threshold <= 1 and isinstance(steps, int) and steps >= 1) or not self.guided:
                raise ValueError(
                    f"adaptive_guidance={self.adaptive_guidance} must be a total variation in (0, 1] and a number of "
                    "steps, with guidance_scale above 1"
                )
            object.__setattr__(self, "adaptive_guidance", (float(threshold), steps))

    @property
    def guided(self) -> bool:
        """Whether null (or negative) rows are decoded beside the prompt's."""
        if isinstance(self.guidance_scale, tuple):
            return any(scale != 1 for scale in self.guidance_scale)
        return self.guidance_scale != 1

    @property
    def strongest(self) -> float:
        """The largest γ of a schedule."""
        return max(self.guidance_scale) if isinstance(self.guidance_scale, tuple) else self.guidance_scale

    @property
    def greedy(self) -> bool:
        """Whether no randomness is used."""
        return self.temperature == 0


def keyed_noise(
    seed: int, sample_ids: Sequence[int], num_codebooks: int, num_frames: int, vocab_size: int
) -> Tensor:
    """The random numbers of the given clips.

    Args:
        seed: of the run, any integer from 0 to 2⁶⁴ − 1.
        sample_ids: which clip of the run each row is, from 0 to 2⁶⁴ − 1. Trainers count on over steps.
        num_codebooks: K.
        num_frames: T.
        vocab_size: V.

    Returns:
        Independent exponential numbers of mean 1, float32 [N, K, T, A + B] on the CPU, for A groups of B codes
        (`group_sizes`). The first T frames of a longer table are the same.

    Raises:
        ValueError: a number that does not fit 64 bits.
    """
    require_64_bits("seed", seed)
    for sample_id in sample_ids:
        require_64_bits("sample id", sample_id)
    table = np.empty((len(sample_ids), num_frames, num_codebooks, sum(group_sizes(vocab_size))), np.float32)
    for row, sample_id in zip(table, sample_ids, strict=True):
        key = np.array([seed, sample_id], dtype=np.uint64)
        np.random.Generator(np.random.Philox(key=key)).random(dtype=np.float32, out=row)
    return torch.from_numpy(table).neg_().log1p_().neg_().clamp_(min=_LEAST).transpose(1, 2)


def group_sizes(vocab_size: int) -> tuple[int, int]:
    """A groups of B codes each, A·B = V, as even as V allows; group a has the codes a, a + A, a + 2·A, …"""
    width = next(size for size in range(math.isqrt(vocab_size), 0, -1) if vocab_size % size == 0)
    return vocab_size // width, width


def require_64_bits(name: str, value: int) -> None:
    """Raise unless a seed or sample id can be half of a key."""
    if not isinstance(value, Integral) or not 0 <= value < 2**64:
        raise ValueError(f"{name} {value} must be an integer from 0 to 2**64 - 1")


def sampling_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Tempered and filtered logits: their softmax is what a code is drawn from.

    Args:
        logits: [N, ..., V], already guided.
        settings: of the draw; with temperature 0 nothing is filtered.

    Returns:
        float32 [N, ..., V]; dropped codes are −inf.
    """
    logits = logits.float()
    if settings.greedy:
        return logits
    if settings.temperature != 1:
        logits = logits / settings.temperature
    if 0 < settings.top_k < logits.shape[-1]:
        logits = _keep_from(logits, _kth_largest(logits, settings.top_k))
    if settings.top_p < 1:
        ascending = _sorted(logits)
        dropped = ascending.softmax(-1).cumsum(-1) <= 1 - settings.top_p
        dropped[..., -1] = False
        logits = _keep_from(logits, ascending.gather(-1, dropped.sum(-1, keepdim=True)))
    if settings.min_p > 0:
        logits = _keep_from(logits, logits.amax(-1, keepdim=True) + math.log(settings.min_p))
    return logits


def draw(logits: Tensor, noise: Tensor, greedy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one code per distribution.

    Args:
        logits: [..., V], as `sampling_logits` returns them.
        noise: of `keyed_noise` [..., A + B].
        greedy: take the most likely code instead.

    Returns:
        Codes int64 [...]; their log-probabilities [...] (0 when greedy); and a total [...] that is finite
        exactly when the logits were usable, to be looked at once after the loop, since a look costs a
        synchronisation.
    """
    if greedy:
        total, codes = logits.max(-1)
        return codes, torch.zeros_like(total), total
    return race(logits.softmax(-1), noise)


def race(probabilities: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The code that wins an exponential race, in two rounds.

        group = argmax_a P_a / E_a,          P_a the probability of the codes a, a + A, a + 2·A, …
        code  = argmax_{v in group} p_v / E_{A + ⌊v / A⌋}

    so that code v wins with probability P_a · p_v / P_a = p_v.

    Args:
        probabilities: p [..., V], of sum 1; codes of probability 0 are never drawn.
        noise: E [..., A + B], exponential.

    Returns:
        As `draw`.
    """
    groups, width = group_sizes(probabilities.shape[-1])
    table = probabilities.unflatten(-1, (width, groups))
    masses = table.sum(-2)
    group = (masses / noise[..., :groups]).argmax(-1, keepdim=True)
    members = table.gather(-1, group.unsqueeze(-2).expand(*group.shape[:-1], width, 1)).squeeze(-1)
    member = (members / noise[..., groups:]).argmax(-1, keepdim=True)
    logps = members.gather(-1, member).log()
    return (member * groups + group).squeeze(-1), logps.squeeze(-1), masses.sum(-1)


def not_finite(name: str, step: int) -> str:
    """What to say when the logits of a clip are not finite."""
    return (
        f"the logits of {name} are not finite at step {step}: the weights are broken, or too large for their "
        "dtype (try float32)"
    )


def _keep_from(logits: Tensor, threshold: Tensor) -> Tensor:
    return logits.masked_fill(logits < threshold, -torch.inf)


def _on_numpy(logits: Tensor) -> bool:
    """NumPy's partition and sort are about ten times as fast as torch's on a CPU, but cannot be compiled."""
    return logits.device.type == "cpu" and not torch.compiler.is_compiling()


def _kth_largest(logits: Tensor, k: int) -> Tensor:
    if _on_numpy(logits):
        place = logits.shape[-1] - k
        return torch.from_numpy(np.partition(logits.numpy(), place, axis=-1)[..., place : place + 1])
    return logits.topk(k, dim=-1, sorted=False).values.amin(-1, keepdim=True)


def _sorted(logits: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(logits.numpy(), axis=-1)) if _on_numpy(logits) else logits.sort(-1).values
