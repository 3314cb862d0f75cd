"""Statistics of an evaluation: intervals by prompt, distances between distributions, areas under fronts.

Clips of one prompt resemble each other, so prompts, not clips, are what an interval resamples or leaves out.
Everything is computed in float64.
"""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import scipy.stats
import torch
from torch import Tensor

from diverse_cfg.functional._checks import require_ndim


class _Interval(NamedTuple):
    """An estimate with its 95 % interval."""

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
) -> _Interval:
    """Mean with an interval from a bootstrap over prompts.

        x̄* = Σ_p n*_p · Σ_{c∈p} x_c / Σ_p n*_p · |p|,   n* = how often each prompt was drawn (Efron 1979)

    All clips of a prompt move together, those of *all seeds* included: a prompt generated under three seeds
    is one cluster, not three. Such an interval holds for these training seeds and new prompts. It takes
    percentiles, at a level widened for few prompts as Student's t would be (Hesterberg, arXiv 1411.5279):
    plain percentiles of 20 prompts cover 92 % instead of 95 %.

    With `seed_ids` it holds for new seeds too. Percentiles cannot, since no resample of three seeds leaves
    their range; so the interval is Student's, of the two factors' variances:

        x̄ ± max(t_ν·√(V_p + V_r), t_{R−1}·√V_r),     ν = (V_p + V_r)² / (V_p²/(P − 1) + V_r²/(R − 1))
        V_p = P/(P − 1) · Σ_p (Σ_{c∈p} (x_c − x̄))² / C²,   V_r alike          (= var_p(x̄_p) / P if balanced)

    with the degrees of freedom of Satterthwaite (1946), who covers 92 % where three seeds differ most; the
    second term, the seeds' own interval, mends that: what prompts add cannot narrow it. What is left of a
    clip beside prompt and seed is counted twice, which errs on the wide side (the third term of Cameron,
    Gelbach & Miller 2011 would take it off, at 91 % coverage for three seeds).

    Args:
        values: one number per clip, or per prompt and seed [C].
        prompt_ids: the prompt of each value [C], any hashable.
        seed_ids: the training or sampling seed of each value [C]; None keeps the seeds fixed.
        num_resamples: bootstrap draws; of no use with `seed_ids`.

    Returns:
        Estimate (the plain mean of all values), interval and standard error.

    Raises:
        ValueError: values not finite or not one-dimensional, counts differ, fewer than two prompts or three
            seeds, a prompt without a value for some seed (with `seed_ids`), or fewer than 100 resamples.
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
    if seed_ids is not None:
        factors = [
            (_clustered_variance(values, prompts, num_prompts), num_prompts),
            (_clustered_variance(values, seeds, num_seeds), num_seeds),
        ]
        return _student(values.mean().item(), factors)
    draws = _draw_counts(num_prompts, num_resamples)
    return _interval(values.mean().item(), draws @ sums / (draws @ counts), num_prompts)


def jackknife_statistic(
    statistic: Callable[[Tensor, Tensor], float],
    num_prompts: int,
    num_seeds: int = 1,
    *,
    max_groups: int = 100,
) -> _Interval:
    """Any smooth statistic of a set of prompts (Fréchet, MMD, hypervolume) with an interval around it.

        V_p = (P − 1)/P · Σ_i (s_(i) − s̄_(·))²,   s_(i) = the statistic without prompt i

    (Efron & Tibshirani, An Introduction to the Bootstrap, ch. 11), V_r alike over seeds from three on, and
    Student's interval of both as in `bootstrap_mean`, with which it agrees for a mean. No clip is ever there
    twice: the bootstrap's repeated prompts shrink covariances and count pairs of equal clips, which moves
    distances between distributions so far that a percentile interval misses its own estimate. Above
    `max_groups` prompts, groups of them are left out together (Shao & Tu, The Jackknife and Bootstrap, 2.3).

    The interval tells how the statistic varies with prompts, at this number of them: a bias that it has for
    few clips, as Fréchet's distance, stays in it. Statistics that are not smooth (a median) are not covered.

    Args:
        statistic: from the indices of prompts and of seeds, each without repetitions, to a number.
        num_prompts: P.
        num_seeds: R; below three the seeds are kept.
        max_groups: most prompts that are left out one by one.

    Returns:
        The statistic of everything, interval and standard error; these are NaN where the statistic is NaN
        for what is left.

    Raises:
        ValueError: P < 2.
    """
    if num_prompts < 2:
        raise ValueError(f"an interval over prompts needs at least 2 of them, got {num_prompts}")
    prompts, seeds = torch.arange(num_prompts), torch.arange(num_seeds)
    groups = min(num_prompts, max_groups)
    without = [statistic(prompts[prompts % groups != group], seeds) for group in range(groups)]
    factors = [(_jackknife_variance(without), groups)]
    if num_seeds >= 3:
        without = [statistic(prompts, seeds[seeds != seed]) for seed in range(num_seeds)]
        factors.append((_jackknife_variance(without), num_seeds))
    return _student(float(statistic(prompts, seeds)), factors)


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


def mmd(embeddings: Tensor, reference: Tensor, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy between two sets of embeddings.

        MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2·mean_ij k(x_i, y_j)

    with k = exp(−‖x − y‖² / 2σ²), σ the median distance inside the reference (KAD, arXiv 2502.15602, which
    multiplies by a constant that is left out here). It may be slightly negative for equal distributions: that
    is what unbiased means.

    Args:
        embeddings: [C, D].
        reference: [C', D].
        bandwidth: σ; None takes the median.

    Returns:
        MMD².

    Raises:
        ValueError: sizes do not fit, fewer than two rows, values that are not finite, or a bandwidth that is
            not above 0 (such as the median of a constant reference).
    """
    first, second = _two_sets(embeddings, reference)
    sigma = _median_distance(second) if bandwidth is None else bandwidth
    if not (math.isfinite(sigma) and sigma > 0):
        raise ValueError(f"bandwidth must be finite and above 0, got {sigma} (is the reference constant?)")

    def gram(x: Tensor, y: Tensor) -> Tensor:
        distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp(-(distances / sigma).square() / 2)

    def within(x: Tensor) -> Tensor:
        values = gram(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return (within(first) + within(second) - 2 * gram(first, second).mean()).item()


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


def _draw_counts(count: int, num_resamples: int) -> Tensor:
    """How often each of `count` things is drawn in each resample [B, count]."""
    draws = torch.randint(count, (num_resamples, count), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(num_resamples, count, dtype=torch.float64)
    return zeros.scatter_add(1, draws, torch.ones_like(draws, dtype=torch.float64))


def _interval(estimate: float, resampled: Tensor, num_prompts: int) -> _Interval:
    """Percentile interval of resamples [B] at a level widened for few prompts, as wide as Student's t."""
    if len(resampled) < 100:
        raise ValueError(f"num_resamples must be at least 100, got {len(resampled)}")
    # A resample's variance is (P − 1)/P of the true one.
    quantile = _t_quantile(num_prompts - 1) * (num_prompts / (num_prompts - 1)) ** 0.5
    tail = float(scipy.stats.norm.cdf(-quantile))
    low, high = torch.quantile(resampled, torch.tensor([tail, 1 - tail], dtype=torch.float64)).tolist()
    return _Interval(estimate, low, high, resampled.std().item())


def _student(estimate: float, factors: Sequence[tuple[float, int]]) -> _Interval:
    """Student's interval of an estimate with a variance of its own from each factor, prompts and perhaps seeds.

    Args:
        estimate: its middle.
        factors: variance of the estimate and number of levels, for each factor.
    """
    total = sum(variance for variance, _ in factors)
    half = 0.0
    if total != 0:  # NaN included
        freedom = total**2 / sum(variance**2 / (count - 1) for variance, count in factors)
        half = _t_quantile(freedom) * total**0.5
    # What another factor adds must not narrow a factor's own interval.
    own = [_t_quantile(count - 1) * variance**0.5 for variance, count in factors]
    half = max([half, *own]) if math.isfinite(half) else math.nan
    return _Interval(estimate, estimate - half, estimate + half, total**0.5)


def _t_quantile(freedom: float) -> float:
    """Half the width of a 95 % interval, in standard errors."""
    return float(scipy.stats.t.ppf(0.975, freedom))


def _clustered_variance(values: Tensor, clusters: Tensor, count: int) -> float:
    """Variance of the mean of values [C] that are independent between `count` clusters [C] alone."""
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, clusters, values - values.mean())
    return count / (count - 1) * sums.square().sum().item() / len(values) ** 2


def _jackknife_variance(values: Sequence[float]) -> float:
    """From the statistics that leave out one of n things each."""
    left = torch.tensor([float(value) for value in values], dtype=torch.float64)
    return (len(left) - 1) / len(left) * (left - left.mean()).square().sum().item()


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
