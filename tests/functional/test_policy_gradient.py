"""Policy gradient per code, against loops and against the exact gradient of an enumerated policy."""

import itertools

import numpy as np
import pytest
import torch

from diverse_cfg.functional.distillation import _surrogate
from diverse_cfg.functional.diversity import leave_one_out_advantages
from tests import oracles


@pytest.mark.parametrize("num_generations", [2, 3, 6])
def test_leave_one_out_matches_the_loop(num_generations):
    """Catches a baseline that contains the generation itself, or that mixes prompts."""
    rewards = torch.randn(3, num_generations, dtype=torch.float64)
    expected = [oracles.leave_one_out_advantages(row) for row in rewards.numpy()]
    np.testing.assert_allclose(leave_one_out_advantages(rewards).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_leave_one_out_is_unbiased():
    """Catches a scale such as (G − 1)/G: the mean over all groups of three is the exact gradient of E[r]."""
    logits, reward = np.array([0.3, -1.0, 0.8, 0.1]), np.array([1.0, 4.0, -2.0, 0.5])
    policy = oracles.softmax(logits)
    score = np.eye(4) - policy
    exact = np.einsum("a,a,ac->c", policy, reward, score)
    groups = np.array(list(itertools.product(range(4), repeat=3)))
    advantages = leave_one_out_advantages(torch.from_numpy(reward[groups])).numpy()
    estimates = np.einsum("pg,pgc->pc", advantages, score[groups]) / 3
    np.testing.assert_allclose(policy[groups].prod(axis=1) @ estimates, exact, rtol=1e-10)


def test_reinforce():
    """Catches the sign, and a slope that is not the weight."""
    logps, weights = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    values, slopes = _surrogate(logps, weights)
    torch.testing.assert_close(values, weights * logps)
    assert torch.equal(slopes, weights)


def test_clipped_surrogate_matches_the_cases():
    """Catches minimum and maximum traded, clip bounds applied to the wrong sign, a slope of another value."""
    logps, old = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 0.4
    advantages = torch.randn(3, 4, 5, dtype=torch.float64)
    values, slopes = _surrogate(logps, -advantages, old, 0.2, 0.3)
    ahead, _ = _surrogate(logps + 1e-7, -advantages, old, 0.2, 0.3)
    behind, _ = _surrogate(logps - 1e-7, -advantages, old, 0.2, 0.3)
    for index in np.ndindex(3, 4, 5):
        expected = oracles.clipped_surrogate(
            logps[index].item(), old[index].item(), advantages[index].item(), 0.8, 1.3
        )
        assert values[index].item() == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(slopes, (ahead - behind) / 2e-7, rtol=1e-5, atol=1e-7)
    assert 0 < (slopes == 0).double().mean() < 1


def test_on_policy_surrogate_has_the_slope_of_reinforce():
    """Catches a surrogate whose first step differs from the on-policy one."""
    logps, weights = torch.randn(2, 4, 3), torch.randn(2, 4, 3)
    torch.testing.assert_close(_surrogate(logps, weights, logps)[1], _surrogate(logps, weights)[1])


def test_bad_input_is_named():
    """Catches a group of one, flat rewards, and a clip range that is none."""
    with pytest.raises(ValueError, match="num_generations >= 2, got 1"):
        leave_one_out_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\[P, G\], got \(3,\)"):
        leave_one_out_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match="0 < epsilon < 1"):
        _surrogate(torch.zeros(3), torch.zeros(3), torch.zeros(3), epsilon=0.0)
