"""Divergences per cell: values against loops, gradients against the table and against finite differences."""

import math

import numpy as np
import pytest
import torch

from diverse_cfg.functional.divergence import DIVERGENCES
from tests import oracles

NAMES = list(DIVERGENCES)


def terms(name, student, teacher, alpha=0.5, temperature=1.0):
    """Value and slope from logits."""
    logps, teacher_logps = (logits.div(temperature).log_softmax(dim=-1) for logits in (student, teacher))
    return DIVERGENCES[name](logps, teacher_logps, logps.exp(), alpha)


def value(*args, **options):
    return terms(*args, **options)[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_the_loop(name, temperature):
    """Catches swapped arguments, swapped mixture weights and a temperature on one side only."""
    student, teacher = 2 * torch.randn(2, 3, 4, 6, dtype=torch.float64)
    values = value(name, student, teacher, alpha=0.2, temperature=temperature)
    for index in np.ndindex(3, 4):
        expected = oracles.divergence(name, student[index].numpy(), teacher[index].numpy(), 0.2, temperature)
        assert values[index].item() == pytest.approx(expected, rel=1e-10)


def test_hand_computed():
    """Catches KL(p ‖ q) and KL(q ‖ p) traded: p = (3/4, 1/4), q = (1/2, 1/2)."""
    student, teacher = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 1.0]).log()
    assert value("reverse_kl", student, teacher).item() == pytest.approx(
        0.75 * math.log(3) - math.log(2), abs=1e-6
    )
    assert value("forward_kl", student, teacher).item() == pytest.approx(
        math.log(2) - 0.5 * math.log(3), abs=1e-6
    )


@pytest.mark.parametrize("name", NAMES)
def test_slope(name):
    """Catches a slope that is another function's gradient, by finite differences of the value."""
    student, teacher = torch.randn(2, 5, dtype=torch.float64)
    _, slope = terms(name, student, teacher, 0.3, 0.7)
    for entry, step in enumerate(1e-6 * torch.eye(5, dtype=torch.float64)):
        difference = value(name, student + step, teacher, 0.3, 0.7) - value(
            name, student - step, teacher, 0.3, 0.7
        )
        assert slope[entry].item() / 0.7 == pytest.approx(difference.item() / 2e-6, rel=1e-6, abs=1e-9)


def test_jsd_limits_and_bounds():
    """Catches the swapped weights that once shipped in TRL: the limits trade places and the bound breaks."""
    student, teacher = torch.randn(2, 50, 6, dtype=torch.float64)
    low, high = (value("generalized_jsd", student, teacher, alpha) / 1e-6 for alpha in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(low, value("reverse_kl", student, teacher), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(high, value("forward_kl", student, teacher), rtol=1e-2, atol=1e-4)
    for alpha in (0.05, 0.5, 0.9):
        bound = -(alpha * math.log(alpha) + (1 - alpha) * math.log(1 - alpha))
        disjoint = value("generalized_jsd", torch.tensor([60.0, -60.0]), torch.tensor([-60.0, 60.0]), alpha)
        assert disjoint.item() == pytest.approx(bound, abs=1e-6)
        assert value("generalized_jsd", student, teacher, alpha).max() <= bound
    torch.testing.assert_close(
        value("generalized_jsd", student, teacher), value("generalized_jsd", teacher, student)
    )


@pytest.mark.parametrize("name", NAMES)
def test_shift_invariant_and_zero_on_itself(name):
    """Catches logits taken for log-probs."""
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(
        value(name, student + 5, teacher - 3),
        value(name, student, teacher),
        atol=1e-5,
        rtol=1e-4,
    )
    assert value(name, student, student).abs().max() < 1e-6


def test_poison_stays():
    """Catches a NaN that is averaged away."""
    student = torch.zeros(2, 3)
    student[1, 0] = float("nan")
    assert value("reverse_kl", student, torch.zeros(2, 3)).isnan().tolist() == [False, True]


def test_bad_input_is_named():
    """Catches endpoints of alpha that would silently train on zero."""
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
            value("generalized_jsd", torch.zeros(2, 3), torch.zeros(2, 3), alpha)
