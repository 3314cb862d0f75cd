"""Divergences between the student's and the teacher's distribution over the codes of one cell.

With p the student, q the teacher, z the student's logits and a = z / temperature:

| name | value | slope, the gradient with respect to a |
|---|---|---|
| `reverse_kl` | KL(p ‖ q) = Σ p·(log p − log q) | p ⊙ (log(p/q) − KL) |
| `forward_kl` | KL(q ‖ p) = Σ q·(log q − log p) | p − q |
| `generalized_jsd` | α·KL(p ‖ m) + (1 − α)·KL(q ‖ m), m = α·p + (1 − α)·q | α·p ⊙ (log(p/m) − KL(p ‖ m)) |

All values are in nats and per cell: nothing is summed over frames or codebooks. A new divergence is one more
function here and its line in `DIVERGENCES`: the loss, the settings and the tests read that table.

Every function takes log-probabilities after the temperature, and gives the value and its slope:

    student_logps: log p [..., V].
    teacher_logps: log q [..., V], guided; overwritten.
    probs: p [..., V], which the caller has already.
    alpha: the student's share in the mixture of `generalized_jsd`; the others do not read it.
    returns: value [...] and slope [..., V].
"""

from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]]


def _reverse_kl(
    student_logps: Tensor, teacher_logps: Tensor, probs: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Reverse KL divergence, the paper's distillation loss per position.

        KL(p ‖ q) = Σ_v p_v · (log p_v − log q_v)                          (arXiv 2410.06084; 2306.13649)

    It punishes the student for what the teacher would not say: mode seeking.
    """
    log_ratio = torch.sub(student_logps, teacher_logps, out=teacher_logps)
    value = torch.linalg.vecdot(probs, log_ratio)
    return value, log_ratio.sub_(value[..., None]).mul_(probs)


def _forward_kl(
    student_logps: Tensor, teacher_logps: Tensor, probs: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Forward KL divergence, the loss of classical distillation.

        KL(q ‖ p) = Σ_v q_v · (log q_v − log p_v)                                      (arXiv 1503.02531)

    It punishes the student for what it fails to cover: mode covering.
    """
    teacher_probs = teacher_logps.exp()
    value = torch.linalg.vecdot(teacher_probs, teacher_logps.sub_(student_logps))
    return value, torch.sub(probs, teacher_probs, out=teacher_probs)


def _generalized_jsd(
    student_logps: Tensor, teacher_logps: Tensor, probs: Tensor, alpha: float
) -> tuple[Tensor, Tensor]:
    """Generalised Jensen-Shannon divergence, with the student's share alpha in the mixture.

        JSD_α = α·KL(p ‖ m) + (1 − α)·KL(q ‖ m),   m = α·p + (1 − α)·q                 (arXiv 2306.13649)

    The weights must be the mixture's own. Draw a source B with P(B = student) = α and then a code from p or
    q: the code's distribution is m, and the mutual information between code and source is the entropy gap
    H(m) − α·H(p) − (1 − α)·H(q). Writing H(m) = −Σ (α·p + (1 − α)·q)·log m and sorting by p and q gives
    α·Σ p·(log p − log m) + (1 − α)·Σ q·(log q − log m), the line above. With the weights swapped it is no
    longer that gap and loses its bound, the entropy of the source (log 2 at α = ½).

    Limits: JSD_α/α → KL(p ‖ q), the reverse KL, as α → 0; JSD_α/(1 − α) → KL(q ‖ p), the forward KL, as
    α → 1.

    Raises:
        ValueError: alpha outside (0, 1).
    """
    if not 0 < alpha < 1:
        raise ValueError(
            f"alpha must lie between 0 and 1 (exclusive), got {alpha}: at the ends the divergence is zero; "
            'use "reverse_kl" (the limit at 0) or "forward_kl" (the limit at 1)'
        )
    share = torch.tensor(alpha, dtype=probs.dtype, device=probs.device)
    mixture_logps = torch.logaddexp(student_logps + share.log(), teacher_logps + (1 - share).log())
    teacher_part = torch.linalg.vecdot(teacher_logps.exp(), teacher_logps.sub_(mixture_logps))
    log_ratio = torch.sub(student_logps, mixture_logps, out=mixture_logps)
    student_part = torch.linalg.vecdot(probs, log_ratio)
    value = alpha * student_part + (1 - alpha) * teacher_part
    return value, log_ratio.sub_(student_part[..., None]).mul_(probs).mul_(alpha)


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": _reverse_kl,
    "forward_kl": _forward_kl,
    "generalized_jsd": _generalized_jsd,
}
