"""The distillation loss with every distribution at once and autograd: what the chunked one is compared with.

`benchmarks/loss.py` measures against it, too.
"""

import math

import torch
from torch import Tensor

from diverse_cfg.functional.distillation import DistillationTerms, GuidedTeacher


def divergence(name: str, logps: Tensor, teacher_logps: Tensor, alpha: float) -> Tensor:
    """Per cell, from log-probabilities [..., V]."""
    if name == "reverse_kl":
        return (logps.exp() * (logps - teacher_logps)).sum(dim=-1)
    if name == "forward_kl":
        return (teacher_logps.exp() * (teacher_logps - logps)).sum(dim=-1)
    mixture = torch.logaddexp(logps + math.log(alpha), teacher_logps + math.log1p(-alpha))
    parts = [(x.exp() * (x - mixture)).sum(dim=-1) for x in (logps, teacher_logps)]
    return alpha * parts[0] + (1 - alpha) * parts[1]


def autograd_loss(
    hidden_states: Tensor,
    head_weights: Tensor,
    codes: Tensor,
    teacher: GuidedTeacher | None,
    *,
    delays: tuple[int, ...],
    divergence_weights: float | Tensor = 1.0,
    logp_weights: float | Tensor | None = None,
    name: str = "reverse_kl",
    alpha: float = 0.5,
    temperature: float = 1.0,
) -> DistillationTerms:
    """As `distillation_loss` on the strictly on-policy path, for a scalar guidance scale."""
    dtype = torch.promote_types(hidden_states.dtype, torch.float32)

    def all_logps(states: Tensor, heads: Tensor) -> Tensor:
        logits = [
            states[:, delay : delay + codes.shape[2]].to(dtype) @ head.to(dtype).mT
            for delay, head in zip(delays, heads, strict=True)
        ]
        return (torch.stack(logits, dim=1) / temperature).log_softmax(dim=-1)

    def spread(weights: float | Tensor) -> float | Tensor:
        return weights[:, None, None] if isinstance(weights, Tensor) and weights.ndim == 1 else weights

    with torch.autocast(hidden_states.device.type, enabled=False):
        student = all_logps(hidden_states, head_weights)
        logps = student.gather(-1, codes[..., None]).squeeze(-1)
        loss, divergences = logps.new_zeros(()), None
        if teacher is not None:
            with torch.no_grad():
                cond, uncond = (
                    states.to(dtype) for states in (teacher.cond_hidden_states, teacher.uncond_hidden_states)
                )
                guided = all_logps(uncond + teacher.guidance_scale * (cond - uncond), teacher.head_weights)
            divergences = divergence(name, student, guided, alpha)
            loss = loss + (spread(divergence_weights) * divergences).sum()
            divergences = divergences.detach()
        if logp_weights is not None:
            loss = loss + (spread(logp_weights) * logps).sum()
        entropies = -(student.exp() * student).sum(dim=-1)
    return DistillationTerms(loss, divergences, logps.detach(), entropies.detach())
