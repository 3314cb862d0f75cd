"""Weighted sums of tensors and of LoRA factors."""

import numpy as np
import pytest
import torch

from diverse_cfg.functional.interpolation import LoraFactors, concatenate_lora, lora_delta, weighted_sum


@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.5), (2.0, -0.7, -0.3), (0.0, 1.0, 0.0)])
def test_weighted_sum_matches_numpy(weights):
    """Catches weights paired with the wrong model, signs that get lost, and results that alias a model."""
    tensors = [torch.randn(3, 4) for _ in range(3)]
    merged = weighted_sum(tensors, weights, torch.float64)
    expected = sum(w * x.double().numpy() for w, x in zip(weights, tensors, strict=True))
    np.testing.assert_allclose(merged.numpy(), expected, rtol=1e-12, atol=1e-15)
    one = torch.ones(2, dtype=torch.float64)
    assert weighted_sum([one], [1.0], torch.float64).data_ptr() != one.data_ptr()


def test_small_differences_survive():
    """Catches a sum in half precision, which loses what fine-tuning changed (1e-4)."""
    merged = weighted_sum([torch.ones(1000).bfloat16(), torch.full((1000,), 1 + 1e-4)], [0.5, 0.5])
    assert merged.dtype == torch.float32
    torch.testing.assert_close(merged, torch.full((1000,), 1 + 0.5e-4), rtol=0, atol=1.5e-7)


def test_what_models_share_stays_bit_for_bit():
    """Catches a frozen codec that drifts by a rounding error in every merge."""
    shared = torch.randn(2000)
    for weights in ([0.65, 0.35], [1 / 3] * 3):
        assert torch.equal(weighted_sum([shared] * len(weights), weights), shared)


@pytest.mark.parametrize(
    ("weights", "dtype", "message"),
    [
        ([1.0], torch.float32, "got 1 for 2"),
        ([0.5, float("nan")], torch.float32, "finite"),
        ([0.0, 0.0], torch.float32, "all weights are zero"),
        ([0.5, 0.5], torch.bfloat16, "torch.float32 or torch.float64, got torch.bfloat16"),
    ],
)
def test_bad_sums_are_named(weights, dtype, message):
    """Catches weights that belong to other models, and averages that lose the difference."""
    with pytest.raises(ValueError, match=message):
        weighted_sum([torch.ones(2)] * 2, weights, dtype)


def adapters(ranks, dtype=torch.float64):
    return [LoraFactors(torch.randn(r, 5).to(dtype), torch.randn(6, r).to(dtype), 8 / r) for r in ranks]


def test_lora_delta():
    """Catches A and B traded and a scaling that is forgotten."""
    (factors,) = adapters([2])
    expected = 4.0 * factors.lora_b.numpy() @ factors.lora_a.numpy()
    np.testing.assert_allclose(lora_delta(*factors).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.6, -0.6), (-1.0, -2.0), (0.0, 1.0)])
def test_concatenation_is_the_weighted_sum_of_the_deltas(weights):
    """Catches PEFT's "linear" merge with its cross terms, and a square root that loses a minus."""
    first, second = adapters([2, 3])
    merged = concatenate_lora([first, second], weights)
    expected = weights[0] * lora_delta(*first) + weights[1] * lora_delta(*second)
    torch.testing.assert_close(lora_delta(*merged), expected, rtol=1e-12, atol=1e-12)
    assert merged.scaling == 1.0
    assert len(merged.lora_a) == sum(r for r, w in zip((2, 3), weights, strict=True) if w)
    halves = [LoraFactors(f.lora_a.bfloat16(), f.lora_b.bfloat16(), f.scaling) for f in (first, second)]
    assert concatenate_lora(halves, weights).lora_b.dtype == torch.float32


def test_bad_factors_are_named():
    """Catches factors of different layers, and factors given in the wrong order."""
    first, second = adapters([2, 3])
    with pytest.raises(ValueError, match=r"different sizes \[out, in\]: \[\(6, 4\), \(6, 5\)\]"):
        concatenate_lora([first, second._replace(lora_a=torch.zeros(3, 4))], [0.5, 0.5])
    with pytest.raises(ValueError, match=r"A \[r, in\] and B \[out, r\], got \(6, 2\) and \(2, 5\)"):
        lora_delta(first.lora_b, first.lora_a, 1.0)
    with pytest.raises(ValueError, match="scaling must be finite"):
        lora_delta(first.lora_a, first.lora_b, float("inf"))
    with pytest.raises(ValueError, match="all weights are zero"):
        concatenate_lora([first, second], [0.0, 0.0])
    with pytest.raises(ValueError, match="got 0 for 0"):
        concatenate_lora([], [])
