"""Policy gradient per code, against loops and against the exact gradient of an enumerated policy."""

import itertools
import math

import numpy as np
import pytest
import torch

from diverse_cfg.functional.policy_gradient import (
    clipped_surrogate_loss,
    importance_ratios,
    leave_one_out_advantages,
    reinforce_loss,
)
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
    """Catches the sign, and advantages spread over the wrong axis."""
    logps = torch.randn(2, 4, 3, requires_grad=True)
    loss = reinforce_loss(logps, torch.tensor([2.0, -1.0]))
    loss.sum().backward()
    assert torch.equal(logps.grad, torch.tensor([-2.0, 1.0])[:, None, None].expand(2, 4, 3))
    per_code = torch.randn(2, 4, 3)
    torch.testing.assert_close(reinforce_loss(logps, per_code), -per_code * logps)


def test_clipped_surrogate_matches_the_cases():
    """Catches minimum and maximum traded, and clip bounds applied to the wrong sign of the advantage."""
    logps, old = torch.randn(2, 3, 4, 5, dtype=torch.float64) * 0.4
    advantages = torch.randn(3, 4, 5, dtype=torch.float64)
    loss = clipped_surrogate_loss(logps, old, advantages, 0.2, 0.3)
    ratios = (logps - old).exp()
    clipped = ((ratios > 1.3) & (advantages > 0)) | ((ratios < 0.8) & (advantages < 0))
    for index in np.ndindex(3, 4, 5):
        expected = oracles.clipped_surrogate(
            logps[index].item(), old[index].item(), advantages[index].item(), 0.8, 1.3
        )
        assert loss[index].item() == pytest.approx(expected, rel=1e-10)
    logps.requires_grad_()
    clipped_surrogate_loss(logps, old, advantages, 0.2, 0.3).sum().backward()
    assert torch.equal(logps.grad == 0, clipped)
    assert 0 < clipped.double().mean() < 1


def test_on_policy_surrogate_has_the_gradient_of_reinforce():
    """Catches a surrogate whose first step differs from the on-policy one."""
    logps = torch.randn(2, 4, 3, requires_grad=True)
    advantages = torch.randn(2)
    (first,) = torch.autograd.grad(clipped_surrogate_loss(logps, logps.detach(), advantages).sum(), logps)
    (second,) = torch.autograd.grad(reinforce_loss(logps, advantages).sum(), logps)
    torch.testing.assert_close(first, second)


def test_ratios_are_per_code_and_leave_old_alone():
    """Catches a ratio of whole clips, and a gradient into what was recorded while sampling."""
    logps, old = (
        torch.zeros(1, 2, 2, requires_grad=True),
        torch.full((1, 2, 2), math.log(0.5), requires_grad=True),
    )
    ratios = importance_ratios(logps, old)
    torch.testing.assert_close(ratios, torch.full((1, 2, 2), 2.0))
    ratios.sum().backward()
    assert old.grad is None and logps.grad is not None


def test_bad_input_is_named():
    """Catches a group of one, unfolded log-probs [N, T·K], and advantages [P, G]."""
    logps = torch.zeros(6, 4, 3)
    with pytest.raises(ValueError, match="num_generations >= 2, got 1"):
        leave_one_out_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"\[P, G\], got \(3,\)"):
        leave_one_out_advantages(torch.zeros(3))
    with pytest.raises(ValueError, match=r"logps must have shape \[N, K, T\], got \(6, 12\)"):
        reinforce_loss(logps.flatten(1), torch.zeros(6))
    with pytest.raises(ValueError, match=r"advantages must be one per clip \[6\] or per code"):
        reinforce_loss(logps, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="logps and old_logps differ in shape"):
        importance_ratios(logps, logps[:1])
    with pytest.raises(ValueError, match="0 < epsilon < 1"):
        clipped_surrogate_loss(logps, logps, torch.zeros(6), epsilon=0.0)
