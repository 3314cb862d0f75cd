"""Divergences between the student's and the teacher's distribution over the codes of one cell.

With p the student, q the teacher, z the student's logits and a = z / temperature:

| name | value | gradient with respect to a |
|---|---|---|
| `reverse_kl` | KL(p ‖ q) = Σ p·(log p − log q) | p ⊙ (log(p/q) − KL) |
| `forward_kl` | KL(q ‖ p) = Σ q·(log q − log p) | p − q |
| `generalized_jsd` | α·KL(p ‖ m) + (1 − α)·KL(q ‖ m), m = α·p + (1 − α)·q | α·p ⊙ (log(p/m) − KL(p ‖ m)) |

All values are in nats and per cell: nothing is summed over frames or codebooks. The logits must be finite (a
cell that must not be read holds NaN, and stays NaN). `chunked_distillation_loss` computes the same from
hidden states, in chunks, with the gradients of the table.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from diverse_cfg.functional._checks import (
    expand_per_code,
    promote,
    require_ndim,
    require_positive,
    require_same_shape,
)
from diverse_cfg.functional._chunked import Cells, Divergence, RowLogits, chunked_terms, head_logits, to_rows
from diverse_cfg.functional.codebooks import num_decoder_steps, revert_delay_pattern
from diverse_cfg.functional.guidance import expand_scale, guided_logits
from diverse_cfg.functional.policy_gradient import clip_bounds, clipped_surrogate_loss, reinforce_loss


def reverse_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Reverse KL divergence, the paper's distillation loss per position.

        KL(p ‖ q) = Σ_v p_v · (log p_v − log q_v)                          (arXiv 2410.06084; 2306.13649)

    It punishes the student for what the teacher would not say: mode seeking.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], already guided.
        temperature: divides both logits, so that it is the divergence between the policies that are sampled.

    Returns:
        Divergence in nats [...].

    Raises:
        ValueError: shapes differ, or temperature ≤ 0.
    """
    student_logps, teacher_logps = _log_softmaxes(student_logits, teacher_logits, temperature)
    return (student_logps.exp() * (student_logps - teacher_logps)).sum(dim=-1)


def forward_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL divergence, the loss of classical distillation.

        KL(q ‖ p) = Σ_v q_v · (log q_v − log p_v)                                      (arXiv 1503.02531)

    It punishes the student for what it fails to cover: mode covering.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], already guided.
        temperature: divides both logits.

    Returns:
        Divergence in nats [...].

    Raises:
        ValueError: shapes differ, or temperature ≤ 0.
    """
    student_logps, teacher_logps = _log_softmaxes(student_logits, teacher_logits, temperature)
    return (teacher_logps.exp() * (teacher_logps - student_logps)).sum(dim=-1)


def generalized_jsd(
    student_logits: Tensor, teacher_logits: Tensor, alpha: float = 0.5, temperature: float = 1.0
) -> Tensor:
    """Generalised Jensen-Shannon divergence, with the student's share alpha in the mixture.

        JSD_α = α·KL(p ‖ m) + (1 − α)·KL(q ‖ m),   m = α·p + (1 − α)·q                 (arXiv 2306.13649)

    The weights must be the mixture's own. Draw a source B with P(B = student) = α and then a code from p or
    q: the code's distribution is m, and the mutual information between code and source is the entropy gap
    H(m) − α·H(p) − (1 − α)·H(q). Writing H(m) = −Σ (α·p + (1 − α)·q)·log m and sorting by p and q gives
    α·Σ p·(log p − log m) + (1 − α)·Σ q·(log q − log m), the line above. With the weights swapped it is no
    longer that gap and loses its bound, the entropy of the source (log 2 at α = ½).

    Limits: JSD_α/α → KL(p ‖ q), the reverse KL, as α → 0; JSD_α/(1 − α) → KL(q ‖ p), the forward KL, as
    α → 1.

    Args:
        student_logits: [..., V].
        teacher_logits: [..., V], already guided.
        alpha: the student's share of the mixture, between 0 and 1 exclusive.
        temperature: divides both logits.

    Returns:
        Divergence in nats [...], at most log 2.

    Raises:
        ValueError: shapes differ, temperature ≤ 0, or alpha outside (0, 1).
    """
    require_alpha(alpha)
    student_logps, teacher_logps = _log_softmaxes(student_logits, teacher_logits, temperature)
    mixture_logps = torch.logaddexp(student_logps + math.log(alpha), teacher_logps + math.log1p(-alpha))
    student_part = (student_logps.exp() * (student_logps - mixture_logps)).sum(dim=-1)
    teacher_part = (teacher_logps.exp() * (teacher_logps - mixture_logps)).sum(dim=-1)
    return alpha * student_part + (1 - alpha) * teacher_part


def named_divergence(
    name: Divergence,
    student_logits: Tensor,
    teacher_logits: Tensor,
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> Tensor:
    """The divergence of that name (`alpha` is read by `generalized_jsd` only).

    Args:
        name: "reverse_kl", "forward_kl" or "generalized_jsd".
        student_logits: [..., V].
        teacher_logits: [..., V], already guided.
        alpha: the student's share of the mixture.
        temperature: divides both logits.

    Returns:
        Divergence in nats [...].

    Raises:
        ValueError: unknown name, or what the divergence itself raises.
    """
    require_divergence(name)
    if name == "reverse_kl":
        return reverse_kl(student_logits, teacher_logits, temperature)
    if name == "forward_kl":
        return forward_kl(student_logits, teacher_logits, temperature)
    return generalized_jsd(student_logits, teacher_logits, alpha, temperature)


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


def chunked_distillation_loss(
    hidden_states: Tensor,
    head_weights: Tensor,
    codes: Tensor,
    teacher: GuidedTeacher | RowLogits | None,
    *,
    divergence_weights: float | Tensor = 1.0,
    logp_weights: float | Tensor | None = None,
    old_logps: Tensor | None = None,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    divergence: Divergence = "reverse_kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
    audio_channels: int = 1,
    chunk_size: int | None = 512,
) -> DistillationTerms:
    """Distillation and policy-gradient loss from hidden states, a chunk of the distributions at a time.

        loss = Σ_nkt u_nkt · D(p_nkt, q_nkt) + Σ_nkt w_nkt · log p_nkt(y_nkt)          (arXiv 2410.06084)

    D is the divergence from the guided teacher q, y the sampled codes. With u = 1/(N·K·T) and
    w = −β·A/(N·K·T), A from `diversity_advantages`, its gradient estimates that of −(Q + β·D(θ))/(K·T): the
    paper's objective, which sums over positions, with both terms divided by the same count, so that β keeps
    its meaning. With `old_logps` the second sum becomes PPO's
    clipped surrogate, Σ max(w·ρ, w·clip(ρ, 1 − ε, 1 + ε_high)) with ρ = p/p_old (arXiv 1707.06347).

    The weights are known before the pass, so a chunk's gradient with respect to its logits is too: see the
    table above. Memory is that of a few chunks and of the gradients of hidden states and heads, instead of
    almost ten logits tensors [N, K, T, V] for autograd. Call it where the model's forward is wrapped (DDP,
    FSDP), so that the heads' gradient is seen. Only `loss` carries a gradient, once: no double backward.

    Args:
        hidden_states: the student's hidden states after the last norm [N, S, H].
        head_weights: the student's heads, stacked [K, V, H], without bias; with or without gradient.
        codes: y, sampled codes [N, K, T].
        teacher: a `GuidedTeacher`; or a function from a slice of the N·S decoder steps (row-major) to guided
            logits [C, K, V], called under no_grad; or None for the policy gradient alone.
        divergence_weights: u, a number, [N] or [N, K, T]. 0 leaves a code out.
        logp_weights: w, a number, [N] or [N, K, T]; None for distillation alone.
        old_logps: log-probs recorded while sampling [N, K, T]; None on the strictly on-policy path.
        epsilon: ε of the clipped surrogate.
        epsilon_high: ε_high; None takes `epsilon`.
        divergence: "reverse_kl" (the paper's), "forward_kl" or "generalized_jsd".
        alpha: the student's share in the mixture of `generalized_jsd`.
        temperature: divides the student's and the teacher's logits, in divergence, log-probs and entropies.
        audio_channels: 1, or 2 when pairs of codebooks share a delay.
        chunk_size: decoder steps per chunk. None takes the plain path instead: every distribution at once,
            and autograd. Same result, for reference.

    Returns:
        The loss, and divergences, log-probs and entropies per code.

    Raises:
        ValueError: shapes do not fit one another, an unknown divergence, or a number out of range.
    """
    require_divergence(divergence)
    if divergence == "generalized_jsd":
        require_alpha(alpha)
    require_positive("temperature", temperature)
    clip_bounds(epsilon, epsilon_high)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1 decoder step, or None, got {chunk_size}")
    _check_loss_shapes(hidden_states, head_weights, codes, audio_channels)
    # float32, or float64 when a model in float64 asks for it
    dtype = torch.promote_types(torch.promote_types(hidden_states.dtype, head_weights.dtype), torch.float32)
    like = codes.new_empty(codes.shape, dtype=dtype)
    if isinstance(teacher, GuidedTeacher):
        teacher = _teacher_logits(teacher, head_weights, hidden_states.shape[1], like, audio_channels)
    if old_logps is not None:
        require_same_shape("old_logps", old_logps, "codes", codes)
    cells = Cells(
        codes=codes,
        divergence_weights=expand_per_code("divergence_weights", divergence_weights, like),
        logp_weights=None if logp_weights is None else expand_per_code("logp_weights", logp_weights, like),
        old_logps=None if old_logps is None else old_logps.detach().to(dtype),
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        divergence=divergence,
        alpha=alpha,
        temperature=temperature,
    )
    if chunk_size is None:
        with torch.autocast(hidden_states.device.type, enabled=False):
            return _plain_loss(hidden_states, head_weights, teacher, cells, audio_channels)
    return DistillationTerms(
        *chunked_terms(hidden_states, head_weights, teacher, cells, audio_channels, chunk_size)
    )


def require_divergence(name: str) -> None:
    """Raise unless `name` is a divergence of this module."""
    if name not in get_args(Divergence):
        raise ValueError(f"divergence must be one of {', '.join(get_args(Divergence))}, got {name!r}")


def require_alpha(alpha: float) -> None:
    """Raise unless 0 < alpha < 1."""
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha must lie between 0 and 1 (exclusive), got {alpha}: at the ends the divergence is zero; "
            'use "reverse_kl" (the limit at 0) or "forward_kl" (the limit at 1)'
        )


def _log_softmaxes(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    require_same_shape("student_logits", student_logits, "teacher_logits", teacher_logits)
    require_positive("temperature", temperature)
    student_logits, teacher_logits = promote(student_logits, teacher_logits)
    return (student_logits / temperature).log_softmax(dim=-1), (teacher_logits / temperature).log_softmax(
        dim=-1
    )


def _check_loss_shapes(
    hidden_states: Tensor, head_weights: Tensor, codes: Tensor, audio_channels: int
) -> None:
    require_ndim("hidden_states", hidden_states, "N S H")
    require_ndim("head_weights", head_weights, "K V H")
    require_ndim("codes", codes, "N K T")
    num_rows, num_codebooks, num_frames = codes.shape
    num_steps = num_decoder_steps(num_frames, num_codebooks, audio_channels)
    if hidden_states.shape[:2] != (num_rows, num_steps):
        raise ValueError(
            f"codes {tuple(codes.shape)} need hidden_states [{num_rows}, {num_steps}, H] with "
            f"audio_channels={audio_channels}, got {tuple(hidden_states.shape)}"
        )
    if head_weights.shape[::2] != (num_codebooks, hidden_states.shape[2]):
        raise ValueError(
            f"head_weights must be [{num_codebooks}, V, {hidden_states.shape[2]}] for these codes and "
            f"hidden_states, got {tuple(head_weights.shape)}"
        )


def _teacher_logits(
    teacher: GuidedTeacher, student_heads: Tensor, num_steps: int, like: Tensor, audio_channels: int
) -> RowLogits:
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
        per_code = expand_scale(scale, like)
        per_row = to_rows(per_code, 1.0, audio_channels)

        def logits(rows: slice) -> Tensor:
            return guided_logits(
                head_logits(cond[rows].to(like.dtype), heads),
                head_logits(uncond[rows].to(like.dtype), heads),
                per_row[rows],
            )
    else:

        def logits(rows: slice) -> Tensor:
            return head_logits(
                guided_logits(cond[rows].to(like.dtype), uncond[rows].to(like.dtype), scale), heads
            )

    return logits


def _plain_loss(
    hidden_states: Tensor, head_weights: Tensor, teacher: RowLogits | None, cells: Cells, audio_channels: int
) -> DistillationTerms:
    """The same loss with all distributions at once and autograd."""
    num_frames = cells.codes.shape[2]

    def by_codes(logits: Tensor) -> Tensor:  # [N·S, K, V] -> [N, K, T, V]
        grid = logits.unflatten(0, hidden_states.shape[:2]).transpose(1, 2)
        return revert_delay_pattern(grid, num_frames, audio_channels)

    dtype = cells.divergence_weights.dtype
    student = by_codes(head_logits(hidden_states.flatten(0, 1).to(dtype), head_weights.to(dtype)))
    all_logps = (student / cells.temperature).log_softmax(dim=-1)
    logps = all_logps.gather(-1, cells.codes[..., None]).squeeze(-1)
    entropies = -(all_logps.exp() * all_logps).sum(dim=-1)
    loss = logps.new_zeros(())
    divergences = None
    if teacher is not None:
        with torch.no_grad():
            guided = by_codes(teacher(slice(None)).to(dtype))
        divergences = named_divergence(cells.divergence, student, guided, cells.alpha, cells.temperature)
        loss = loss + (cells.divergence_weights * divergences).sum()
        divergences = divergences.detach()
    if cells.logp_weights is not None:
        advantages = -cells.logp_weights
        if cells.old_logps is None:
            per_code = reinforce_loss(logps, advantages)
        else:
            bounds = cells.epsilon, cells.epsilon_high
            per_code = clipped_surrogate_loss(logps, cells.old_logps, advantages, *bounds)
        loss = loss + per_code.sum()
    return DistillationTerms(loss, divergences, logps.detach(), entropies.detach())
