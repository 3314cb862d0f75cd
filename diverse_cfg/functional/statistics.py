"""Statistics of an evaluation: intervals by prompt, distances between distributions, fronts.

Clips of one prompt resemble each other, so prompts, not clips, are what an interval resamples. Everything is
computed in float64.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import scipy.stats
import torch
from torch import Tensor

from diverse_cfg.functional._checks import require_ndim


class Interval(NamedTuple):
    """An estimate with its bootstrap interval."""

    estimate: float
    low: float
    high: float
    standard_error: float


def bootstrap_mean(
    values: Tensor,
    prompt_ids: Sequence[Hashable] | Tensor,
    seed_ids: Sequence[Hashable] | Tensor | None = None,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean with an interval from a bootstrap over prompts.

        x̄* = Σ_p n*_p · Σ_{c∈p} x_c / Σ_p n*_p · |p|,   n* = how often each prompt was drawn (Efron 1979)

    All clips of a prompt move together, those of *all seeds* included: a prompt generated under three seeds
    is one cluster, not three. Such an interval holds for these training seeds and new prompts. With
    `seed_ids` the seeds are drawn as well, independently of the prompts (the pigeonhole bootstrap of crossed
    factors, arXiv 0712.1111), and it holds for new seeds too, erring on the wide side: the draws count what
    is left of a clip beside prompt and seed three times.

    The interval takes percentiles, at a level widened for few prompts and seeds as Student's t would be
    (Hesterberg, arXiv 1411.5279): plain percentiles of 20 prompts cover 92 % instead of 95 %. With both, the
    degrees of freedom are Satterthwaite's (1946), between those of the seeds, if these differ most, and
    those of the prompts:

        ν = (V_p + V_r)² / (V_p²/(P − 1) + V_r²/(R − 1)),   V_p = var_p(x̄_p) / P,   V_r = var_r(x̄_r) / R

    Args:
        values: one number per clip, or per prompt and seed [C].
        prompt_ids: the prompt of each value [C], any hashable.
        seed_ids: the training or sampling seed of each value [C]; None keeps the seeds fixed.
        num_resamples: bootstrap draws.
        confidence: coverage of the interval.
        seed: of the resampling.

    Returns:
        Estimate (the plain mean of all values), interval and standard error.

    Raises:
        ValueError: values not finite or not one-dimensional, counts differ, fewer than two prompts or three
            seeds, a prompt without a value for some seed (with `seed_ids`), or numbers out of range.
    """
    require_ndim("values", values, "C")
    values = values.detach().double().cpu()
    if not bool(values.isfinite().all()):
        raise ValueError(f"{int((~values.isfinite()).sum())} of {len(values)} values are not finite")
    prompts, num_prompts = _index("prompt_ids", prompt_ids, len(values), at_least=2)
    seeds, num_seeds = torch.zeros_like(prompts), 1
    if seed_ids is not None:
        seeds, num_seeds = _index("seed_ids", seed_ids, len(values), at_least=3)
    cell = prompts * num_seeds + seeds
    sums = torch.zeros(num_prompts * num_seeds, dtype=torch.float64).index_add(0, cell, values)
    counts = torch.bincount(cell, minlength=num_prompts * num_seeds).double()
    if seed_ids is not None and bool((counts == 0).any()):
        raise ValueError(
            f"{int((counts == 0).sum())} of {num_prompts} prompts × {num_seeds} seeds have no value: "
            "resampling seeds needs every prompt under every seed"
        )
    generator = _generator(seed)
    prompt_draws = _draw_counts(num_prompts, num_resamples, generator)
    seed_draws = torch.ones(num_resamples, 1, dtype=torch.float64)
    if seed_ids is not None:
        seed_draws = _draw_counts(num_seeds, num_resamples, generator)
    shape = (num_prompts, num_seeds)
    totals = torch.einsum("bp,pr,br->b", prompt_draws, sums.view(shape), seed_draws)
    sizes = torch.einsum("bp,pr,br->b", prompt_draws, counts.view(shape), seed_draws)
    means = (sums / counts).view(shape)
    factors = [means.mean(dim=1)] if seed_ids is None else [means.mean(dim=1), means.mean(dim=0)]
    return _interval(values.mean().item(), totals / sizes, factors, confidence)


def paired_difference(
    values: Tensor,
    other_values: Tensor,
    prompt_ids: Sequence[Hashable] | Tensor,
    seed_ids: Sequence[Hashable] | Tensor | None = None,
    *,
    num_resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Mean difference of two systems on the same prompts and seeds, with an interval.

        Δ = mean_c (x_c − x'_c), bootstrapped as `bootstrap_mean`

    Pairing removes what a prompt does to both systems. An interval that excludes 0 is a difference.

    Args:
        values: the first system [C].
        other_values: the second system, entry by entry the same prompt, seed and position [C].
        prompt_ids: [C].
        seed_ids: [C] or None, see `bootstrap_mean`.
        num_resamples: bootstrap draws.
        confidence: coverage of the interval.
        seed: of the resampling.

    Returns:
        Interval of first minus second.

    Raises:
        ValueError: lengths differ, or as `bootstrap_mean`.
    """
    if values.shape != other_values.shape:
        raise ValueError(f"not paired: {tuple(values.shape)} against {tuple(other_values.shape)} values")
    return bootstrap_mean(
        values.double() - other_values.double(),
        prompt_ids,
        seed_ids,
        num_resamples=num_resamples,
        confidence=confidence,
        seed=seed,
    )


def bootstrap_statistic(
    statistic: Callable[[Tensor], float],
    num_prompts: int,
    *,
    num_resamples: int = 500,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Any statistic of a set of prompts (Fréchet, hypervolume) with an interval from a bootstrap over them.

        s* = s(p*_1, …, p*_P),   p* drawn with replacement (Efron 1979)

    Distances between distributions are biased upwards by repetitions in a resample, so their interval is too.

    Args:
        statistic: from the indices of prompts [P], with repetitions, to a number.
        num_prompts: P.
        num_resamples: bootstrap draws, one call each.
        confidence: coverage of the interval.
        seed: of the resampling.

    Returns:
        The statistic of all prompts once, interval and standard error.

    Raises:
        ValueError: P < 2, numbers out of range, or a statistic that is not finite.
    """
    if num_prompts < 2:
        raise ValueError(f"an interval over prompts needs at least 2 of them, got {num_prompts}")
    generator = _generator(seed)
    draws = torch.randint(num_prompts, (num_resamples, num_prompts), generator=generator)
    estimate = float(statistic(torch.arange(num_prompts)))
    resampled = torch.tensor([float(statistic(draw)) for draw in draws], dtype=torch.float64)
    if not (math.isfinite(estimate) and bool(resampled.isfinite().all())):
        raise ValueError("the statistic is not finite on all prompts, or on a resample of them")
    return _interval(estimate, resampled, [torch.zeros(num_prompts)], confidence)


def frechet_distance(embeddings: Tensor, reference: Tensor) -> float:
    """Fréchet distance between two sets of embeddings, taken as Gaussians.

        d² = ‖μ − μ_r‖² + tr(Σ + Σ_r − 2·(Σ Σ_r)^½)                       (arXiv 1706.08500; FAD, 1812.08466)

    tr (Σ Σ_r)^½ is the sum of the singular values of Σ^½ Σ_r^½, which needs no matrix root of a product.
    Biased upwards for few clips: compare at one number of clips, and see `mmd`.

    Args:
        embeddings: [C, D].
        reference: [C', D].

    Returns:
        d² (as FAD and FID report it), at least 0.

    Raises:
        ValueError: sizes do not fit, fewer than two rows, or values that are not finite.
    """
    first, second = _two_sets(embeddings, reference)
    centred = [x - x.mean(dim=0) for x in (first, second)]
    covariances = [x.mT @ x / (len(x) - 1) for x in centred]
    roots = [_symmetric_root(covariance) for covariance in covariances]
    cross = torch.linalg.svdvals(roots[0] @ roots[1]).sum()
    means = (first.mean(dim=0) - second.mean(dim=0)).square().sum()
    return max(0.0, (means + covariances[0].trace() + covariances[1].trace() - 2 * cross).item())


def mmd(
    embeddings: Tensor,
    reference: Tensor,
    kernel: Literal["rbf", "polynomial"] = "rbf",
    bandwidth: float | None = None,
) -> float:
    """Unbiased squared maximum mean discrepancy between two sets of embeddings.

        MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2·mean_ij k(x_i, y_j)

    "rbf": k = exp(−‖x − y‖² / 2σ²), σ the median distance inside the reference (KAD, arXiv 2502.15602, which
    multiplies by a constant that is left out here). "polynomial": k = (x·y / D + 1)³ (KID, arXiv 1801.01401).
    It may be slightly negative for equal distributions: that is what unbiased means.

    Args:
        embeddings: [C, D].
        reference: [C', D].
        kernel: "rbf" or "polynomial".
        bandwidth: σ of "rbf"; None takes the median.

    Returns:
        MMD².

    Raises:
        ValueError: sizes do not fit, fewer than two rows, values that are not finite, an unknown kernel, or a
            bandwidth that is not above 0 (such as the median of a constant reference).
    """
    first, second = _two_sets(embeddings, reference)
    if kernel not in ("rbf", "polynomial"):
        raise ValueError(f'kernel must be "rbf" or "polynomial", got {kernel!r}')
    sigma = _median_distance(second) if bandwidth is None else bandwidth
    if kernel == "rbf" and not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"bandwidth must be finite and above 0, got {sigma} (is the reference constant?)")

    def gram(x: Tensor, y: Tensor) -> Tensor:
        if kernel == "polynomial":
            return (x @ y.mT / x.shape[1] + 1) ** 3
        distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-(distances / sigma).square() / 2)

    def within(x: Tensor) -> Tensor:
        values = gram(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (within(first) + within(second) - 2 * gram(first, second).mean()).item()


def pareto_front(points: Tensor) -> Tensor:
    """Which points no other point dominates (at least as good in everything, better in something).

    Args:
        points: [C, M] coordinates, all of them better when larger.

    Returns:
        Boolean mask [C]; equal points on the front are all kept.

    Raises:
        ValueError: wrong number of dimensions, or NaN.
    """
    require_ndim("points", points, "C M")
    if bool(points.isnan().any()):
        raise ValueError(f"point {int(points.isnan().any(dim=1).nonzero()[0])} is NaN")
    as_good = (points[None] >= points[:, None]).all(dim=2)
    better = (points[None] > points[:, None]).any(dim=2)
    return ~(as_good & better).any(dim=1)


def hypervolume(points: Tensor, reference: Sequence[float] | Tensor) -> float:
    """Area that a set of points dominates above a reference point.

        HV = area of ∪_c [ref_0, x_c] × [ref_1, y_c]                                    (Zitzler & Thiele
        1998)

    Args:
        points: [C, 2], both coordinates better when larger. C may be 0.
        reference: the worst point that counts [2]; points not above it in both add nothing.

    Returns:
        The area. It depends on the reference: fix one for all systems.

    Raises:
        ValueError: shapes do not fit, or NaN.
    """
    require_ndim("points", points, "C 2")
    corner = torch.as_tensor(reference, dtype=torch.float64).cpu()
    if points.shape[1] != 2 or corner.shape != (2,):
        raise ValueError(f"need points [C, 2] and reference [2], got {tuple(points.shape)} and {reference}")
    sides = points.detach().double().cpu() - corner
    if bool(sides.isnan().any()):
        raise ValueError("points or reference hold NaN")
    sides = sides[(sides > 0).all(dim=1)]
    area, height = 0.0, 0.0
    # From the right: each point adds the strip by which it stands above all points right of it.
    for width, top in sides[sides[:, 0].argsort(descending=True)].tolist():
        area += width * max(0.0, top - height)
        height = max(height, top)
    return area


def win_rate(wins: float, ties: float, losses: float) -> float:
    """Win rate of a side-by-side comparison, a tie being half a win.

        (W + T/2) / (W + T + L)                                                          (arXiv 2410.06084)

    For an interval, pass 1, ½ or 0 per vote to `bootstrap_mean`.

    Args:
        wins: W, votes for the system.
        ties: T.
        losses: L, votes for the other.

    Returns:
        Between 0 and 1; 0.5 is a draw.

    Raises:
        ValueError: a negative count, or no votes.
    """
    total = wins + ties + losses
    if min(wins, ties, losses) < 0 or not total > 0:
        raise ValueError(f"need votes, and none negative, got W={wins}, T={ties}, L={losses}")
    return (wins + ties / 2) / total


def _index(name: str, ids: Sequence[Hashable] | Tensor, length: int, at_least: int) -> tuple[Tensor, int]:
    """Number the ids 0, 1, …: index of each entry [C], and how many there are."""
    labels = ids.tolist() if isinstance(ids, Tensor) else list(ids)
    if len(labels) != length:
        raise ValueError(f"{len(labels)} {name} for {length} values")
    numbers = {label: number for number, label in enumerate(dict.fromkeys(labels))}
    if len(numbers) < at_least:
        raise ValueError(
            f"an interval over {name} needs at least {at_least} different ones, got {len(numbers)}"
        )
    return torch.tensor([numbers[label] for label in labels]), len(numbers)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw_counts(count: int, num_resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` things is drawn in each resample [B, count]."""
    draws = torch.randint(count, (num_resamples, count), generator=generator)
    zeros = torch.zeros(num_resamples, count, dtype=torch.float64)
    return zeros.scatter_add(1, draws, torch.ones_like(draws, dtype=torch.float64))


def _interval(estimate: float, resampled: Tensor, factors: Sequence[Tensor], confidence: float) -> Interval:
    """Percentile interval at a level widened for few clusters, so that it is as wide as Student's t.

    Args:
        estimate: of everything.
        resampled: the same of resamples [B].
        factors: what was resampled, prompts and perhaps seeds: the mean of each of their levels. Of a single
            factor only the number of levels matters.
        confidence: coverage of the interval.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    if len(resampled) < 100:
        raise ValueError(f"num_resamples must be at least 100, got {len(resampled)}")
    sizes = torch.tensor([len(means) for means in factors], dtype=torch.float64)
    variances = torch.stack([means.double().var() for means in factors]) / sizes
    if not bool(variances.sum() > 0):  # then the resamples do not differ either
        variances = torch.ones_like(variances)
    freedom = variances.sum().square() / (variances.square() / (sizes - 1)).sum()
    # A resample's variance is (n − 1)/n of the true one.
    widened = (variances.sum() / (variances * (sizes - 1) / sizes).sum()).sqrt()
    quantile = scipy.stats.t.ppf((1 - confidence) / 2, freedom.item())
    tail = float(scipy.stats.norm.cdf(widened.item() * quantile))
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return Interval(estimate, low, high, resampled.std().item())


def _two_sets(embeddings: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    for name, values in (("embeddings", embeddings), ("reference", reference)):
        require_ndim(name, values, "C D")
        if len(values) < 2:
            raise ValueError(f"{name} needs at least 2 rows, got {len(values)}")
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name} holds values that are not finite")
    if embeddings.shape[1] != reference.shape[1]:
        raise ValueError(
            f"embeddings of size {embeddings.shape[1]} against a reference of size {reference.shape[1]}: "
            "were they made by the same encoder?"
        )
    return embeddings.detach().double(), reference.detach().double()


def _symmetric_root(matrix: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(matrix)
    return vectors * eigenvalues.clamp(min=0).sqrt() @ vectors.mT


def _median_distance(points: Tensor) -> float:
    # torch.median takes the lower of two middle values, torch.quantile stops at 2^24 of them.
    distances = torch.pdist(points).sort().values
    return distances[[(len(distances) - 1) // 2, len(distances) // 2]].mean().item()
