"""Two students half way: averaged logits, and clips drawn from either."""

from pathlib import Path

import numpy as np
import pytest
import torch

from diverse_cfg.evaluation.generations import Player
from diverse_cfg.evaluation.results import Results
from diverse_cfg.policies.sampler.rollout import fast_generate
from tests.tiny import PROMPTS, save_tiny

pytestmark = pytest.mark.usefixtures("nano_recipe")


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


def test_every_way_is_recorded_beside_the_line(tmp_path, monkeypatch):
    """Catches a team of the wrong students, a line that is not the parents' mean, and seeds that are mixed up."""
    import halfway

    def play(players, prompts, seed):
        mixtures = [
            [(Path(model).parent.name, weight) for model, weight in player.mixture] for player in players
        ]
        training_seed = int(players[0].mixture[0][0][-1])
        played.append((training_seed, seed, mixtures))
        angle = 0.1 * len(played)
        clips = torch.tensor([[1.0, 0.0], [np.cos(angle), np.sin(angle)]]).repeat(len(prompts), 1, 1)
        return clips, np.full(len(prompts), angle)

    played = []
    monkeypatch.setattr(halfway, "play", play)
    Results(["a", "b"], [], {}).save(tmp_path / "test")
    halfway.main(["--output", "runs", "--recorded", str(tmp_path), "--seeds", "0", "1"])
    one, two = [("beta-0", 1.0)], [("beta-80", 1.0)]
    teams = [[one], [two], [[("beta-0", 0.5), ("beta-80", 0.5)]], [one, two]]
    assert played == [(training_seed, 2, team) for training_seed in (0, 1) for team in teams]
    found = Results.load(tmp_path / "halfway")
    assert [row.system.name for row in found.systems] == [
        "quality student", "diversity student", "weights", "logits", "straight line", "clips"
    ]  # fmt: skip
    for name, angles in (("quality student", (0.1, 0.5)), ("weights", (0.3, 0.7)), ("logits", (0.4, 0.8))):
        cells = found[name].cells
        np.testing.assert_allclose(cells["adherence"], [angles] * 2)
        np.testing.assert_allclose(cells["diversity_heldout"], 1 - np.cos([angles] * 2), rtol=1e-5)
    np.testing.assert_allclose(found["straight line"].cells["adherence"], [(0.15, 0.55)] * 2)
    np.testing.assert_allclose(found["clips"].cells["adherence"], [(0.15, 0.55)] * 2)
