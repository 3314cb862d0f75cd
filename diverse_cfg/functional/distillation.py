"""The objective as one loss: divergence to the guided teacher plus policy gradient, a chunk at a time.

Rows are decoder steps, M = N·S of them in row-major order, C of them in a chunk; a row has K cells. A chunk's
logits [C, K, V] exist once for the student and once for the teacher. Their gradient is known analytically as
soon as the weights of the cells are, so it is folded into the gradients of the hidden states [M, H] and of
the heads [K, V, H] at once and autograd never stores a distribution.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diverse_cfg.functional._checks import require_ndim, require_same_shape
from diverse_cfg.functional.codebooks import (
    apply_delay_pattern,
    num_decoder_steps,
    revert_delay_pattern,
    valid_cells,
)
from diverse_cfg.functional.divergence import DIVERGENCES, Divergence
from diverse_cfg.functional.guidance import expand_scale, guided_logits

_RowLogits = Callable[[slice], Tensor]
"""A slice of the M rows -> their logits [C, K, V]."""


@dataclass(frozen=True)
class GuidedTeacher:
    """A guided teacher by its hidden states, so that its logits need never exist all at once.

    Args:
        cond_hidden_states: output of the last norm under the prompt [N, S, H].
        uncond_hidden_states: the same under the null or negative prompt [N, S, H]; None when γ = 1.
        head_weights: the teacher's heads [K, V, H], without bias.
        guidance_scale: γ, a number, or a tensor that broadcasts to [N, K, T]. With one number the heads are
            applied once, to h_uncond + γ·(h_cond − h_uncond): they are linear.
    """

    cond_hidden_states: Tensor
    uncond_hidden_states: Tensor | None
    head_weights: Tensor
    guidance_scale: float | Tensor


class DistillationTerms(NamedTuple):
    """What one pass over the codes yields."""

    loss: Tensor
    """Weighted sum of all terms, a scalar; the only field that carries a gradient."""
    divergences: Tensor | None
    """Divergence per code in nats [N, K, T]; None without a teacher."""
    logps: Tensor
    """Log-prob of every code [N, K, T]."""
    entropies: Tensor
    """Entropy of the student's distribution per code in nats [N, K, T]."""


def distillation_loss(
    hidden_states: Tensor,
    head_weights: Tensor,
    codes: Tensor,
    teacher: GuidedTeacher | None,
    *,
    divergence_weights: float | Tensor = 1.0,
    logp_weights: float | Tensor | None = None,
    old_logps: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delays: Sequence[int],
    divergence: str = "reverse_kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    chunk_size: int = 512,
) -> DistillationTerms:
    """Distillation and policy-gradient loss from hidden states, a chunk of the distributions at a time.

        loss = Σ_nkt u_nkt · D(p_nkt, q_nkt) + Σ_nkt w_nkt · log p_nkt(y_nkt)          (arXiv 2410.06084)

    D is the divergence from the guided teacher q, y the sampled codes. With u = 1/(N·K·T) and
    w = −β·A/(N·K·T), A from `diversity_advantages`, its gradient estimates that of −(Q + β·D(θ))/(K·T): the
    paper's objective, which sums over positions, with both terms divided by the same count, so that β keeps
    its meaning. With `old_logps` the second sum is PPO's clipped surrogate: see `_surrogate`.

    The weights are known before the pass, so a chunk's gradient with respect to its logits is too: see the
    table of `divergence`. Memory is that of a few chunks and of the gradients of hidden states and heads,
    instead of almost ten logits tensors [N, K, T, V] for autograd. Call it where the model's forward is wrapped (DDP,
    FSDP), so that the heads' gradient is seen. Only `loss` carries a gradient, once: no double backward.

    Args:
        hidden_states: the student's hidden states after the last norm [N, S, H].
        head_weights: the student's heads, stacked [K, V, H], without bias; with or without gradient.
        codes: y, sampled codes [N, K, T].
        teacher: None for the policy gradient alone.
        divergence_weights: u, a number, [N] or [N, K, T]. 0 leaves a code out.
        logp_weights: w, a number, [N] or [N, K, T]; None for distillation alone.
        old_logps: log-probs recorded while sampling [N, K, T]; None on the strictly on-policy path.
        epsilon: ε of the clipped surrogate.
        epsilon_high: ε_high; None takes `epsilon`.
        delays: of the codebooks, in decoder steps [K].
        divergence: a name of `DIVERGENCES`; "reverse_kl" is the paper's.
        alpha: the student's share in the mixture of `generalized_jsd`.
        temperature: divides the student's and the teacher's logits, in divergence, log-probs and entropies.
        chunk_size: decoder steps per chunk.

    Returns:
        The loss, and divergences, log-probs and entropies per code.

    Raises:
        ValueError: shapes do not fit one another, an unknown divergence, or a number out of range.
    """
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be a finite number above 0, got {temperature}")
    _clip_bounds(epsilon, epsilon_high)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 decoder step, got {chunk_size}")
    _check_loss_shapes(hidden_states, head_weights, codes, delays)
    # float32, or float64 when a model in float64 asks for it
    dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, head_weights.dtype), torch.float32)
    like = codes.new_empty(codes.shape, dtype=dtype)
    guided = teacher and _teacher_logits(teacher, head_weights, hidden_states.shape[1], like, delays)
    if old_logps is not None:
        require_same_shape("old_logps", old_logps, "codes", codes)

    def by_row(name: str, values: float | Tensor) -> Tensor:
        return _to_rows(_expand_per_code(name, values, like), 0.0, delays)

    cells = _Rows(
        codes=_to_rows(codes, 0, delays),
        divergence_weights=by_row("divergence_weights", divergence_weights),
        logp_weights=None if logp_weights is None else by_row("logp_weights", logp_weights),
        old_logps=None if old_logps is None else by_row("old_logps", old_logps),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        divergence=DIVERGENCES[divergence],
        alpha=alpha,
        temperature=temperature,
    )
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, head_weights)]
    loss, *per_cell = _ChunkedTerms.apply(
        hidden_states.flatten(0, 1), head_weights, guided, cells, wanted, chunk_size
    )

    def by_codes(values: Tensor) -> Tensor:
        return revert_delay_pattern(values.unflatten(0, hidden_states.shape[:2]).mT, codes.shape[2], delays)

    return DistillationTerms(loss, *(None if values is None else by_codes(values) for values in per_cell))


def _surrogate(
    logps: Tensor,
    weights: Tensor,
    old_logps: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Tensor]:
    """REINFORCE per code, or PPO's clipped surrogate for samples of a slightly older policy.

        w · log π_θ(y_nkt | y_<)                                              (Williams 1992; arXiv 2402.14740)
        max( w·ρ, w·clip(ρ, 1 − ε, 1 + ε_high) ),   ρ = π_θ / π_old                          (arXiv 1707.06347)

    with w = −A / count, to be minimised. At ρ = 1 both have the same slope. The ratio is per code, never the
    product over the clip: over thousands of codes a rounding error of 0.1 nat is normal.

    Args:
        logps: log-probs under the current policy, any shape.
        weights: w, the same shape.
        old_logps: log-probs recorded while sampling, the same shape; None on the strictly on-policy path.
        epsilon: ε, how far below 1 a ratio may matter.
        epsilon_high: ε_high, how far above 1; None takes `epsilon`.

    Returns:
        Value and slope, its derivative with respect to `logps`, both in their shape.

    Raises:
        ValueError: no interval around 1.
    """
    if old_logps is None:
        return weights * logps, weights
    low, high = _clip_bounds(epsilon, epsilon_high)
    ratios = (logps - old_logps).exp()
    values = torch.maximum(weights * ratios, weights * ratios.clamp(low, high))
    clipped = ((ratios > high) & (weights < 0)) | ((ratios < low) & (weights > 0))
    return values, torch.where(clipped, 0, weights * ratios)


def _clip_bounds(epsilon: float, epsilon_high: float | None) -> tuple[float, float]:
    """The interval (1 − ε, 1 + ε_high) that ratios are clipped to; raises on values that make none."""
    high = epsilon if epsilon_high is None else epsilon_high
    if not (0 < epsilon < 1 and 0 < high < float("inf")):
        raise ValueError(f"need 0 < epsilon < 1 and epsilon_high > 0, got {epsilon} and {high}")
    return 1 - epsilon, 1 + high


class _Rows(NamedTuple):
    """What is known of every code before the pass, per row [M, K]."""

    codes: Tensor
    divergence_weights: Tensor
    logp_weights: Tensor | None
    old_logps: Tensor | None
    epsilon: float
    epsilon_high: float | None
    divergence: Divergence
    alpha: float
    temperature: float


def _expand_per_code(name: str, values: float | Tensor, like: Tensor) -> Tensor:
    """Expand a number, or a value per clip [N] or per code, to the shape [N, K, T] of `like`; no gradient."""
    if not isinstance(values, Tensor):
        if not math.isfinite(values):
            raise ValueError(f"{name} must be finite, got {values}")
        return torch.full_like(like, values)
    if values.shape == like.shape[:1]:
        values = values[:, None, None].expand(like.shape)
    if values.shape != like.shape:
        raise ValueError(
            f"{name} must be one per clip [{len(like)}] or per code {list(like.shape)}, "
            f"got {list(values.shape)}"
        )
    return values.detach().to(like)


def _to_rows(values: Tensor, fill: float, delays: Sequence[int]) -> Tensor:
    """Values per code [N, K, T] -> per row [N·S, K], with `fill` where a row has no code."""
    grid = apply_delay_pattern(values, None, delays)[..., 1:]
    valid = valid_cells(values.shape[2], delays, device=values.device)
    return torch.where(valid, grid, fill).mT.flatten(0, 1)


class _ChunkedTerms(torch.autograd.Function):
    """Weighted sum of divergences and log-probs, with its gradient computed on the way forward."""

    @staticmethod
    def forward(ctx, hidden_states, head_weights, teacher, cells, wanted, chunk_size):
        # Autocast would take the heads' products to half precision, which guidance then amplifies.
        with torch.autocast(hidden_states.device.type, enabled=False):
            loss, per_cell, gradients = _chunked_pass(
                hidden_states, head_weights, teacher, cells, wanted, chunk_size
            )
        ctx.save_for_backward(*gradients)
        ctx.dtypes = hidden_states.dtype, head_weights.dtype
        ctx.mark_non_differentiable(*(values for values in per_cell if values is not None))
        return loss, *per_cell

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_loss, *_):
        gradients = [
            None if gradient is None else (gradient * grad_loss).to(dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *gradients, None, None, None, None


def _head_logits(rows: Tensor, head_weights: Tensor) -> Tensor:
    """Logits of rows [C, H] under heads [K, V, H]: one product, [C, K, V]."""
    num_codebooks, vocab_size, hidden_size = head_weights.shape
    return (rows @ head_weights.view(-1, hidden_size).mT).view(-1, num_codebooks, vocab_size)


def _chunked_pass(
    hidden_states: Tensor,
    head_weights: Tensor,
    teacher: _RowLogits | None,
    cells: _Rows,
    wanted: list[bool],
    chunk_size: int,
):
    want_hidden, want_heads = wanted
    dtype = cells.divergence_weights.dtype
    heads = head_weights.detach().to(dtype).contiguous()
    hidden_gradient = hidden_states.new_empty(hidden_states.shape, dtype=dtype) if want_hidden else None
    head_gradient = torch.zeros_like(heads) if want_heads else None
    logps, entropies = torch.empty_like(cells.divergence_weights), torch.empty_like(cells.divergence_weights)
    divergences = None if teacher is None else torch.empty_like(logps)

    for start in range(0, len(hidden_states), chunk_size):
        rows = slice(start, start + chunk_size)
        states = hidden_states[rows].to(dtype)
        student_logps = (_head_logits(states, heads).div_(cells.temperature)).log_softmax(dim=-1)
        probs = student_logps.exp()
        logps[rows] = student_logps.gather(-1, cells.codes[rows, :, None]).squeeze(-1)
        entropies[rows] = -torch.linalg.vecdot(probs, student_logps)
        slope = None
        if teacher is not None and divergences is not None:
            teacher_logps = (teacher(rows).to(dtype) / cells.temperature).log_softmax(dim=-1)
            divergences[rows], slope = cells.divergence(student_logps, teacher_logps, probs, cells.alpha)
            del teacher_logps
        del student_logps
        if not (want_hidden or want_heads):
            continue
        gradient = _logits_gradient(cells, rows, probs, slope, logps[rows]).flatten(1)
        if hidden_gradient is not None:
            torch.mm(gradient, heads.flatten(0, 1), out=hidden_gradient[rows])
        if head_gradient is not None:
            head_gradient.flatten(0, 1).addmm_(gradient.mT, states)

    loss = logps.new_zeros(())
    if divergences is not None:
        loss = loss + (cells.divergence_weights * divergences).sum()
    if cells.logp_weights is not None:
        loss = loss + _policy_terms(cells, slice(None), logps)[0].sum()
    return loss, (divergences, logps, entropies), (hidden_gradient, head_gradient)


def _logits_gradient(cells: _Rows, rows: slice, probs: Tensor, slope: Tensor | None, logps: Tensor) -> Tensor:
    """Gradient of the chunk's loss with respect to its logits [C, K, V]; overwrites `slope` and `probs`."""
    if slope is not None:
        slope.mul_(cells.divergence_weights[rows, :, None])
    if cells.logp_weights is not None:
        weights = _policy_terms(cells, rows, logps)[1][..., None]
        # d log p_c / d logits = onehot(c) − p
        of_logps = probs.mul_(-weights).scatter_add_(-1, cells.codes[rows, :, None], weights)
        slope = of_logps if slope is None else slope.add_(of_logps)
    if slope is None:
        return probs.zero_()
    return slope.div_(cells.temperature)


def _policy_terms(cells: _Rows, rows: slice, logps: Tensor) -> tuple[Tensor, Tensor]:
    """Values and slopes of the policy-gradient term of some rows."""
    assert cells.logp_weights is not None
    old_logps = None if cells.old_logps is None else cells.old_logps[rows]
    return _surrogate(logps, cells.logp_weights[rows], old_logps, cells.epsilon, cells.epsilon_high)


def _check_loss_shapes(
    hidden_states: Tensor, head_weights: Tensor, codes: Tensor, delays: Sequence[int]
) -> None:
    require_ndim("hidden_states", hidden_states, "N S H")
    require_ndim("head_weights", head_weights, "K V H")
    require_ndim("codes", codes, "N K T")
    num_rows, num_codebooks, num_frames = codes.shape
    num_steps = num_decoder_steps(num_frames, delays)
    if hidden_states.shape[:2] != (num_rows, num_steps):
        raise ValueError(
            f"codes {tuple(codes.shape)} need hidden_states [{num_rows}, {num_steps}, H] with "
            f"delays={tuple(delays)}, got {tuple(hidden_states.shape)}"
        )
    if head_weights.shape[::2] != (num_codebooks, hidden_states.shape[2]):
        raise ValueError(
            f"head_weights must be [{num_codebooks}, V, {hidden_states.shape[2]}] for these codes and "
            f"hidden_states, got {tuple(head_weights.shape)}"
        )


def _teacher_logits(
    teacher: GuidedTeacher, student_heads: Tensor, num_steps: int, like: Tensor, delays: Sequence[int]
) -> _RowLogits:
    """The function from rows to guided logits of a teacher given by its hidden states."""
    cond, uncond, scale = teacher.cond_hidden_states, teacher.uncond_hidden_states, teacher.guidance_scale
    if uncond is None:
        if isinstance(scale, Tensor) or scale != 1:
            raise ValueError(f"guidance_scale={scale} needs uncond_hidden_states (only 1 does without)")
        uncond = cond
    require_same_shape("cond_hidden_states", cond, "uncond_hidden_states", uncond)
    require_ndim("cond_hidden_states", cond, "N S H")
    require_ndim("the teacher's head_weights", teacher.head_weights, "K V H")
    if cond.shape[:2] != (len(like), num_steps):
        raise ValueError(
            f"cond_hidden_states must be [{len(like)}, {num_steps}, H] like the student's, "
            f"got {tuple(cond.shape)}"
        )
    if teacher.head_weights.shape != (*student_heads.shape[:2], cond.shape[2]):
        raise ValueError(
            f"the teacher's head_weights must be {(*student_heads.shape[:2], cond.shape[2])}, codebooks and "
            f"vocabulary as the student's, got {tuple(teacher.head_weights.shape)}"
        )
    cond, uncond = cond.detach().flatten(0, 1), uncond.detach().flatten(0, 1)
    heads = teacher.head_weights.detach().to(like.dtype).contiguous()
    if isinstance(scale, Tensor):
        scale = _to_rows(expand_scale(scale, like), 1.0, delays)

    def logits(rows: slice) -> Tensor:
        states = cond[rows].to(like.dtype), uncond[rows].to(like.dtype)
        if isinstance(scale, Tensor):
            return guided_logits(*(_head_logits(x, heads) for x in states), scale[rows])
        return _head_logits(guided_logits(*states, scale), heads)

    return logits
