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

from diverse_cfg.musicgen import sampling
from diverse_cfg.musicgen.sampling import SamplingSettings, draw, invert, keyed_uniforms, sampling_logits


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
    together = keyed_uniforms(7, [3, 1, 2**63], 4, 10)
    for row, sample_id in enumerate([3, 1, 2**63]):
        assert torch.equal(keyed_uniforms(7, [sample_id], 4, 10)[0], together[row])
    assert torch.equal(keyed_uniforms(7, [3], 4, 25)[0, :, :10], together[0])
    assert together.unique().numel() > 0.99 * together.numel()
    assert not torch.equal(keyed_uniforms(8, [3], 4, 10)[0], together[0])
    # (seed, id) is a key, not a sum.
    assert not torch.equal(keyed_uniforms(8, [2], 4, 10), keyed_uniforms(7, [3], 4, 10))


def test_random_numbers_are_uniform_and_leave_the_global_state():
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    numbers = keyed_uniforms(0, range(100), 4, 50)
    assert torch.equal(torch.get_rng_state(), state[0])
    assert np.array_equal(np.random.get_state()[1], state[1])
    assert stats.kstest(numbers.flatten().numpy(), "uniform").pvalue > 1e-3
    assert numbers.min() >= 0
    assert numbers.max() < 1


@pytest.mark.parametrize(("seed", "sample_id"), [(-1, 0), (2**64, 0), (0, -1), (0, 2**64)])
def test_keys_that_do_not_fit_are_refused(seed, sample_id):
    with pytest.raises(ValueError, match="2\\*\\*64"):
        keyed_uniforms(seed, [sample_id], 4, 3)


def test_inversion_against_a_loop():
    probabilities = random_logits(200, 12).softmax(-1)
    probabilities[:, [0, 5, 11]] = 0
    uniforms = torch.rand(200, generator=torch.Generator().manual_seed(1))
    uniforms[:2] = torch.tensor(
        [0.0, sampling._LARGEST_UNIFORM]
    )  # the ends must not fall on codes of probability 0
    codes, logps, totals = invert(probabilities, uniforms)
    for row in range(200):
        p = probabilities[row].double()
        mass, code = 0.0, -1
        while mass <= float(uniforms[row]) * float(p.sum()):
            code += 1
            mass += float(p[code])
        assert codes[row] == code
        assert math.isclose(logps[row], math.log(p[code]), abs_tol=1e-6)
    assert torch.isfinite(totals).all()


def test_not_a_number_shows_in_the_total_and_stays_inside_the_table():
    logits = random_logits(3, 12)
    logits[1, 4] = math.nan
    logits[2, 4] = math.inf
    codes, _, totals = draw(logits, torch.full((3,), 0.999))
    assert torch.isfinite(totals).tolist() == [True, False, False]
    assert codes.max() < 12
    assert torch.isfinite(draw(logits, torch.zeros(3), greedy=True)[2]).tolist() == [True, False, False]


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
    """χ² of 20,000 draws against exact probabilities: catches a shifted or truncated inversion."""
    settings = SamplingSettings(**settings)
    logits = random_logits(1, 12)
    uniforms = keyed_uniforms(0, range(100), 4, 50).flatten()
    kept = sampling_logits(logits, settings).expand(len(uniforms), -1)
    codes, _, _ = draw(kept, uniforms)
    probabilities = kept[0].double().softmax(-1)
    alive = probabilities > 0
    observed = torch.bincount(codes, minlength=12)
    assert observed[~alive].sum() == 0
    expected = (probabilities * len(uniforms))[alive]
    assert stats.chisquare(observed[alive].numpy(), expected.numpy()).pvalue > 1e-3
