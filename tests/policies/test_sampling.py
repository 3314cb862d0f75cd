"""Draws and filters, held against loops, transformers' warpers and exact probabilities."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diverse_cfg.policies.sampler import draws as sampling
from diverse_cfg.policies.sampler.draws import (
    SamplingSettings,
    draw,
    group_sizes,
    keyed_noise,
    race,
    sampling_logits,
)


def random_logits(*shape, seed=0):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "wrong",
    [
        {"guidance_scale": 0.5},
        {"guidance_scale": 0.0},
        {"guidance_scale": math.nan},
        {"guidance_scale": math.inf},
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"temperature": 1e-40},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": 1.0},
        {"min_p": math.nan},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    (name, value), *_ = wrong.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        SamplingSettings(**wrong)


def test_a_clips_random_numbers_are_its_own():
    """Not its batch's, not its order's, and a longer clip begins like a shorter one."""
    together = keyed_noise(7, [3, 1, 2**63], 4, 10, 6)
    assert together.shape == (3, 4, 10, 3 + 2)
    for row, sample_id in enumerate([3, 1, 2**63]):
        assert torch.equal(keyed_noise(7, [sample_id], 4, 10, 6)[0], together[row])
    assert torch.equal(keyed_noise(7, [3], 4, 25, 6)[0, :, :10], together[0])
    assert together.unique().numel() > 0.99 * together.numel()
    assert not torch.equal(keyed_noise(8, [3], 4, 10, 6)[0], together[0])
    # (seed, id) is a key, not a sum.
    assert not torch.equal(keyed_noise(8, [2], 4, 10, 6), keyed_noise(7, [3], 4, 10, 6))


def test_random_numbers_are_exponential_and_leave_the_global_state():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    numbers = keyed_noise(0, range(100), 4, 50, 6)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert stats.kstest(numbers.flatten().numpy(), "expon").pvalue > 1e-3
    assert numbers.min() > 0
    assert torch.isfinite(numbers).all()


@pytest.mark.parametrize(
    ("vocab_size", "sizes"), [(2048, (64, 32)), (512, (32, 16)), (12, (4, 3)), (7, (7, 1)), (1, (1, 1))]
)
def test_groups_are_as_even_as_can_be(vocab_size, sizes):
    assert group_sizes(vocab_size) == sizes


@pytest.mark.parametrize(("seed", "sample_id"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_keys_that_do_not_fit_are_refused(seed, sample_id):
    with pytest.raises(ValueError, match="2\\*\\*64"):
        keyed_noise(seed, [sample_id], 4, 3, 12)


@pytest.mark.parametrize("vocab_size", [12, 7])
def test_a_race_against_a_loop(vocab_size):
    probabilities = random_logits(200, vocab_size).softmax(-1)
    probabilities[:, [0, 3, 5]] = 0
    probabilities /= probabilities.sum(-1, keepdim=True)
    groups, _ = group_sizes(vocab_size)
    noise = keyed_noise(1, range(200), 1, 1, vocab_size)[:, 0, 0]
    noise[:2] = sampling._LEAST  # even the least numbers draw no code of probability 0
    codes, logps, totals = race(probabilities, noise)
    for row in range(200):
        p, times = probabilities[row].tolist(), noise[row].tolist()
        masses = [sum(p[a::groups]) for a in range(groups)]
        group = max(range(groups), key=lambda a: masses[a] / times[a])
        code = max(range(group, vocab_size, groups), key=lambda v: p[v] / times[groups + v // groups])
        assert codes[row] == code
        assert p[code] > 0
        assert math.isclose(logps[row], math.log(p[code]), abs_tol=1e-6)
    torch.testing.assert_close(totals, torch.ones(200))


def test_rounding_hardly_ever_changes_a_draw():
    """Sums are rounded by the batch's size. Inverting the cumulative distribution would change 5 to 15 draws here."""
    logits = random_logits(100, 200, 2048)
    noise = keyed_noise(0, range(100), 1, 200, 2048)[:, 0]
    error = 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    codes, others = (draw(x, noise)[0] for x in (logits, logits + error))
    assert (codes != others).sum() <= 1


def test_not_a_number_shows_in_the_total_and_stays_inside_the_table():
    logits = random_logits(3, 12)
    logits[1, 4] = math.nan
    logits[2, 4] = math.inf
    codes, _, totals = draw(logits, torch.ones(3, 4 + 3))
    assert torch.isfinite(totals).tolist() == [True, False, False]
    assert codes.max() < 12
    assert torch.isfinite(draw(logits, torch.ones(3, 7), greedy=True)[2]).tolist() == [True, False, False]


@pytest.mark.parametrize("on_numpy", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 100},
        {"top_p": 0.6},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
    ],
)
def test_filters_are_those_of_transformers(settings, on_numpy, monkeypatch):
    """The same codes survive, in the same order of filters, on both code paths."""
    monkeypatch.setattr(sampling, "_on_numpy", lambda logits: on_numpy)
    logits = random_logits(64, 20)
    warpers = LogitsProcessorList()
    if "temperature" in settings:
        warpers.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        warpers.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        warpers.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        warpers.append(MinPLogitsWarper(settings["min_p"]))
    ours = sampling_logits(logits.clone(), SamplingSettings(**settings))
    torch.testing.assert_close(ours, warpers(torch.zeros(64, 1, dtype=torch.long), logits.clone()))


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.8, "top_k": 6}, {"temperature": 1.2, "top_p": 0.9}]
)
def test_draws_follow_the_distribution(settings):
    """χ² of 20,000 draws against exact probabilities: catches rounds that share noise, or have the wrong kind."""
    settings = SamplingSettings(**settings)
    logits = random_logits(1, 12)
    noise = keyed_noise(0, range(100), 4, 50, 12).flatten(0, 2)
    kept = sampling_logits(logits, settings).expand(len(noise), -1)
    codes, _, _ = draw(kept, noise)
    probabilities = kept[0].double().softmax(-1)
    alive = probabilities > 0
    observed = torch.bincount(codes, minlength=12)
    assert observed[~alive].sum() == 0
    expected = (probabilities * len(noise))[alive]
    assert stats.chisquare(observed[alive].numpy(), expected.numpy()).pvalue > 1e-3
