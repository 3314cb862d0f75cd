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
from typing import Literal, get_args

import torch
from torch import Tensor

from diverse_cfg.functional._checks import promote, require_positive, require_same_shape

Divergence = Literal["reverse_kl", "forward_kl", "generalized_jsd"]


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

    Limits: JSD_α/α → KL(p ‖ q), the reverse KL, as α → 0; JSD_α/(1 − α) → KL(q ‖ p), the forward KL, as α →
    1.

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


def divergence(
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
