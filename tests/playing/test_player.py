"""The player: takes of students, merges and the guided base, and how far it is."""

import threading
from pathlib import Path

import pytest
import torch

from diverse_cfg.assets import nano_path
from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.playing.player import Cost, Player, Progress, Wish
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.sampler.rollout import fast_generate
from diverse_cfg.policies.shift import GuidanceShift
from tests.checkpoints import edit_json
from tests.playing.worlds import save_students

WISH = Wish("a solo on a marimba", num_takes=4, seconds=1.0, seed=5, merge_weight=0.0)


@pytest.fixture(scope="module")
def player(tmp_path_factory):
    return Player(save_students(tmp_path_factory.mktemp("students")))


def played(player, wish, **how):
    events = list(player.play(wish, **how))
    return [event[0] for event in events if isinstance(event, tuple)], events


def test_takes_are_the_clips_of_their_seed(player):
    """Catches takes that nobody can make again: by λ, seed and number they are those of `fast_generate`."""
    takes, events = played(player, Wish("a solo on a marimba", 3, 1.0, seed=5, merge_weight=1.0))
    base = load_policy(nano_path())
    clips = fast_generate(
        base, ["a solo on a marimba"] * 3, processor=load_processor(nano_path()), num_frames=25, seed=5
    )
    assert [take.codes for take in takes] == clips.codes.tolist()
    for (_, waveform), wanted in zip(
        (e for e in events if isinstance(e, tuple)), clips.waveforms, strict=True
    ):
        assert torch.allclose(waveform, wanted, atol=1e-5)
    assert [(take.seed, take.number, take.seconds) for take in takes] == [(5, i, 1.0) for i in range(3)]
    assert takes[0].settings["merge_weight"] == 1.0 and takes[0].encoder == "reward-encoder"


def test_variety_grows_with_the_slider(player):
    """Catches a slider that moves nothing, or not the weights that are sampled."""
    distances = [
        player.distance(played(player, Wish("piano melody", 6, 3.0, seed=1, merge_weight=weight))[0])
        for weight in (0.0, 0.5, 1.0)
    ]
    assert distances == sorted(distances) and distances[2] > distances[0] + 0.1
    again = player.distance(played(player, Wish("piano melody", 6, 3.0, seed=1, merge_weight=0.0))[0])
    assert again == pytest.approx(distances[0], abs=1e-6)


def test_progress_ends_with_the_cost(player):
    """Rows by hand: 4 takes of 25 frames and 3 steps of delay; guidance takes two rows for each."""
    takes, events = played(player, WISH)
    assert isinstance(events[-1], Cost) and events[-1].rows == 4 * 28
    done = [event.fraction for event in events if isinstance(event, Progress)]
    assert len(done) == 28 + 4 and min(done) >= 0 and max(done) <= 1 and done[-1] > 0.3
    guided, events = played(player, WISH, guided=True)
    assert events[-1].rows == 2 * 4 * 28
    assert [take.codes for take in guided] != [take.codes for take in takes]
    assert guided[0].settings["guidance_scale"] == 3.0 and "merge_weight" not in guided[0].settings


def test_longer_and_similar_takes_begin_as_they_should(player):
    [first, *_], _ = played(player, WISH)
    [longer], events = played(player, Wish(WISH.prompt, 1, 3.0, 9, merge_weight=0.0), longer=first)
    assert longer.seconds == 4.0 and [book[:25] for book in longer.codes] == first.codes
    assert longer.settings["extended"] == first.file and events[-1].rows > 75
    similar, _ = played(player, Wish(WISH.prompt, 3, 1.0, 9, merge_weight=1.0), like=first)
    assert all([book[:8] for book in take.codes] == [book[:8] for book in first.codes] for take in similar)
    assert len({str(take.codes) for take in similar}) == 3


def test_a_cancelled_wish_ends_within_a_step(player):
    """Catches a player that goes on computing for nobody, or that is held for ever."""
    cancelled = threading.Event()
    for event in player.play(WISH, cancelled=cancelled):
        assert isinstance(event, Progress)
        cancelled.set()
    wish = player.play(WISH)
    next(wish)
    wish.close()  # its page is gone
    assert len(played(player, WISH)[0]) == 4


def test_two_wishes_at_once_take_turns(player):
    """Catches a λ that is moved under a wish that is being played."""
    alone = [played(player, Wish("piano melody", 2, 1.0, 3, merge_weight=weight))[0] for weight in (0, 1)]
    found: dict[int, list] = {}

    def run(weight):
        found[weight] = played(player, Wish("piano melody", 2, 1.0, 3, merge_weight=weight))[0]

    threads = [threading.Thread(target=run, args=(weight,)) for weight in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert [[take.codes for take in found[i]] for i in (0, 1)] == [[t.codes for t in a] for a in alone]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        (Wish(" "), "every prompt needs text"),
        (Wish("piano " * 900), "901 tokens"),
        (Wish("piano", 0), "num_generations=0"),
        (Wish("piano", temperature=-1), "temperature"),
    ],
)
def test_wishes_that_cannot_be_played(player, wish, message):
    with pytest.raises(ValueError, match=message):
        player.check(wish)


def test_one_model_has_no_slider(tmp_path):
    """A base is played with its own guidance, and has no guided base beside it."""
    player = Player([str(nano_path())])
    assert (player.moves, player.guided, player.base, player.guidance_scale) == (False, True, None, 3.0)
    with pytest.raises(ValueError, match="one model, or two"):
        Player([])


def test_a_student_that_is_told_its_guidance_has_a_second_slider(tmp_path):
    """Catches a γ that is shown and not told, alone and between two students; it takes no second row."""
    folders = save_students(tmp_path)
    guidance = GuidanceRange.of({"low": 1, "high": 5})
    for folder in folders:
        table = torch.randn(len(guidance.knots), 160, generator=torch.Generator().manual_seed(1))
        GuidanceShift.of(guidance, table).save(folder)
        edit_json(Path(folder) / "diverse_cfg.json", guidance_range=[1, 5])
    alone, between = Player(folders[1:]), Player(folders)
    assert alone.told == between.told == (1, 5)
    heard = {}
    for scale in (1.0, 3.0, 5.0):
        wish = Wish(WISH.prompt, 2, 1.0, 5, merge_weight=1.0, guidance_scale=scale)
        (first, second), events = played(alone, wish)
        assert events[-1].rows == 2 * 28 and first.settings["student_guidance"] == scale
        assert first.settings["guidance_scale"] == 1.0 and first.model == f"γ = {scale:g}"
        moved, _ = played(between, wish)
        same = torch.tensor([take.codes for take in moved]) == torch.tensor([first.codes, second.codes])
        assert same[..., :5].all()  # later, a bias that was folded in may round another way
        assert moved[0].model == f"λ = 1, γ = {scale:g}"
        heard[scale] = first.codes
    assert heard[1.0] != heard[3.0] != heard[5.0]
