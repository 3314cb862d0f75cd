"""The objective inside the policy's forward pass: student hidden states → distillation and policy-gradient loss.

The loss starts from hidden states and is computed where distributed wrappers expect all of a model's work to
happen, inside its `forward`: `student_terms` is what the trainer hands to `disguises.route_forward`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.functional.codebooks import apply_delay_pattern, revert_delay_pattern, valid_cells
from diverse_cfg.functional.distillation import DistillationTerms, GuidedTeacher, distillation_loss
from diverse_cfg.policies.policy import Policy
from diverse_cfg.types import Clips, TextCondition


@dataclass(frozen=True)
class LossSettings:
    """What the loss needs to know besides tensors; see `functional.distillation`."""

    divergence: str
    alpha: float
    temperature: float
    epsilon: float
    epsilon_high: float | None
    delays: tuple[int, ...]
    chunk_size: int

    @classmethod
    def of(cls, args: CFGDiversityConfig, delays: tuple[int, ...]) -> Self:
        """Those of a run, for a policy with these delays."""
        return cls(
            divergence=args.divergence,
            alpha=args.jsd_alpha,
            temperature=args.temperature,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            delays=delays,
            chunk_size=args.loss_chunk_size,
        )


def student_terms(
    policy: Policy,
    clips: Clips,
    settings: LossSettings,
    teacher: GuidedTeacher | None = None,
    *,
    divergence_weight: float = 0.0,
    score_coef: float = 0.0,
    probe: bool = False,
) -> tuple[DistillationTerms, tuple[Tensor, Tensor] | None]:
    """Loss, divergences, log-probs and entropies of a micro-batch.

    Args:
        policy: the student, within its model's own forward pass.
        clips: codes and condition; with advantages there is a policy gradient, with old log-probs it is
            clipped.
        settings: of the loss.
        teacher: guided hidden states for these codes; None computes log-probs and entropies only.
        divergence_weight: u of the loss, distillation coefficient / number of codes.
        score_coef: weight of the future divergence as a (negative) return; 0 stops the sampling's gradient.
        probe: also return the distillation and the policy-gradient loss as two scalars on the same graph, so
            that their gradients can be measured apart.
    """
    hidden, heads = policy.hidden_states(clips.codes, clips.condition), policy.head_weights()

    def terms(teacher: GuidedTeacher | None, logp_weights: Tensor | None) -> DistillationTerms:
        return distillation_loss(
            hidden,
            heads,
            clips.codes,
            teacher,
            divergence_weights=divergence_weight,
            logp_weights=logp_weights,
            old_logps=clips.old_logps,
            epsilon=settings.epsilon,
            epsilon_high=settings.epsilon_high,
            divergence=settings.divergence,
            alpha=settings.alpha,
            temperature=settings.temperature,
            delays=settings.delays,
            chunk_size=settings.chunk_size,
        )

    advantages = clips.advantages
    if score_coef:
        with torch.no_grad():
            future = future_divergence(terms(teacher, None).divergences, settings.delays)
        advantages = -score_coef * future + (0 if advantages is None else advantages)
    # Minus the advantages, divided by the same count as the divergences.
    logp_weights = None if advantages is None else -advantages / clips.codes.numel()
    both = terms(teacher, logp_weights)
    if not probe:
        return both, None
    return both, (terms(teacher, None).loss, terms(None, logp_weights).loss)


def likelihood_terms(
    policy: Policy, labels: Tensor, condition: TextCondition, weight: float | Tensor, chunk_size: int
) -> DistillationTerms:
    """Cross-entropy of given clips, `weight` · Σ −log p(code), over the codes that there are.

    Args:
        policy: within its model's own forward pass.
        labels: codes [N, K, T]; negative ones are none, and stand behind the end of a shorter clip.
        condition: N rows.
        weight: of every code, 1 / number of codes.
        chunk_size: decoder steps at once.
    """
    valid = labels >= 0
    # Behind its end a shorter clip looks as if it were alone.
    hidden = policy.hidden_states(torch.where(valid, labels, policy.vocab_size), condition)
    return distillation_loss(
        hidden,
        policy.head_weights(),
        torch.where(valid, labels, 0),
        None,
        logp_weights=-weight * valid,
        delays=policy.delays,
        chunk_size=chunk_size,
    )


def future_divergence(divergences: Tensor, delays: Sequence[int]) -> Tensor:
    """What every code leads to: the divergence of the steps after it, against the other clips' mean.

        R_nkt = Σ_{s > t + d_k} Σ_j D_nj(s)  −  the same mean over the other clips       (MiniLLM, arXiv
        2306.08543)

    The codes of one step do not see each other, so a code answers for later steps only.

    Args:
        divergences: [N, K, T].
        delays: d, one per codebook [K].

    Returns:
        [N, K, T], centred when N > 1.
    """
    num_clips, num_codebooks, num_frames = divergences.shape
    grid = apply_delay_pattern(divergences, None, delays)[..., 1:]
    valid = valid_cells(num_frames, delays, device=grid.device)
    per_step = torch.where(valid, grid, 0).sum(dim=1)
    later = per_step.flip(1).cumsum(dim=1).flip(1) - per_step
    if num_clips > 1:
        later = (later - later.mean(dim=0)) * num_clips / (num_clips - 1)
    steps = later[:, None].expand(-1, num_codebooks, -1)
    return revert_delay_pattern(steps, num_frames, delays)


def loss_metrics(clips: Clips, terms: DistillationTerms) -> dict[str, Tensor]:
    """Means over the micro-batch; all in nats per code unless the name says clip."""
    per_codebook = terms.divergences.mean(dim=(0, 2))
    entropies = terms.entropies.mean(dim=(0, 2))
    distillation = per_codebook.mean()
    metrics = {
        "loss/distillation": distillation,
        "kl/clip": distillation * clips.codes[0].numel(),
        "entropy": entropies.mean(),
    }
    metrics |= {f"kl/codebook_{k}": value for k, value in enumerate(per_codebook)}
    metrics |= {f"entropy/codebook_{k}": value for k, value in enumerate(entropies)}
    if clips.advantages is not None:
        metrics["loss/policy_gradient"] = -(clips.advantages * terms.logps).mean()
    if clips.old_logps is not None:
        ratios = (terms.logps - clips.old_logps).exp()
        metrics["ratio/mean"], metrics["ratio/max"] = ratios.mean(), ratios.max()
    return metrics


def term_gradient_norms(model: nn.Module, losses: tuple[Tensor, Tensor]) -> dict[str, float]:
    """Norms of the two terms' gradients over all trained parameters, and the cosine between them.

    Costs one backward pass per term; the graph is kept for the real one, and no `.grad` is touched.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    distillation, policy = (
        torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses
    )
    zero = losses[0].new_zeros((), dtype=torch.float64)

    def dot(left, right) -> Tensor:
        pairs = [(a, b) for a, b in zip(left, right, strict=True) if a is not None and b is not None]
        return sum(((a.double() * b.double()).sum() for a, b in pairs), zero)

    distillation_norm, policy_norm = dot(distillation, distillation).sqrt(), dot(policy, policy).sqrt()
    cosine = dot(distillation, policy) / (distillation_norm * policy_norm)
    return {
        "grad_norm/distillation": distillation_norm.item(),
        "grad_norm/policy_gradient": policy_norm.item(),
        "grad_norm/cosine": cosine.item(),
    }
