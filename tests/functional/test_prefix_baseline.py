"""Prefix baseline: loops, and an exact enumeration that shows when it is unbiased and when it is not."""

import itertools

import numpy as np
import pytest
import torch

from diverse_cfg.functional.diversity import diversity_advantages, diversity_reward
from diverse_cfg.functional.prefix_baseline import (
    RidgeStatistics,
    code_segments,
    explained_variance,
    predict_values,
    prefix_rewards,
    ridge_statistics,
    segment_advantages,
    update_ridge,
)
from tests import oracles


def test_prefix_rewards_match_the_loop():
    """Catches a centre that contains the clip itself, and prefixes compared with prefixes."""
    prefixes, whole = torch.randn(2, 4, 3, 5, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    features = prefix_rewards(prefixes, whole)
    for p in range(2):
        expected = oracles.prefix_rewards(prefixes[p].numpy(), whole[p].numpy())
        np.testing.assert_allclose(features[p].numpy(), expected, rtol=1e-9, atol=1e-12)


def test_a_whole_clip_as_prefix_is_the_advantage():
    """Catches a scale or sign between the features and what they are to predict."""
    whole = torch.randn(3, 5, 4, dtype=torch.float64)
    features = prefix_rewards(whole[:, :, None], whole)
    torch.testing.assert_close(2 * features[..., 0], diversity_advantages(diversity_reward(whole)))


def test_ridge_recovers_a_linear_relation():
    """Catches a regression that reads later prefixes, or that mixes up samples."""
    features = torch.randn(50, 4, 3, dtype=torch.float64)
    targets = features @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    statistics = None
    for batch in range(5):
        rows = slice(10 * batch, 10 * batch + 10)
        statistics = update_ridge(statistics, ridge_statistics(features[rows], targets[rows]), decay=1.0)
    values = predict_values(statistics, features, ridge=1e-9)
    torch.testing.assert_close(values[..., 2], targets, rtol=1e-6, atol=1e-6)
    for m in range(3):
        design = features[..., : m + 1].flatten(0, 1).numpy()
        weights = np.linalg.lstsq(design, targets.flatten().numpy(), rcond=None)[0]
        np.testing.assert_allclose(values[..., m].flatten().numpy(), design @ weights, rtol=1e-5, atol=1e-6)
    share = explained_variance(values, targets)
    assert bool((share.diff() > 0).all()) and share[2].item() == pytest.approx(1)
    residual = (targets - values[..., 0]).numpy()
    assert share[0].item() == pytest.approx(1 - residual.var() / targets.numpy().var())


def test_ridge_forgets_and_starts_at_nothing():
    """Catches a baseline before anything was seen, and a past that never fades."""
    features, targets = torch.randn(4, 3, 2), torch.randn(4, 3)
    assert not predict_values(None, features).any()
    silent = ridge_statistics(torch.zeros_like(features), targets)
    assert not predict_values(silent, features).any()
    first, second = ridge_statistics(features, targets), ridge_statistics(2 * features, -targets)
    both = update_ridge(first, second, decay=0.25)
    torch.testing.assert_close(both.gram, 0.25 * first.gram + second.gram)
    torch.testing.assert_close(both.moments, 0.25 * first.moments + second.moments)
    weaker = predict_values(first, features, ridge=10.0)
    assert weaker.norm() < predict_values(first, features, ridge=1e-6).norm()


@pytest.mark.parametrize("gae_lambda", [0.0, 0.6, 1.0])
def test_segment_advantages_match_the_definition(gae_lambda):
    """Catches a sum that runs the wrong way or starts one segment late."""
    values, advantages = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    segments = segment_advantages(values, advantages, gae_lambda)
    for p, g in np.ndindex(2, 3):
        expected = oracles.segment_advantages(values[p, g].tolist(), advantages[p, g].item(), gae_lambda)
        np.testing.assert_allclose(segments[p, g].numpy(), expected, rtol=1e-12, atol=1e-12)
    without = segment_advantages(torch.zeros_like(values), advantages, 1.0)
    assert torch.equal(without, advantages[..., None].expand(2, 3, 5))


@pytest.mark.parametrize("delays", [(0, 1, 2, 3), (0, 0, 1, 1, 2, 2, 3, 3)])
def test_segments_count_decoder_steps(delays):
    """Catches a code that is put behind a prefix which was not finished when the code was sampled."""
    segments = code_segments([2, 5], 9, delays)
    for k, t in np.ndindex(len(delays), 9):
        step = t + delays[k]
        finished = [frames for frames in (2, 5) if frames - 1 + 3 < step]
        assert segments[k, t].item() == len(finished)


# ---- exact enumeration: 3 codebooks × 2 frames of binary codes, all 64 clips, all 64³ groups ---------------

CELLS = [(k, t) for k in range(3) for t in range(2)]
CLIPS = np.array(list(itertools.product(range(2), repeat=len(CELLS))))


def code_logps(parameters):
    """log π of every code of every clip [64, 6]; a code sees all codes of earlier decoder steps."""
    rows = []
    for clip in CLIPS:
        for cell, (k, t) in enumerate(CELLS):
            past = [clip[other] if sum(CELLS[other]) < k + t else 2 for other in range(len(CELLS))]
            context = int(sum(value * 3**place for place, value in enumerate(past)))
            rows.append((cell, context, clip[cell]))
    cells, contexts, codes = (torch.tensor(column) for column in zip(*rows, strict=True))
    logps = parameters[cells, contexts].log_softmax(dim=-1)
    return logps.gather(1, codes[:, None]).view(len(CLIPS), len(CELLS))


def exact_and_expected_gradient(segments, gae_lambda):
    """Exact ∇D of the policy above, and the expectation of the estimator over all groups of three."""
    generator = torch.Generator().manual_seed(5)
    parameters = torch.randn(len(CELLS), 3 ** len(CELLS), 2, generator=generator, dtype=torch.float64)
    parameters.requires_grad_()
    whole = torch.randn(len(CLIPS), 3, generator=generator, dtype=torch.float64)
    # The prefix of one frame: what it embeds to depends on the codes of frame 0 alone, without any structure.
    by_beginning = torch.randn(2, 2, 2, 3, generator=generator, dtype=torch.float64)
    beginning = by_beginning[tuple(torch.from_numpy(CLIPS[:, 0::2].T))]

    logps = code_logps(parameters)
    policy = logps.sum(dim=1).exp()
    unit = whole / whole.norm(dim=1, keepdim=True)
    (exact,) = torch.autograd.grad(policy @ (1 - unit @ unit.mT) @ policy, parameters, retain_graph=True)

    groups = torch.cartesian_prod(*[torch.arange(len(CLIPS))] * 3)
    features = prefix_rewards(beginning[groups][:, :, None], whole[groups])
    # Any weight will do: unbiasedness must not depend on the quality of the regression.
    statistics = RidgeStatistics(torch.ones(1, 1).double(), torch.full((1,), -3.0).double())
    values = predict_values(statistics, features)
    advantages = segment_advantages(values, diversity_advantages(diversity_reward(whole[groups])), gae_lambda)
    per_code = advantages[..., segments.flatten()]  # [groups, 3, 6]
    weight = policy.detach()[groups].prod(dim=1)[:, None, None] / 3 * per_code
    per_clip = torch.zeros(len(CLIPS), len(CELLS), dtype=torch.float64)
    per_clip.index_add_(0, groups.flatten(), weight.flatten(0, 1))
    (expected,) = torch.autograd.grad((per_clip * logps).sum(), parameters)
    return exact, expected


def test_lambda_one_is_unbiased_whatever_the_values():
    """Catches a baseline that knows something of the code it serves: the expectation would leave ∇D."""
    segments = code_segments([1], 2, (0, 1, 2))
    assert segments.tolist() == [[0, 0], [0, 0], [0, 1]]
    exact, expected = exact_and_expected_gradient(segments, 1.0)
    assert exact.abs().max() > 1e-3
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("segments", "gae_lambda"),
    [(torch.tensor([[0, 1]] * 3), 1.0), (code_segments([1], 2, (0, 1, 2)), 0.6)],
    ids=["frames instead of steps", "lambda below one"],
)
def test_what_the_docstring_calls_biased_is(segments, gae_lambda):
    """Catches an enumeration that would pass anything, and claims of unbiasedness that do not hold."""
    exact, expected = exact_and_expected_gradient(segments, gae_lambda)
    assert (expected - exact).norm() > 0.01 * exact.norm()


def test_bad_input_is_named():
    """Catches groups too small, prefixes outside the clip, and statistics of other prefixes."""
    with pytest.raises(ValueError, match="num_generations >= 3, got 2"):
        prefix_rewards(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4))
    with pytest.raises(ValueError, match="differ in shape"):
        prefix_rewards(torch.randn(1, 3, 3, 4), torch.randn(1, 3, 5))
    for frames in ([], [3, 2], [0, 2], [2, 9], [2, 2]):
        with pytest.raises(ValueError, match="prefix_frames must increase and lie between 1 and 8"):
            code_segments(frames, 9, (0, 1, 2, 3))
    with pytest.raises(ValueError, match="statistics of 2 prefixes"):
        predict_values(RidgeStatistics(torch.eye(2), torch.ones(2)), torch.randn(1, 3, 3))
    with pytest.raises(ValueError, match="gae_lambda must lie in"):
        segment_advantages(torch.zeros(1, 3, 2), torch.zeros(1, 3), 1.1)
    with pytest.raises(ValueError, match="decay must be above 0"):
        update_ridge(None, ridge_statistics(torch.zeros(1, 3, 2), torch.zeros(1, 3)), 0.0)
    with pytest.raises(ValueError, match="ridge must be above 0"):
        predict_values(None, torch.zeros(1, 3, 2), ridge=0.0)
