"""Weighted sums of state dicts and of LoRA factors."""

import numpy as np
import pytest
import torch

from diverse_cfg.functional.interpolation import (
    LoraFactors,
    concatenate_lora,
    lerp,
    lora_delta,
    weighted_sum,
)


def state(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "layer.weight": torch.randn(3, 4, generator=generator).to(dtype),
        "norm.bias": torch.randn(4, generator=generator).to(dtype),
        "steps": torch.tensor([7]),
    }


@pytest.mark.parametrize("weights", [(0.25, 0.25, 0.5), (2.0, -0.7, -0.3), (0.0, 1.0, 0.0)])
def test_weighted_sum_matches_numpy(weights):
    """Catches weights paired with the wrong model and signs that get lost."""
    states = [state(seed) for seed in range(3)]
    merged = weighted_sum(states, weights, dtype=torch.float64)
    for name in ("layer.weight", "norm.bias"):
        expected = sum(w * s[name].double().numpy() for w, s in zip(weights, states, strict=True))
        np.testing.assert_allclose(merged[name].numpy(), expected, rtol=1e-12, atol=1e-15)
    assert merged["steps"].item() == 7


def test_lerp_ends_are_exact_and_new():
    """Catches λ and 1 − λ traded, rounding at the ends, and results that alias a model."""
    start, end = state(0), state(1)
    for weight, expected in ((0.0, start), (1.0, end)):
        merged = lerp(start, end, weight)
        assert all(torch.equal(merged[name], expected[name]) for name in start)
        assert all(merged[name].data_ptr() != expected[name].data_ptr() for name in start)
    middle = lerp(start, end, 0.25)
    expected = 0.75 * start["norm.bias"] + 0.25 * end["norm.bias"]
    torch.testing.assert_close(middle["norm.bias"], expected)
    beyond = lerp(start, end, 1.5)
    torch.testing.assert_close(beyond["norm.bias"], 1.5 * end["norm.bias"] - 0.5 * start["norm.bias"])


def test_small_differences_survive():
    """Catches a sum in half precision, which loses what fine-tuning changed (1e-4)."""
    base = {"w": torch.ones(1000, dtype=torch.bfloat16)}
    tuned = {"w": torch.full((1000,), 1 + 1e-4)}
    merged = lerp(base, tuned, 0.5)
    assert merged["w"].dtype == torch.float32
    torch.testing.assert_close(merged["w"], torch.full((1000,), 1 + 0.5e-4), rtol=0, atol=1.5e-7)


def test_what_models_share_stays_bit_for_bit():
    """Catches a frozen codec that drifts by a rounding error in every merge."""
    shared = {"codec": torch.randn(2000)}
    for merged in (lerp(shared, shared, 0.35), weighted_sum([shared] * 3, [1 / 3] * 3)):
        assert torch.equal(merged["codec"], shared["codec"])


def test_bad_state_dicts_are_named():
    """Catches merges of different models, and averages of what has none."""
    first, second = state(0), state(1)
    with pytest.raises(ValueError, match=r"1 names are not in both state dicts, such as \['norm.bias'\]"):
        lerp(first, {k: v for k, v in second.items() if k != "norm.bias"}, 0.5)
    with pytest.raises(ValueError, match=r"layer.weight has shapes \(3, 4\) and \(4, 3\)"):
        lerp(first, second | {"layer.weight": torch.zeros(4, 3)}, 0.5)
    with pytest.raises(ValueError, match=r"steps \(torch.int64\) differs"):
        lerp(first, second | {"steps": torch.tensor([8])}, 0.5)
    with pytest.raises(ValueError, match=r"steps has types torch.int64 and torch.float32"):
        lerp(first, second | {"steps": torch.tensor([7.0])}, 0.5)
    with pytest.raises(ValueError, match="got 1 for 2"):
        weighted_sum([first, second], [1.0])
    with pytest.raises(ValueError, match="got 0 for 0"):
        weighted_sum([], [])
    with pytest.raises(ValueError, match="finite"):
        lerp(first, second, float("nan"))
    with pytest.raises(ValueError, match="all weights are zero"):
        weighted_sum([first, second], [0.0, 0.0])
    with pytest.raises(ValueError, match=r"torch.float32 or torch.float64, got torch.bfloat16"):
        lerp(first, second, 0.5, dtype=torch.bfloat16)


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
