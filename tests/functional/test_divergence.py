"""Divergences per cell: values against loops, gradients against the table and against finite differences."""

import math

import numpy as np
import pytest
import torch

from diverse_cfg.functional.divergence import (
    forward_kl,
    generalized_jsd,
    named_divergence,
    reverse_kl,
)
from tests import oracles

NAMES = ["reverse_kl", "forward_kl", "generalized_jsd"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_matches_the_loop(name, temperature):
    """Catches swapped arguments, swapped mixture weights and a temperature on one side only."""
    student, teacher = 2 * torch.randn(2, 3, 4, 6, dtype=torch.float64)
    values = named_divergence(name, student, teacher, alpha=0.2, temperature=temperature)
    for index in np.ndindex(3, 4):
        expected = oracles.divergence(name, student[index].numpy(), teacher[index].numpy(), 0.2, temperature)
        assert values[index].item() == pytest.approx(expected, rel=1e-10)


def test_hand_computed():
    """Catches KL(p ‖ q) and KL(q ‖ p) traded: p = (3/4, 1/4), q = (1/2, 1/2)."""
    student, teacher = torch.tensor([3.0, 1.0]).log(), torch.tensor([1.0, 1.0]).log()
    assert reverse_kl(student, teacher).item() == pytest.approx(0.75 * math.log(3) - math.log(2), abs=1e-6)
    assert forward_kl(student, teacher).item() == pytest.approx(math.log(2) - 0.5 * math.log(3), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_gradient(name):
    """Catches a gradient that stops at the wrong operand; `gradcheck` compares with finite differences."""
    student = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 5, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: named_divergence(name, s, teacher, 0.3, 0.7), (student,))


def test_jsd_limits_and_bounds():
    """Catches the swapped weights that once shipped in TRL: the limits trade places and the bound breaks."""
    student, teacher = torch.randn(2, 50, 6, dtype=torch.float64)
    low, high = (generalized_jsd(student, teacher, alpha) / 1e-6 for alpha in (1e-6, 1 - 1e-6))
    torch.testing.assert_close(low, reverse_kl(student, teacher), rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(high, forward_kl(student, teacher), rtol=1e-2, atol=1e-4)
    for alpha in (0.05, 0.5, 0.9):
        bound = -(alpha * math.log(alpha) + (1 - alpha) * math.log(1 - alpha))
        disjoint = generalized_jsd(torch.tensor([60.0, -60.0]), torch.tensor([-60.0, 60.0]), alpha)
        assert disjoint.item() == pytest.approx(bound, abs=1e-6)
        assert generalized_jsd(student, teacher, alpha).max() <= bound
    torch.testing.assert_close(generalized_jsd(student, teacher), generalized_jsd(teacher, student))


@pytest.mark.parametrize("name", NAMES)
def test_shift_invariant_zero_on_itself_and_wide(name):
    """Catches logits taken for log-probs, and arithmetic in half precision."""
    student, teacher = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(
        named_divergence(name, student + 5, teacher - 3),
        named_divergence(name, student, teacher),
        atol=1e-5,
        rtol=1e-4,
    )
    assert named_divergence(name, student, student).abs().max() < 1e-6
    halves = student.bfloat16(), teacher.bfloat16()
    assert torch.equal(
        named_divergence(name, *halves), named_divergence(name, halves[0].float(), halves[1].float())
    )
    assert named_divergence(name, student.double(), teacher.double()).dtype == torch.float64


def test_poison_stays():
    """Catches a NaN that is averaged away."""
    student = torch.zeros(2, 3)
    student[1, 0] = float("nan")
    assert reverse_kl(student, torch.zeros(2, 3)).isnan().tolist() == [False, True]


def test_bad_input_is_named():
    """Catches endpoints of alpha that would silently train on zero, and other values that mean nothing."""
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"student_logits and teacher_logits differ in shape"):
        reverse_kl(logits, logits[:1])
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got 0"):
        forward_kl(logits, logits, temperature=0)
    for alpha in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match="alpha must lie between 0 and 1"):
            generalized_jsd(logits, logits, alpha)
    with pytest.raises(ValueError, match="got 'kl'"):
        named_divergence("kl", logits, logits)
