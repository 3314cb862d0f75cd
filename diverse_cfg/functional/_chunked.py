"""The chunks behind `divergence.chunked_distillation_loss`: logits come, give their gradient, and go.

Rows are decoder steps, M = N·S of them in row-major order, C of them in a chunk; a row has K cells. A chunk's
logits [C, K, V] exist once for the student and once for the teacher. Their gradient is known analytically as
soon as the weights of the cells are, so it is folded into the gradients of the hidden states [M, H] and of
the heads [K, V, H] at once and autograd never stores a distribution.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diverse_cfg.functional.codebooks import apply_delay_pattern, revert_delay_pattern, valid_cells
from diverse_cfg.functional.policy_gradient import clip_bounds

Divergence = Literal["reverse_kl", "forward_kl", "generalized_jsd"]

RowLogits = Callable[[slice], Tensor]
"""A slice of the M rows -> their logits [C, K, V]."""


class Cells(NamedTuple):
    """What is known of every code before the pass, per code [N, K, T] or, inside the pass, per row [M, K]."""

    codes: Tensor
    divergence_weights: Tensor
    logp_weights: Tensor | None
    old_logps: Tensor | None
    epsilon: float
    epsilon_high: float | None
    divergence: Divergence
    alpha: float
    temperature: float


def chunked_terms(
    hidden_states: Tensor,
    head_weights: Tensor,
    teacher: RowLogits | None,
    cells: Cells,
    audio_channels: int,
    chunk_size: int,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Loss, divergences, log-probs and entropies per code [N, K, T] of `cells` given per code."""
    num_frames = cells.codes.shape[2]
    per_row = cells._replace(
        codes=to_rows(cells.codes, 0, audio_channels),
        divergence_weights=to_rows(cells.divergence_weights, 0.0, audio_channels),
        logp_weights=None if cells.logp_weights is None else to_rows(cells.logp_weights, 0.0, audio_channels),
        old_logps=None if cells.old_logps is None else to_rows(cells.old_logps, 0.0, audio_channels),
    )
    wanted = [torch.is_grad_enabled() and tensor.requires_grad for tensor in (hidden_states, head_weights)]
    loss, divergences, logps, entropies = ChunkedTerms.apply(
        hidden_states.flatten(0, 1), head_weights, teacher, per_row, wanted, chunk_size
    )

    def by_codes(values: Tensor) -> Tensor:
        return revert_delay_pattern(
            values.unflatten(0, hidden_states.shape[:2]).mT, num_frames, audio_channels
        )

    return loss, None if divergences is None else by_codes(divergences), by_codes(logps), by_codes(entropies)


def to_rows(values: Tensor, fill: float, audio_channels: int) -> Tensor:
    """Values per code [N, K, T] -> per row [N·S, K], with `fill` where a row has no code."""
    _, num_codebooks, num_frames = values.shape
    grid = apply_delay_pattern(values, None, audio_channels)[..., 1:]
    valid = valid_cells(num_frames, num_codebooks, audio_channels, device=values.device)
    return torch.where(valid, grid, fill).mT.flatten(0, 1)


class ChunkedTerms(torch.autograd.Function):
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


def head_logits(rows: Tensor, head_weights: Tensor) -> Tensor:
    """Logits of rows [C, H] under heads [K, V, H]: one product, [C, K, V]."""
    num_codebooks, vocab_size, hidden_size = head_weights.shape
    return (rows @ head_weights.view(-1, hidden_size).mT).view(-1, num_codebooks, vocab_size)


def _chunked_pass(
    hidden_states: Tensor,
    head_weights: Tensor,
    teacher: RowLogits | None,
    cells: Cells,
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
        student_logps = (head_logits(states, heads).div_(cells.temperature)).log_softmax(dim=-1)
        probs = student_logps.exp()
        logps[rows] = student_logps.gather(-1, cells.codes[rows, :, None]).squeeze(-1)
        entropies[rows] = -torch.linalg.vecdot(probs, student_logps)
        slope = None
        if teacher is not None and divergences is not None:
            teacher_logps = (teacher(rows).to(dtype) / cells.temperature).log_softmax(dim=-1)
            divergences[rows], slope = _divergence_slope(cells, student_logps, teacher_logps, probs)
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
        loss = loss + _policy_values(cells, slice(None), logps).sum()
    return loss, (divergences, logps, entropies), (hidden_gradient, head_gradient)


def _divergence_slope(cells: Cells, student_logps: Tensor, teacher_logps: Tensor, probs: Tensor):
    """Divergences [C, K] and their derivatives with respect to logits / temperature [C, K, V]."""
    if cells.divergence == "forward_kl":
        teacher_probs = teacher_logps.exp()
        value = torch.linalg.vecdot(teacher_probs, teacher_logps.sub_(student_logps))
        return value, torch.sub(probs, teacher_probs, out=teacher_probs)
    if cells.divergence == "reverse_kl":
        log_ratio = torch.sub(student_logps, teacher_logps, out=teacher_logps)
        value = torch.linalg.vecdot(probs, log_ratio)
        return value, log_ratio.sub_(value[..., None]).mul_(probs)
    alpha = torch.tensor(cells.alpha, dtype=probs.dtype, device=probs.device)
    mixture_logps = torch.logaddexp(student_logps + alpha.log(), teacher_logps + (1 - alpha).log())
    teacher_part = torch.linalg.vecdot(teacher_logps.exp(), teacher_logps.sub_(mixture_logps))
    log_ratio = torch.sub(student_logps, mixture_logps, out=mixture_logps)
    student_part = torch.linalg.vecdot(probs, log_ratio)
    value = cells.alpha * student_part + (1 - cells.alpha) * teacher_part
    return value, log_ratio.sub_(student_part[..., None]).mul_(probs).mul_(cells.alpha)


def _logits_gradient(cells: Cells, rows: slice, probs: Tensor, slope: Tensor | None, logps: Tensor) -> Tensor:
    """Gradient of the chunk's loss with respect to its logits [C, K, V]; overwrites `slope` and `probs`."""
    if slope is not None:
        slope.mul_(cells.divergence_weights[rows, :, None])
    if cells.logp_weights is not None:
        weights = _policy_slopes(cells, rows, logps)[..., None]
        # d log p_c / d logits = onehot(c) − p
        of_logps = probs.mul_(-weights).scatter_add_(-1, cells.codes[rows, :, None], weights)
        slope = of_logps if slope is None else slope.add_(of_logps)
    if slope is None:
        return probs.zero_()
    return slope.div_(cells.temperature)


def _policy_values(cells: Cells, rows: slice, logps: Tensor) -> Tensor:
    """w·log p, or with old log-probs max(w·ρ, w·clip(ρ)): the clipped surrogate, for w = −advantage."""
    assert cells.logp_weights is not None
    weights = cells.logp_weights[rows]
    if cells.old_logps is None:
        return weights * logps
    ratios = (logps - cells.old_logps[rows]).exp()
    return torch.maximum(
        weights * ratios, weights * ratios.clamp(*clip_bounds(cells.epsilon, cells.epsilon_high))
    )


def _policy_slopes(cells: Cells, rows: slice, logps: Tensor) -> Tensor:
    """Derivative of `_policy_values` with respect to log p."""
    assert cells.logp_weights is not None
    weights = cells.logp_weights[rows]
    if cells.old_logps is None:
        return weights
    ratios = (logps - cells.old_logps[rows]).exp()
    low, high = clip_bounds(cells.epsilon, cells.epsilon_high)
    clipped = ((ratios > high) & (weights < 0)) | ((ratios < low) & (weights > 0))
    return torch.where(clipped, 0, weights * ratios)
