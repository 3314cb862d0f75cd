"""Prefix baseline: a variance reducer for the diversity's policy gradient (not in the paper).

A clip's diversity is half decided by its first seconds. Embed its beginnings, predict the final advantage
from them, and let the codes that come later answer only for what was still open when they were sampled.

With A_i the advantage of `diversity.diversity_advantages` and V_i^m a prediction of it from the first F_m
frames of clip i and from the *other* clips, the codes sampled after that prefix may use A_i − V_i^m instead
of A_i:

    E[ V_i^m · ∇log π(y_it | y_i,<t) ] = E[ V_i^m · E[∇log π(y_it | y_i,<t) | y_i,<t, y_j≠i] ] = 0,

which needs three things, each of them kept here:

1. V_i^m sees neither code t nor what is sampled after it. MusicGen decodes the codebooks with delays, so
   "the first F frames" are complete only F + max(d) steps into the clip: `code_segments` counts steps.
   (The embedding of a prefix must come from its codes alone: a decoded clip cut at F has heard the future.)
2. V_i^m sees the other clips only through numbers that do not depend on y_i: `prefix_rewards` is centred
   without i.
3. The regression was fitted on earlier batches: predict with it first, update it afterwards.

Then λ = 1 is unbiased whatever the quality of V. λ < 1 puts V_i^{m+1} in the place of the outcome, which
adds the bias of V but removes more noise; it is unbiased only where V_i^m = E[A_i | prefix m, the others].

    features, targets = prefix_rewards(prefixes, whole), diversity_advantages(rewards)
    values = predict_values(statistics, features)
    per_code = segment_advantages(values, targets, gae_lambda)[..., code_segments(...)]
    statistics = update_ridge(statistics, ridge_statistics(features, targets))
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diverse_cfg.functional._checks import promote, require_ndim, require_same_shape
from diverse_cfg.functional.diversity import unit_embeddings


def prefix_rewards(prefix_embeddings: Tensor, embeddings: Tensor) -> Tensor:
    """Centred diversity reward of the beginnings of a clip against the whole other clips.

        c_im = φ_im − 1/((G−1)(G−2)) · Σ_{j≠k, both ≠ i} d(e_jm, e_k),   φ_im = 1/(G−1) · Σ_{j≠i} d(e_im, e_j)

    with d = 1 − cos, e_im the embedding of prefix m of clip i and e_j that of the whole clip j. The centre is
    the same mean over the pairs without i: an expectation of zero, and no dependence on clip i. For a prefix
    that is the whole clip, 2·c is `diversity_advantages`.

    Args:
        prefix_embeddings: [P, G, M, D], M prefixes per clip, shortest first.
        embeddings: [P, G, D], whole clips.

    Returns:
        Features [P, G, M].

    Raises:
        ValueError: shapes do not fit, G < 3, or a zero or non-finite embedding.
    """
    require_ndim("prefix_embeddings", prefix_embeddings, "P G M D")
    require_ndim("embeddings", embeddings, "P G D")
    require_same_shape("prefix_embeddings[:, :, 0]", prefix_embeddings[:, :, 0], "embeddings", embeddings)
    num_generations = embeddings.shape[1]
    if num_generations < 3:
        raise ValueError(f"the prefix baseline needs num_generations >= 3, got {num_generations}")
    prefixes, whole = promote(unit_embeddings(prefix_embeddings), unit_embeddings(embeddings))
    distances = 1 - torch.einsum("pimd,pjd->pmij", prefixes, whole)
    itself = torch.eye(num_generations, dtype=torch.bool, device=distances.device)
    distances = distances.masked_fill(itself, 0)
    of_prefix, of_whole = distances.sum(dim=3), distances.sum(dim=2)  # [P, M, G]: rows and columns of i
    total = of_prefix.sum(dim=2, keepdim=True)
    without = (total - of_prefix - of_whole) / ((num_generations - 1) * (num_generations - 2))
    return (of_prefix / (num_generations - 1) - without).transpose(1, 2)


class RidgeStatistics(NamedTuple):
    """Sums that a ridge regression needs; those of several processes or batches add up."""

    gram: Tensor
    """Σ x xᵀ over samples [M, M]."""
    moments: Tensor
    """Σ x·target over samples [M]."""


def ridge_statistics(features: Tensor, targets: Tensor) -> RidgeStatistics:
    """Sums of one batch for the regression of the final advantage on the prefix rewards.

    Args:
        features: c from `prefix_rewards` [P, G, M].
        targets: A from `diversity_advantages` [P, G].

    Returns:
        The sums, in float64, to be added over processes (all-reduce) before `update_ridge`.

    Raises:
        ValueError: shapes do not fit.
    """
    require_ndim("features", features, "P G M")
    require_same_shape("features[:, :, 0]", features[:, :, 0], "targets", targets)
    samples, outcomes = features.detach().double().flatten(0, 1), targets.detach().double().flatten()
    return RidgeStatistics(samples.mT @ samples, samples.mT @ outcomes)


def update_ridge(old: RidgeStatistics | None, new: RidgeStatistics, decay: float = 0.95) -> RidgeStatistics:
    """Online regression: forget some of the past, since the policy moves, and add the batch.

    Args:
        old: sums so far; None at the start.
        new: sums of the batch, from `ridge_statistics`.
        decay: weight of the past, above 0 and at most 1.

    Returns:
        The new sums.

    Raises:
        ValueError: decay out of range.
    """
    if not 0 < decay <= 1:
        raise ValueError(f"decay must be above 0 and at most 1, got {decay}")
    if old is None:
        return new
    return RidgeStatistics(decay * old.gram + new.gram, decay * old.moments + new.moments)


def predict_values(statistics: RidgeStatistics | None, features: Tensor, ridge: float = 0.01) -> Tensor:
    """Predicted final advantage at the end of every prefix.

        V_m = c_{1..m} · w_m,   w_m = (Σ x xᵀ + ρ·s·1)⁻¹ Σ x·A   over the first m features,

    s being the mean of the diagonal, so that ρ has no unit. No intercept: features and advantages are
    centred.

    Args:
        statistics: sums of *earlier* batches; None predicts 0, which is no baseline.
        features: c from `prefix_rewards` [P, G, M].
        ridge: ρ, above 0.

    Returns:
        Values [P, G, M]; V_m reads only prefixes 1 to m.

    Raises:
        ValueError: shapes do not fit, or ridge ≤ 0.
    """
    require_ndim("features", features, "P G M")
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    if statistics is None or not bool(statistics.gram.any()):
        return torch.zeros_like(features)
    num_prefixes = features.shape[2]
    if statistics.gram.shape != (num_prefixes, num_prefixes):
        raise ValueError(
            f"statistics of {len(statistics.gram)} prefixes do not fit features {tuple(features.shape)}"
        )
    gram, moments = statistics.gram.to(features.device), statistics.moments.to(features.device)
    weights = gram.new_zeros(num_prefixes, num_prefixes)  # column m: the regression at the end of prefix m
    for m in range(1, num_prefixes + 1):
        penalty = ridge * gram.diagonal()[:m].mean() * torch.eye(m, dtype=gram.dtype, device=gram.device)
        weights[:m, m - 1] = torch.linalg.solve(gram[:m, :m] + penalty, moments[:m])
    return features @ weights.to(features.dtype)


def segment_advantages(values: Tensor, advantages: Tensor, gae_lambda: float = 1.0) -> Tensor:
    """Generalised advantage estimation over the M + 1 segments that M prefixes cut a clip into.

        δ_s = V_{s+1} − V_s,   V_0 = 0,   V_{M+1} = A,   Â_s = Σ_{l≥0} λ^l · δ_{s+l}            (arXiv
        1506.02438)

    λ = 1 is Â_s = A − V_s: unbiased. λ = 0 is Â_s = V_{s+1} − V_s: what the segment changed in the
    prediction.

    Args:
        values: V from `predict_values` [P, G, M].
        advantages: A from `diversity_advantages` [P, G].
        gae_lambda: λ in [0, 1].

    Returns:
        Advantages of the segments [P, G, M + 1]; segment s lies between prefix s and prefix s + 1.

    Raises:
        ValueError: shapes do not fit, or λ out of range.
    """
    require_ndim("values", values, "P G M")
    require_same_shape("values[:, :, 0]", values[:, :, 0], "advantages", advantages)
    if not 0 <= gae_lambda <= 1:
        raise ValueError(f"gae_lambda must lie in [0, 1], got {gae_lambda}")
    values, advantages = promote(values, advantages)
    edges = torch.cat([torch.zeros_like(values[..., :1]), values, advantages[..., None]], dim=-1)
    segments = edges.diff(dim=-1)
    for s in range(segments.shape[-1] - 2, -1, -1):
        segments[..., s] += gae_lambda * segments[..., s + 1]
    return segments


def code_segments(prefix_frames: Sequence[int], num_frames: int, delays: Sequence[int]) -> Tensor:
    """Segment of every code: how many prefixes were complete before it was sampled.

        segment(k, t) = #{ m : F_m + max(d) ≤ t + d_k }

    The code is sampled at decoder step t + d_k, the last code of F frames at step F − 1 + max(d). Counting
    frames instead, #{ m : F_m ≤ t }, would let a value see codes that depend on the code it is a baseline of.

    Args:
        prefix_frames: F_m, frames of each prefix, increasing, each between 1 and T − 1.
        num_frames: T.
        delays: d, one per codebook [K].

    Returns:
        Segments 0 to M, [K, T]: `segment_advantages(...).flatten(0, 1)[:, segments]` is [N, K, T].

    Raises:
        ValueError: the prefixes are not increasing or do not lie inside the clip.
    """
    frames = list(prefix_frames)
    if not frames or frames != sorted(set(frames)) or frames[0] < 1 or frames[-1] >= num_frames:
        raise ValueError(
            f"prefix_frames must increase and lie between 1 and {num_frames - 1} (a clip has {num_frames} "
            f"frames), got {frames}"
        )
    step = torch.arange(num_frames) + torch.tensor(delays)[:, None]
    complete = torch.tensor(frames) + max(delays)
    return torch.bucketize(step, complete, right=True)


def explained_variance(values: Tensor, advantages: Tensor) -> Tensor:
    """Share of the advantages' variance that each prefix predicts; worth logging before every update.

        1 − Var(A − V_m) / Var(A)

    1 is perfect, 0 is no better than no baseline, below 0 is harmful.

    Args:
        values: V from `predict_values`, fitted on earlier batches [P, G, M].
        advantages: A [P, G].

    Returns:
        [M]; NaN when the advantages do not vary.

    Raises:
        ValueError: shapes do not fit.
    """
    require_ndim("values", values, "P G M")
    require_same_shape("values[:, :, 0]", values[:, :, 0], "advantages", advantages)
    values, advantages = promote(values, advantages)
    residuals = (advantages[..., None] - values).flatten(0, 1)
    return 1 - residuals.var(dim=0, correction=0) / advantages.var(correction=0)
