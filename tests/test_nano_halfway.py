"""Two students half way: averaged logits, and clips drawn from either."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from diverse_cfg.evaluation.generations import Player
from diverse_cfg.musicgen.rollout import fast_generate
from tests.tiny import PROMPTS, save_tiny

RECIPE = Path(__file__).parents[1] / "recipes" / "nano"


@pytest.fixture(autouse=True)
def recipe_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPE))
    yield
    sys.modules.pop("halfway", None)


def test_equal_students_average_to_themselves(tmp_path, monkeypatch):
    """Catches random numbers of other clips, and logits of a decoder that did not hear what was drawn."""
    import halfway

    monkeypatch.setattr(halfway, "FRAMES", 12)
    monkeypatch.setattr(halfway, "GENERATIONS", 2)
    first, second = (save_tiny(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    player, other = Player(((first, 1.0),)), Player(((second, 1.0),))
    alone = fast_generate(
        player.model,
        PROMPTS,
        processor=player.processor,
        num_frames=12,
        num_generations=2,
        seed=3,
        decode=False,
    ).codes
    assert torch.equal(halfway.sample([player], PROMPTS, 3), alone)
    assert torch.equal(halfway.sample([player, player], PROMPTS, 3), alone)
    assert not torch.equal(halfway.sample([player, other], PROMPTS, 3), alone)
    assert torch.equal(halfway.sample([player], PROMPTS[1:], 3, first_clip=2), alone[2:])


def test_mixed_clips_are_pairs_of_either_student():
    """By simulation: each clip of a pair comes from one of two students at random, and none is paired with itself."""
    from halfway import mixed_clips

    generator = np.random.default_rng(0)
    both = generator.normal(size=(2, 1, 5, 3))
    unit = both / np.linalg.norm(both, axis=-1, keepdims=True)
    distances = []
    for _ in range(20_000):
        (a, b), (i, j) = generator.integers(2, size=2), generator.integers(5, size=2)
        while a == b and i == j:
            i, j = generator.integers(5, size=2)
        distances.append(1 - unit[a, 0, i] @ unit[b, 0, j])
    found = mixed_clips(*(torch.from_numpy(side) for side in both))
    assert found.shape == (1,)
    assert found[0] == pytest.approx(np.mean(distances), abs=4 * np.std(distances) / 20_000**0.5)
