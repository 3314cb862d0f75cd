"""Intervals by simulation, distances by closed forms and loops, areas by brute force."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch

from diverse_cfg.functional.statistics import (
    bootstrap_mean,
    frechet_distance,
    hypervolume,
    jackknife_statistic,
    mmd,
)
from tests import oracles


def simulated(generator, num_prompts=20, num_seeds=3, num_clips=4, of_seeds=0.0):
    """Clips of prompts and seeds around a true mean of 0: values, prompt ids, seed ids."""
    values = generator.normal(size=(num_prompts, 1, 1)) + of_seeds * generator.normal(size=(1, num_seeds, 1))
    values = values + generator.normal(size=(num_prompts, num_seeds, num_clips))
    prompts, seeds, _ = np.indices(values.shape)
    return torch.from_numpy(values.ravel()), prompts.ravel().tolist(), seeds.ravel().tolist()


def coverage(ids_of, simulations=200, **kinds):
    """How often the interval contains the true mean."""
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(simulations):
        values, prompts, seeds = simulated(generator, **kinds)
        interval = bootstrap_mean(values, *ids_of(prompts, seeds), num_resamples=300)
        hits += interval.low <= 0 <= interval.high
    return hits / simulations


def test_coverage_of_the_clustered_bootstrap():
    """Catches intervals that are too narrow: 95 % of 200 simulations, give or take three errors."""
    assert 0.90 <= coverage(lambda prompts, seeds: (prompts,)) <= 0.995


def test_clips_and_seeds_are_no_clusters():
    """Catches pooling by clip, or by prompt *and* seed: both promise more than they hold."""
    assert coverage(lambda prompts, seeds: (range(len(prompts)),)) < 0.75
    assert coverage(lambda prompts, seeds: (list(zip(prompts, seeds, strict=True)),)) < 0.85


def test_seeds_that_differ_need_to_be_drawn():
    """Catches an interval for new training seeds that was computed as if the seeds were fixed."""
    assert coverage(lambda prompts, seeds: (prompts,), of_seeds=1.0) < 0.75
    for of_seeds in (0.0, 0.1, 0.3, 1.0):
        assert coverage(lambda prompts, seeds: (prompts, seeds), of_seeds=of_seeds) > 0.89, of_seeds


def test_three_seeds_that_agree_cost_little():
    """Catches a widening by the number of seeds however little they differ: twice as wide, and covering always."""
    widths = np.array([0.0, 0.0])
    generator = np.random.default_rng(3)
    for _ in range(40):
        values, prompts, seeds = simulated(generator, num_prompts=60)
        for which, ids in enumerate([(prompts,), (prompts, seeds)]):
            interval = bootstrap_mean(values, *ids, num_resamples=300)
            widths[which] += interval.high - interval.low
    assert 1.0 < widths[1] / widths[0] < 1.35


def test_standard_error_has_its_closed_form():
    """Catches resampling anything but whole prompts: se² = Σ (mean_p − mean)² / P² for equal clusters."""
    values, prompts, _ = simulated(np.random.default_rng(1), num_prompts=15)
    means = values.view(15, -1).mean(dim=1)
    interval = bootstrap_mean(values, prompts, num_resamples=20000)
    expected = (means - means.mean()).square().sum().sqrt().item() / 15
    assert interval.standard_error == pytest.approx(expected, rel=0.03)
    assert interval.estimate == pytest.approx(values.mean().item(), rel=1e-12)


def test_few_prompts_are_widened():
    """Catches plain percentiles, 15 % too narrow for 8 prompts: without skew the interval is Student's t."""
    values = torch.tensor(scipy.stats.norm.ppf((np.arange(8) + 0.5) / 8))
    interval = bootstrap_mean(values, range(8), num_resamples=20000)
    expected = scipy.stats.t.ppf(0.975, 7) * values.std().item() / 8**0.5
    assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.035)


def test_seeds_that_differ_most_are_widened_as_few():
    """Catches the degrees of freedom of the many prompts where the few seeds are what varies."""
    effects = torch.tensor(scipy.stats.norm.ppf((np.arange(8) + 0.5) / 8))
    values = effects.repeat(50) + 0.01 * torch.linspace(-1, 1, 50).double().repeat_interleave(8)
    prompts, seeds = torch.arange(50).repeat_interleave(8), torch.arange(8).repeat(50)
    interval = bootstrap_mean(values, prompts, seeds, num_resamples=20000)
    expected = scipy.stats.t.ppf(0.975, 7) * effects.std().item() / 8**0.5
    assert (interval.high - interval.low) / 2 == pytest.approx(expected, rel=0.05)


def test_clusters_may_be_uneven_and_named():
    """Catches a mean of prompt means where prompts have different numbers of clips, and ids tied to order."""
    values = torch.tensor([1.0, 1.0, 1.0, 5.0])
    interval = bootstrap_mean(values, ["piano", "piano", "piano", "drums"])
    assert interval.estimate == 2.0
    assert (interval.low, interval.high) == (1.0, 5.0)
    shuffled = bootstrap_mean(values[[3, 0, 1, 2]], torch.tensor([9, 4, 4, 4]))
    assert shuffled.estimate == 2.0


@pytest.mark.parametrize("ratio", [0, 1, 20, math.inf])
def test_three_seeds_cover_however_much_they_differ(ratio):
    """Catches percentiles, which cannot leave the range of three seeds: 75 to 86 % where these differ most.

    `ratio` is the seeds' variance of the mean over the prompts'; 92 % is 95 % less two errors of 1000 simulations.
    """
    num_prompts, num_seeds = 30, 3
    generator, hits = np.random.default_rng(5), 0
    of_prompts, of_seeds = (0, 1) if ratio == math.inf else (1, (ratio * num_seeds / num_prompts) ** 0.5)
    prompts, seeds = (index.ravel().tolist() for index in np.indices((num_prompts, num_seeds)))
    for _ in range(1000):
        values = of_prompts * generator.normal(size=(num_prompts, 1))
        values = values + of_seeds * generator.normal(size=(1, num_seeds))
        values = values + 0.3 * generator.normal(size=(num_prompts, num_seeds))
        interval = bootstrap_mean(torch.from_numpy(values.ravel()), prompts, seeds)
        hits += interval.low <= 0 <= interval.high
    assert 0.92 <= hits / 1000 <= 0.985


def test_prompts_cannot_narrow_what_seeds_leave_open():
    """Catches degrees of freedom that jump when a little variance of many prompts is added to that of few seeds."""
    values = torch.tensor([-1.0, 0.0, 1.0]).repeat(40).double()
    values += torch.linspace(-2, 2, 40).double().repeat_interleave(3)
    interval = bootstrap_mean(values, torch.arange(40).repeat_interleave(3), torch.arange(3).repeat(40))
    of_seeds = scipy.stats.t.ppf(0.975, 2) / 3**0.5
    assert (interval.high - interval.low) / 2 >= of_seeds - 1e-12


def test_the_jackknife_of_a_mean_is_students_interval():
    """Catches a wrong factor, and prompts or seeds that are left out of the interval."""
    values = np.random.default_rng(6).normal(size=(12, 4)) + np.arange(4)

    def mean(prompts, seeds):
        return values[prompts.numpy()][:, seeds.numpy()].mean()

    over_prompts = jackknife_statistic(lambda prompts, _: mean(prompts, torch.arange(4)), 12)
    low, high = scipy.stats.t.interval(0.95, 11, values.mean(), scipy.stats.sem(values.mean(axis=1)))
    assert over_prompts[:3] == pytest.approx((values.mean(), low, high), rel=1e-9)
    both = jackknife_statistic(mean, 12, 4)
    prompts, seeds = (index.ravel().tolist() for index in np.indices(values.shape))
    assert both == pytest.approx(bootstrap_mean(torch.from_numpy(values.ravel()), prompts, seeds), rel=1e-9)


def test_many_prompts_are_left_out_in_groups():
    """Catches a thousand Fréchet distances, and groups that leave prompts out twice or never."""
    values, calls = np.random.default_rng(7).normal(size=1000), []

    def mean(prompts, seeds):
        calls.append(len(prompts))
        return values[prompts.numpy()].mean()

    interval = jackknife_statistic(mean, 1000, max_groups=50)
    assert sorted(set(calls)) == [980, 1000] and len(calls) == 51
    assert interval.standard_error == pytest.approx(scipy.stats.sem(values), rel=0.25)


def test_a_statistic_that_needs_every_prompt_has_no_interval():
    """Catches a failed row where the number itself is fine."""
    found = jackknife_statistic(lambda prompts, _: 1.0 if len(prompts) == 3 else math.nan, 3)
    assert found.estimate == 1 and all(math.isnan(value) for value in found[1:])


@pytest.mark.parametrize(
    ("distance", "between"),
    [(frechet_distance, 0.0), (frechet_distance, 0.7), (lambda x, y: mmd(x, y, bandwidth=2.0), 0.7)],
)
def test_distances_lie_in_intervals_that_cover_their_variation(distance, between):
    """Catches resampled prompts: equal clips in a sample shrink covariances and enter the kernel's pairs, so that
    the interval lies above its own estimate.

    Clips distributed as the reference, alike within a prompt by `between`; what has to be covered is the mean of the
    estimates at this number of clips.
    """
    generator, dimension = torch.Generator().manual_seed(8), 4
    shape, scale = (24, 4, dimension), (1 + between**2) ** 0.5
    reference = scale * torch.randn(80, dimension, generator=generator).double()
    intervals = []
    for _ in range(50):
        clips = between * torch.randn(24, 1, dimension, generator=generator).double()
        clips = clips + torch.randn(shape, generator=generator).double()
        intervals.append(
            jackknife_statistic(lambda p, _, c=clips: distance(c[p].flatten(0, 1), reference), 24)
        )
    mean = np.mean([interval.estimate for interval in intervals])
    assert all(interval.low <= interval.estimate <= interval.high for interval in intervals)
    assert np.mean([interval.low <= mean <= interval.high for interval in intervals]) >= 0.88


def test_bad_input_of_the_bootstrap_is_named():
    """Catches intervals from one prompt, from NaN, and from an incomplete crossing of prompts and seeds."""
    values = torch.zeros(6)
    with pytest.raises(ValueError, match="prompt_ids needs at least 2 different ones, got 1"):
        bootstrap_mean(values, [0] * 6)
    with pytest.raises(ValueError, match="seed_ids needs at least 3 different ones, got 2"):
        bootstrap_mean(values, [0, 0, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1])
    with pytest.raises(ValueError, match="1 of 2 prompts × 3 seeds have no value"):
        bootstrap_mean(values, [0, 0, 0, 1, 1, 1], [0, 1, 2, 0, 1, 1])
    with pytest.raises(ValueError, match="5 prompt_ids for 6 values"):
        bootstrap_mean(values, range(5))
    with pytest.raises(ValueError, match="1 of 6 values are not finite"):
        bootstrap_mean(torch.tensor([0, 0, 0, 0, 0, float("nan")]), range(6))
    with pytest.raises(ValueError, match="num_resamples must be at least 100"):
        bootstrap_mean(values, range(6), num_resamples=10)
    with pytest.raises(ValueError, match="at least 2 of them, got 1"):
        jackknife_statistic(lambda prompts, seeds: 0.0, 1)


def test_frechet_closed_forms():
    """Catches a missing square, a missing factor 2 and covariances divided by the wrong count."""
    x = torch.randn(40, 6, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    shift = torch.arange(6.0).double()
    assert frechet_distance(x + shift, x) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    centre = x.mean(dim=0)
    spread = x.var(dim=0).sum().item()
    assert frechet_distance(centre + 3 * (x - centre), x) == pytest.approx(4 * spread, rel=1e-9)


@pytest.mark.parametrize("count", [30, 5])
def test_frechet_matches_scipy(count):
    """Catches a root of the wrong product; with fewer clips than dimensions the covariances are singular."""
    x, y = torch.randn(count, 6).double(), 0.5 + 2 * torch.randn(25, 6).double()
    expected = oracles.frechet_distance(x.numpy(), y.numpy())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_mmd_matches_the_loop():
    """Catches the biased estimate (diagonals kept) and the bandwidth of the wrong set."""
    x, y = torch.randn(7, 3, dtype=torch.float64), 1 + torch.randn(8, 3, dtype=torch.float64)
    bandwidth = oracles.median_distance(y.numpy())
    expected = oracles.mmd(x.numpy(), y.numpy(), lambda a, b: oracles.rbf(a, b, bandwidth))
    assert mmd(x, y) == pytest.approx(expected, rel=1e-10)


def test_mmd_is_unbiased():
    """Catches any bias: over all samples of two and two out of three points, the mean is the true MMD²."""
    points = np.array([[0.0, 1.0], [2.0, 0.5], [-1.0, 3.0]])
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.2, 0.7])
    gram = np.array([[oracles.rbf(a, b, 1.5) for b in points] for a in points])
    exact = (p - q) @ gram @ (p - q)
    mean = 0.0
    for a, b, c, d in itertools.product(range(3), repeat=4):
        value = mmd(torch.tensor(points[[a, b]]), torch.tensor(points[[c, d]]), bandwidth=1.5)
        mean += p[a] * p[b] * q[c] * q[d] * value
    assert mean == pytest.approx(exact, rel=1e-10)


def test_bad_sets_are_named():
    """Catches embeddings of two encoders, sets of one, NaN, and a reference without any spread."""
    x = torch.randn(4, 3)
    for function in (frechet_distance, mmd):
        with pytest.raises(ValueError, match="size 3 against a reference of size 2"):
            function(x, x[:, :2])
        with pytest.raises(ValueError, match="reference needs at least 2 rows, got 1"):
            function(x, x[:1])
        with pytest.raises(ValueError, match="embeddings holds values that are not finite"):
            function(x / 0, x)
    with pytest.raises(ValueError, match=r"bandwidth must be finite and above 0, got 0\.0"):
        mmd(x, torch.ones(4, 3))


def test_hypervolume_matches_brute_force():
    """Catches dominated points that count, and strips counted twice."""
    generator = np.random.default_rng(4)
    for count in (1, 2, 5, 12):
        points = generator.integers(-2, 7, size=(count, 2)).astype(float)
        expected = oracles.hypervolume(points.tolist(), (0.0, 1.0))
        assert hypervolume(torch.from_numpy(points), (0.0, 1.0)) == pytest.approx(expected, abs=1e-12)
    assert hypervolume(torch.empty(0, 2), (0, 0)) == 0


def test_bad_points_are_named():
    """Catches a failed system (NaN) that would be drawn on the front."""
    with pytest.raises(ValueError, match="NaN"):
        hypervolume(torch.tensor([[float("nan"), 2]]), (0, 0))
    with pytest.raises(ValueError, match=r"points \[C, 2\] and reference \[2\]"):
        hypervolume(torch.zeros(3, 3), (0, 0))
