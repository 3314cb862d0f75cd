"""Measures against slow loops and closed forms that share no code with them."""

import itertools
import math

import numpy as np
import pytest
import torch

from diverse_cfg.evaluation.metrics import (
    METRICS,
    Replicate,
    among_clean,
    clean_clips,
    clip_mean,
    codebook_entropy,
    different_prompts,
    to_reference,
    within_prompt_distance,
    within_prompt_vendi,
)
from diverse_cfg.facets import FACETS
from diverse_cfg.functional.statistics import frechet_distance, mmd
from tests import oracles

P, S, G, D = 3, 2, 4, 5


def replicate(values=None, **columns):
    """A replicate with the given embeddings or columns; codes are random."""
    generator = np.random.default_rng(0)
    if values is None:
        values = generator.normal(size=(P, S, G, D))
    features = {"reward": {"values": values}, "heldout": {"values": values}, "judge": columns}
    codes = generator.integers(0, 16, size=(*values.shape[:3], 2, 6))
    return Replicate(features, codes)


def test_diversity_is_the_mean_over_pairs_of_one_group():
    """Catches pairs across sampling seeds or prompts, and a diagonal that is counted."""
    values = np.random.default_rng(1).normal(size=(P, S, G, D))
    cells = within_prompt_distance("reward")(replicate(values))
    for p in range(P):
        groups = [
            np.mean([oracles.cosine_distance(a, b) for a, b in itertools.combinations(values[p, s], 2)])
            for s in range(S)
        ]
        assert cells[p] == pytest.approx(np.mean(groups), abs=1e-12)


def test_vendi_against_the_oracle_and_its_closed_forms():
    values = np.random.default_rng(2).normal(size=(P, S, G, D))
    cells = within_prompt_vendi("reward")(replicate(values))
    for p in range(P):
        assert cells[p] == pytest.approx(np.mean([oracles.vendi_score(group) for group in values[p]]))
    identity = np.broadcast_to(np.eye(G, D), (1, 1, G, D)).copy()
    assert within_prompt_vendi("reward")(replicate(identity)) == pytest.approx(G)
    assert within_prompt_vendi("reward")(replicate(np.ones((1, 1, G, D)))) == pytest.approx(1)


def test_identical_generations_have_no_diversity():
    same = np.repeat(np.random.default_rng(3).normal(size=(P, S, 1, D)), G, axis=2)
    np.testing.assert_allclose(within_prompt_distance("reward")(replicate(same)), 0, atol=1e-12)
    np.testing.assert_allclose(within_prompt_vendi("reward")(replicate(same)), 1, atol=1e-9)


def test_clips_without_an_embedding_earn_no_diversity():
    """Catches silence that passes for variety: its distances are undefined, and NaN or 1 would both be
    wrong."""
    values = np.random.default_rng(4).normal(size=(1, 1, G, D))
    values[0, 0, 0] = np.nan
    pairs = [oracles.cosine_distance(a, b) for a, b in itertools.combinations(values[0, 0, 1:], 2)]
    number_of_pairs = G * (G - 1) / 2
    cells = within_prompt_distance("reward")(replicate(values))
    assert cells[0] == pytest.approx(sum(pairs) / number_of_pairs)
    copied = values[0, 0].copy()
    copied[0] = copied[1]
    assert within_prompt_vendi("reward")(replicate(values))[0] == pytest.approx(oracles.vendi_score(copied))
    nothing = np.full((1, 1, G, D), np.nan)
    assert within_prompt_distance("reward")(replicate(nothing))[0] == 0
    assert within_prompt_vendi("reward")(replicate(nothing))[0] == pytest.approx(1)


def test_the_upper_bound_is_the_mean_over_pairs_of_different_prompts():
    values = np.random.default_rng(5).normal(size=(P, S, G, D))
    statistic = different_prompts("reward")(replicate(values))
    flat = values.reshape(P, S * G, D)

    def slow(prompts):
        distances = [
            oracles.cosine_distance(a, b)
            for p, q in itertools.permutations(prompts, 2)
            if p != q
            for a in flat[p]
            for b in flat[q]
        ]
        return np.mean(distances)

    assert statistic(torch.arange(P)) == pytest.approx(slow(range(P)))
    assert statistic(torch.tensor([0, 2])) == pytest.approx(slow([0, 2]))
    assert math.isnan(statistic(torch.tensor([1])))  # no other prompt


def test_a_silent_prompt_is_no_different_prompt():
    """Catches a prompt without any embedding that counts as far from all others."""
    values = np.repeat(np.random.default_rng(5).normal(size=(1, 1, 1, D)), P, axis=0)
    values[0] = np.nan
    statistic = different_prompts("reward")(replicate(values))
    assert statistic(torch.arange(P)) == pytest.approx(0, abs=1e-12)  # the others are all the same
    assert math.isnan(statistic(torch.tensor([0, 1])))


def test_entropy_of_codes():
    codes = np.zeros((2, 1, 2, 2, 4), dtype=int)
    codes[0, 0, :, 0] = [[0, 1, 2, 3], [4, 5, 6, 7]]  # eight different ones
    codes[1, 0, :, 0] = [[0, 0, 0, 0], [1, 1, 1, 1]]  # two, equally often
    codes[:, :, :, 1] = np.arange(4)  # another codebook, not to be read
    cells = codebook_entropy(0)(Replicate({}, codes))
    np.testing.assert_allclose(cells, [math.log(8), math.log(2)])


def test_a_mean_leaves_out_what_a_prompt_does_not_name():
    """Catches NaN that spreads, or counts as 0: a prompt without a key has no key to miss."""
    column = np.full((2, 1, 3), np.nan)
    column[0, 0] = [1, 0, np.nan]
    cells = clip_mean("judge", "key")(replicate(np.zeros((2, 1, 3, D)), key=column))
    assert cells[0] == 0.5
    assert np.isnan(cells[1])


@pytest.mark.parametrize(
    ("ours", "oracle"),
    [
        (frechet_distance, oracles.frechet_distance),
        (
            mmd,
            lambda x, y: oracles.mmd(x, y, lambda a, b: oracles.rbf(a, b, oracles.median_distance(y))),
        ),
    ],
)
def test_distances_to_reference_audio(ours, oracle):
    """All clips of the chosen prompts; clips without an embedding left out."""
    generator = np.random.default_rng(6)
    values, reference = generator.normal(size=(P, S, G, D)), generator.normal(0.3, 1.2, size=(30, D))
    values[1, 0, 2] = np.nan
    one = replicate(values)
    statistic = to_reference(ours)(Replicate(one.features, one.codes, reference=reference))
    flat = values.reshape(P, S * G, D)
    for chosen in ([0, 1, 2], [2, 1]):
        clips = np.concatenate([flat[p] for p in chosen])
        clips = clips[~np.isnan(clips).any(axis=1)]
        assert statistic(torch.tensor(chosen)) == pytest.approx(oracle(clips, reference), rel=1e-5)


def test_no_distance_of_silence_to_reference_audio():
    one = replicate(np.full((P, S, G, D), np.nan))
    statistic = to_reference(frechet_distance)(Replicate(one.features, one.codes, reference=np.eye(D)))
    assert math.isnan(statistic(torch.arange(P)))


# ---- clean clips ---------------------------------------------------------------------------------


def world_with_clean_clips(judge=True):
    """Per prompt: three of four clips clean under the first seed; one under the second; none at all."""
    generator = np.random.default_rng(3)
    shape = (3, 2, 4)
    valid, dying, right = np.ones(shape), np.zeros(shape), np.full(shape, np.nan)
    valid[0, 0, 3] = 0
    dying[0, 1, :3] = 1
    right[1], right[1, 1, :3] = 1, 0.75  # one of four attributes is missing
    right[2] = 0.0
    columns = {facet: generator.random((*shape, 6)) for facet in FACETS}
    features = {
        "validity": {"valid": valid, "dying": dying},
        "facets": columns,
        "heldout": {"values": generator.normal(size=(*shape, D))},
    }
    return Replicate(features | ({"judge": {"mean": right}} if judge else {}), np.zeros((*shape, 1, 1), int))


def test_clean_clips_are_valid_alive_and_right():
    """Fault: a clip that dies or misses its prompt counts, or one of which nothing is asked does not."""
    clean = clean_clips(world_with_clean_clips())
    assert clean.sum(dim=2).tolist() == [[3, 1], [4, 1], [0, 0]]
    assert clean_clips(world_with_clean_clips(judge=False))[1:].all()
    cells = {
        name: METRICS[name].cells(world_with_clean_clips()) for name in ("clean", "clean_prompts", "dying")
    }
    np.testing.assert_allclose(cells["clean"], [4 / 8, 5 / 8, 0])
    np.testing.assert_allclose(cells["clean_prompts"], [1, 1, 0])
    np.testing.assert_allclose(cells["dying"], [3 / 8, 0, 0])


def test_clean_diversity_is_the_mean_over_pairs_of_clean_clips():
    """Fault: the diagonal, an unclean clip, or clips of two seeds in a pair; a number for a prompt without pairs."""
    world = world_with_clean_clips()
    values = world.features["heldout"]["values"]
    cells = METRICS["clean_heldout"].cells(world)
    for prompt, count in ((0, 3), (1, 4)):
        pairs = itertools.combinations(values[prompt, 0, :count], 2)
        assert cells[prompt] == pytest.approx(np.mean([oracles.cosine_distance(a, b) for a, b in pairs]))
    assert math.isnan(cells[2])


def test_every_facet_has_its_metric():
    """Fault: a metric under the name of another facet."""
    world = world_with_clean_clips()
    for facet in FACETS:
        found = METRICS[f"clean_{facet}"].cells(world)
        others = [METRICS[f"clean_{other}"].cells(world)[0] for other in FACETS if other != facet]
        assert np.isfinite(found[:2]).all() and found[0] not in others


def test_distances_among_clean_clips_may_be_anything_else():
    ones = among_clean(lambda replicate: torch.ones(3, 2, 4, 4))(world_with_clean_clips())
    np.testing.assert_allclose(ones, [1, 1, np.nan])
