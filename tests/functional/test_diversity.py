"""Diversity: loops, exact enumeration of the gradient estimator, and the mistakes it must catch."""

import itertools

import numpy as np
import pytest
import torch

from diverse_cfg.functional.diversity import (
    diversity_advantages,
    diversity_reward,
    farthest_points,
    leave_one_out_advantages,
    pairwise_cosine_distance,
    vendi_score,
)
from tests import oracles


def test_distances_match_the_loop():
    """Catches rows compared across prompts, and embeddings that are not normalised."""
    embeddings = 5 * torch.randn(2, 4, 7, dtype=torch.float64)
    distances = pairwise_cosine_distance(embeddings)
    for p, i, j in np.ndindex(2, 4, 4):
        expected = oracles.cosine_distance(embeddings[p, i].numpy(), embeddings[p, j].numpy())
        assert distances[p, i, j].item() == pytest.approx(expected, abs=1e-12)
    assert not distances.diagonal(dim1=1, dim2=2).any()


def test_known_distances():
    """Catches a similarity taken for a distance: equal 0, orthogonal 1, opposite 2, whatever the length."""
    embeddings = torch.tensor([[[1.0, 0], [9.0, 0], [0, 2.0], [-3.0, 0]]])
    assert pairwise_cosine_distance(embeddings)[0, 0].tolist() == [0, 0, 1, 2]
    assert diversity_reward(embeddings)[0, 0].item() == 1.0
    same = torch.randn(1, 1, 50).expand(1, 6, 50)
    assert diversity_reward(same).abs().max() < 1e-6


@pytest.mark.parametrize("num_generations", [3, 4, 7])
def test_rewards_and_advantages_match_the_loop(num_generations):
    """Catches a mean over G instead of G − 1 and a baseline that is not the pairs without the generation."""
    embeddings = torch.randn(3, num_generations, 5, dtype=torch.float64)
    rewards = diversity_reward(embeddings)
    advantages = diversity_advantages(rewards)
    for p, group in enumerate(embeddings.numpy()):
        np.testing.assert_allclose(rewards[p].numpy(), oracles.diversity_rewards(group), rtol=1e-10)
        np.testing.assert_allclose(advantages[p].numpy(), oracles.diversity_advantages(group), rtol=1e-9)


def exact_and_expected_gradient(logits, embeddings, num_generations, advantages_of):
    """∇D of a softmax policy over a few sequences, in NumPy, and the mean estimate over all groups."""
    policy = oracles.softmax(logits)
    size = len(policy)
    distances = np.array([[oracles.cosine_distance(a, b) for b in embeddings] for a in embeddings])
    score = np.eye(size) - policy  # score[y, c] = ∂ log π(y) / ∂ logits[c]
    exact = 2 * np.einsum("a,b,ab,ac->c", policy, policy, distances, score)

    groups = np.array(list(itertools.product(range(size), repeat=num_generations)))
    rewards = diversity_reward(torch.from_numpy(embeddings[groups]))
    advantages = advantages_of(rewards).numpy()
    estimates = np.einsum("pg,pgc->pc", advantages, score[groups]) / num_generations
    return exact, policy[groups].prod(axis=1) @ estimates


def tiny_policy(size, seed=3):
    generator = np.random.default_rng(seed)
    return generator.normal(size=size), generator.normal(size=(size, 3))


@pytest.mark.parametrize(("size", "num_generations"), [(4, 3), (4, 4), (4, 8), (20, 3)])
def test_estimator_is_unbiased(size, num_generations):
    """Catches every bias of sign, baseline and scale: the mean over all groups is the exact gradient."""
    exact, expected = exact_and_expected_gradient(*tiny_policy(size), num_generations, diversity_advantages)
    assert np.abs(exact).max() > 0.01
    np.testing.assert_allclose(expected, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("num_generations", [3, 4, 8])
@pytest.mark.parametrize(
    ("mistake", "factor"),
    [
        (lambda r: -diversity_advantages(r), lambda g: -1),
        (lambda r: diversity_advantages(r) / 2, lambda g: 1 / 2),
        (lambda r: 2 * leave_one_out_advantages(r), lambda g: (g - 2) / (g - 1)),
        (lambda r: 2 * (r - r.mean(dim=1, keepdim=True)), lambda g: (g - 2) / g),
    ],
    ids=["sign", "one of the pair only", "ordinary leave-one-out", "mean with itself"],
)
def test_mistakes_are_seen(num_generations, mistake, factor):
    """Catches an enumeration that would pass anything: each mistake scales ∇D by the factor theory says."""
    exact, expected = exact_and_expected_gradient(*tiny_policy(4), num_generations, mistake)
    np.testing.assert_allclose(expected, factor(num_generations) * exact, rtol=1e-9, atol=1e-12)
    assert not np.allclose(expected, exact, rtol=1e-3)


def test_dividing_by_the_standard_deviation_changes_the_direction():
    """Catches GRPO's normalisation slipping in: its estimate is no multiple of ∇D."""
    exact, expected = exact_and_expected_gradient(
        *tiny_policy(4), 4, lambda r: diversity_advantages(r) / (r.std(dim=1, keepdim=True) + 1e-4)
    )
    cosine = exact @ expected / np.linalg.norm(exact) / np.linalg.norm(expected)
    assert cosine < 0.999


def test_two_generations_have_no_signal():
    """Catches TRL's default G = 2, where both rewards are equal whatever the policy does."""
    rewards = diversity_reward(torch.randn(5, 2, 4))
    torch.testing.assert_close(rewards[:, 0], rewards[:, 1])
    with pytest.raises(ValueError, match=r"num_generations >= 3, got 2.*diversity_coef=0"):
        diversity_advantages(rewards)
    with pytest.raises(ValueError, match="num_generations >= 2, got 1"):
        diversity_reward(torch.randn(5, 1, 4))


@pytest.mark.parametrize(
    ("broken", "norm"),
    [(torch.zeros(4), "0.0"), (torch.full((4,), float("nan")), "nan")],
    ids=["zero", "nan"],
)
@pytest.mark.parametrize("function", [pairwise_cosine_distance, diversity_reward, vendi_score])
def test_broken_embeddings_are_named(function, broken, norm):
    """Catches a silent or broken clip whose cosine would be invented."""
    embeddings = torch.randn(2, 3, 4)
    embeddings[1, 2] = broken
    with pytest.raises(ValueError, match=rf"embedding \(1, 2\) of shape \(2, 3, 4\) has norm {norm}"):
        function(embeddings)


def test_wrong_shapes_are_named():
    """Catches ungrouped rows [N, D] and rewards per clip [N]."""
    with pytest.raises(ValueError, match=r"embeddings must have shape \[P, G, D\], got \(8, 4\)"):
        diversity_reward(torch.randn(8, 4))
    with pytest.raises(ValueError, match=r"rewards must have shape \[P, G\], got \(8,\)"):
        diversity_advantages(torch.randn(8))
    with pytest.raises(ValueError, match=r"\[\.\.\., G, D\]"):
        vendi_score(torch.randn(8))


def test_vendi_score():
    """Catches eigenvalues of the unnormalised matrix and logarithms of another base."""
    assert vendi_score(torch.eye(6)).item() == pytest.approx(6, abs=1e-5)
    assert vendi_score(torch.ones(6, 3)).item() == pytest.approx(1, abs=1e-5)
    two_kinds = torch.eye(2)[[0, 0, 0, 1, 1, 1]]
    assert vendi_score(two_kinds).item() == pytest.approx(2, abs=1e-5)
    groups = torch.randn(2, 5, 3, dtype=torch.float64)
    for score, group in zip(vendi_score(groups), groups.numpy(), strict=True):
        assert score.item() == pytest.approx(oracles.vendi_score(group), rel=1e-9)


def test_half_precision_is_widened():
    """Catches cosines in bfloat16, whose steps near 1 are as large as the distances."""
    embeddings = (torch.ones(1, 4, 64) + 0.05 * torch.randn(1, 4, 64)).bfloat16()
    assert torch.equal(diversity_reward(embeddings), diversity_reward(embeddings.float()))
    assert diversity_advantages(diversity_reward(embeddings.double())).dtype == torch.float64


@pytest.mark.parametrize("seed", range(5))
def test_farthest_points_are_at_least_half_as_far_as_any_others(seed):
    """Catches a sum of distances, or the nearest, in place of the smallest distance; and a point chosen twice."""
    points = np.random.default_rng(seed).normal(size=(8, 2))
    points[3] = points[5]
    distances = np.linalg.norm(points[:, None] - points, axis=2)
    chosen = farthest_points(torch.from_numpy(distances), 4)
    assert chosen[0] == 0 and chosen[1] == int(distances[0].argmax()) and len(set(chosen)) == 4

    def smallest(some):
        return min(distances[i, j] for i, j in itertools.combinations(some, 2))

    assert smallest(chosen) >= 0.5 * max(map(smallest, itertools.combinations(range(8), 4)))
    assert sorted(farthest_points(torch.from_numpy(distances), 8)) == list(range(8))
    assert farthest_points(torch.zeros(3, 3), 3) == [0, 1, 2]
