"""Guided logits."""

import numpy as np
import pytest
import torch

from diverse_cfg.functional.guidance import (
    adaptive_guidance,
    before_agreement,
    guidance_schedule,
    guided_logits,
    total_variation,
)
from tests import oracles


def test_guided_logits_match_the_loop():
    """Catches swapped branches and a scale that is off by one (γ − 1, or 1 + γ)."""
    cond, uncond = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)
    guided = guided_logits(cond, uncond, 2.5)
    for index in np.ndindex(2, 3):
        expected = oracles.guided_logits(cond[index].numpy(), uncond[index].numpy(), 2.5)
        np.testing.assert_allclose(guided[index].numpy(), expected, rtol=1e-12)


def test_ends_are_the_two_branches():
    """Catches a "no guidance" that is not bit for bit the conditional model."""
    cond, uncond = torch.randn(4, 7), torch.randn(4, 7)
    assert torch.equal(guided_logits(cond, uncond, 1.0), cond)
    assert torch.equal(guided_logits(cond, uncond, 0.0), uncond)


@pytest.mark.parametrize("shape", [(6,), (2, 1, 1), (2, 3, 6)])
def test_scale_may_vary_over_the_codes(shape):
    """Catches a schedule applied along the vocabulary or along another axis than the frames."""
    cond, uncond = torch.randn(2, 3, 6, 6), torch.randn(2, 3, 6, 6)
    scale = torch.rand(shape) * 4
    guided = guided_logits(cond, uncond, scale)
    full = scale.expand(2, 3, 6)
    for index in np.ndindex(2, 3, 6):
        one = guided_logits(cond[index], uncond[index], full[index].item())
        torch.testing.assert_close(guided[index], one)


def test_half_precision_is_widened_first():
    """Catches guidance in bfloat16, whose rounding the scale multiplies; and float64 narrowed to float32."""
    cond, uncond = torch.randn(100).bfloat16(), torch.randn(100).bfloat16()
    guided = guided_logits(cond, uncond, 3.0)
    assert guided.dtype == torch.float32
    assert torch.equal(guided, guided_logits(cond.float(), uncond.float(), 3.0))
    assert guided_logits(cond.double(), uncond, 3.0).dtype == torch.float64


def test_bad_input_is_named():
    """Catches broadcasting over a mistake and a NaN scale that would poison a whole run."""
    with pytest.raises(ValueError, match=r"cond and uncond differ in shape: \(2, 5\) and \(1, 5\)"):
        guided_logits(torch.zeros(2, 5), torch.zeros(1, 5), 3.0)
    with pytest.raises(ValueError, match="guidance_scale must be finite, got nan"):
        guided_logits(torch.zeros(2, 5), torch.zeros(2, 5), float("nan"))
    with pytest.raises(ValueError, match=r"\(5,\), which does not broadcast to \(2,\)"):
        guided_logits(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(5))


@pytest.mark.parametrize(
    ("schedule", "wanted"),
    [
        ("constant", [3, 3, 3, 3, 3]),
        ("linear", [3, 2.5, 2, 1.5, 1]),
        ("cosine", [3, 2 + 0.5**0.5, 2, 2 - 0.5**0.5, 1]),
        ("interval 0.25 0.5", [1, 3, 3, 1, 1]),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
    ],
)
def test_schedules_of_five_frames(schedule, wanted):
    assert guidance_schedule(schedule, 3.0, 5) == pytest.approx(wanted)


@pytest.mark.parametrize(
    "schedule",
    ["ramp", "interval", "interval 0.5", "interval 0.6 0.2", "interval a b", "interval 0 2", [1.0]],
)
def test_what_is_no_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match="guidance_schedule"):
        guidance_schedule(schedule, 3.0, 5)


def test_guidance_ends_after_steps_that_agree_in_a_row():
    """Faults: steps that are not in a row, an end one step off, and guidance that comes back."""
    low, high = 0.09, 0.1  # below 0.1 is agreement
    variation = torch.tensor([[high, low, low, high, low, low, low, high], [low, low, low] + 5 * [high]])
    guided = before_agreement(variation, 0.1, 3).int().tolist()
    assert guided == [[1, 1, 1, 1, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0, 0]]
    assert before_agreement(variation, 0.05, 1).all()
    p, q = torch.tensor([0.5, 0.25, 0.25]).log(), torch.tensor([0.25, 0.25, 0.5]).log() + 3
    assert total_variation(p, q).item() == pytest.approx(0.25)


def test_adaptive_guidance_is_named_like_a_schedule():
    assert adaptive_guidance("adaptive 0.1 5") == (0.1, 5)
    assert adaptive_guidance("linear") is None and adaptive_guidance("") is None
    for wrong in (
        "adaptive",
        "adaptive 0.1",
        "adaptive 0 5",
        "adaptive 2 5",
        "adaptive 0.1 0",
        "adaptive 0.1 5 5",
    ):
        with pytest.raises(ValueError, match=f"'{wrong}' must name a total variation in"):
            adaptive_guidance(wrong)
