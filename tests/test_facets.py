"""Facets on synthesised clips whose notes, instrument, level and rests are known: what is changed alone moves alone."""

import numpy as np
import pytest
import torch

from diverse_cfg.config import GuardConfig
from diverse_cfg.facets import (
    FACETS,
    REWARDED_FACETS,
    FacetReward,
    _edit_distance,
    _melody_distance,
    _rhythm_distance,
    facet_distances,
    measure,
)
from diverse_cfg.functional.diversity import diversity_advantages
from diverse_cfg.rewards import DiversityReward
from diverse_cfg.trainer.advantages import CrossGuards
from tests.training import CodeEmbedder, WaveEmbedder, largest_difference, tiny_trainer, trained

RATE = 16_000
TUNE = [60, 64, 67, 65, 64, 62, 60, 67]
OTHER_TUNE = [72, 71, 67, 69, 62, 64, 71, 60]
TIMES = [0.4, 0.4, 0.2, 0.2, 0.6, 0.4, 0.2, 0.6]
OTHER_TIMES = [0.2, 0.6, 0.6, 0.4, 0.2, 0.2, 0.6, 0.2]
STRING = [1.0, 0.7, 0.5, 0.35, 0.25, 0.18, 0.12, 0.1]
HOLLOW = [1.0, 0.01, 0.4, 0.01, 0.05, 0.01, 0.02, 0.01]


def played(tune=TUNE, times=TIMES, instrument=STRING, level=0.1, legato=1.0, rate=RATE):
    """Notes one after the other for three seconds; `legato` is the share of its time that a note sounds."""
    audio = np.zeros(3 * rate)
    start = 0.0
    for pitch, seconds in zip(tune, times, strict=True):
        length = round(seconds * legato * rate)
        time = np.arange(length) / rate
        hertz = 440 * 2 ** ((pitch - 69) / 12)
        note = sum(
            part * np.sin(2 * np.pi * hertz * k * time)
            for k, part in enumerate(np.divide(instrument, np.linalg.norm(instrument)), 1)
            if hertz * k < rate / 2
        )
        fade = np.minimum(1, np.minimum(time, time[::-1]) * 100) * np.exp(-0.7 * time)
        first = round(start * rate)
        audio[first : first + length] += level * note * fade
        start += seconds
    return torch.from_numpy(audio).float()


def differences(first, second, rate=RATE):
    """Facet → distance of two clips."""
    values = measure(torch.stack([first, second]), rate)
    return {facet: float(facet_distances(facet, values[facet])[0, 1]) for facet in FACETS}


MOVES, STAYS = 0.25, 0.06


@pytest.mark.parametrize(
    ("change", "moved"),
    [
        ({"tune": OTHER_TUNE}, {"melody", "pitch"}),
        ({"tune": [note + 5 for note in TUNE]}, {"pitch"}),  # transposed: the same melody
        ({"tune": [note + 12 for note in TUNE]}, set()),
        ({"times": OTHER_TIMES}, {"rhythm"}),
        ({"instrument": HOLLOW}, {"timbre"}),
        ({"level": 0.01}, {"level"}),
        ({"legato": 0.5}, {"rests"}),
        ({"tune": OTHER_TUNE, "times": OTHER_TIMES}, {"melody", "rhythm", "pitch"}),
        ({}, set()),
    ],
    ids=["melody", "transposed", "octave", "rhythm", "instrument", "level", "rests", "tune", "nothing"],
)
def test_what_is_changed_alone_moves_alone(change, moved):
    """Fault: a measure of the melody that hears the instrument, of the rhythm that hears rests, of timbre that hears
    the notes."""
    found = differences(played(), played(**change))
    # Shares of pitch classes follow how long each is held.
    loose = {"pitch"} if "times" in change and "tune" not in change else set()
    assert {facet for facet in FACETS if found[facet] > MOVES} == moved, found
    assert [facet for facet in set(FACETS) - moved - loose if found[facet] > STAYS] == [], found


@pytest.mark.parametrize("kind", ["dies", "rests", "silent"])
def test_a_clip_that_dies_or_rests_differs_less(kind):
    """Fault: silence in the place of music counts as another melody, rhythm or sound."""
    clip, other = played(), played(OTHER_TUNE, OTHER_TIMES, HOLLOW, 0.02)
    broken = other.clone()
    if kind == "dies":
        broken[RATE * 3 // 2 :] = 0
    elif kind == "rests":
        broken[RATE : 2 * RATE] = 0
    else:
        broken[:] = 0
    whole, less = differences(clip, other), differences(clip, broken)
    for facet in REWARDED_FACETS:
        assert less[facet] <= whole[facet], facet
        if kind == "silent":
            assert less[facet] == 0


def test_noise_has_no_melody():
    """Fault: a tracker that finds pitches in noise, which would pay for it."""
    noise = 0.1 * torch.randn(2, 3 * RATE, generator=torch.Generator().manual_seed(0))
    found = differences(*noise)
    assert found["melody"] == found["pitch"] == found["timbre"] == 0


def test_samples_that_are_not_finite_are_silent():
    """Fault: one broken clip ends the evaluation of a system, or has a distance that is not a number."""
    broken = played()
    broken[RATE:] = torch.nan
    assert all(np.isfinite(list(differences(played(OTHER_TUNE), broken).values())))
    assert differences(played(OTHER_TUNE), torch.full_like(broken, torch.inf))["melody"] == 0


def test_other_rates_channels_and_lengths():
    """Fault: seconds that are frames of one rate; a stereo clip that is read as several."""
    slow, fast = played(), played(rate=32_000)
    assert differences(slow, played(OTHER_TUNE)) != differences(slow, slow)
    at_16, at_32 = measure(slow[None], RATE), measure(fast[None], 32_000)
    both = {facet: np.stack([at_16[facet], at_32[facet]], axis=1)[0] for facet in FACETS}
    assert all(float(facet_distances(facet, both[facet])[0, 1]) < STAYS for facet in FACETS)
    stereo = measure(torch.stack([slow, slow])[None], RATE)
    assert all(np.array_equal(stereo[facet], at_16[facet]) for facet in FACETS)
    half_a_second = measure(slow[None, : RATE // 2], RATE)
    assert all(np.isfinite(values).all() for values in half_a_second.values())


def test_clips_do_not_depend_on_those_beside_them():
    clips = torch.stack([played(), played(OTHER_TUNE), played(times=OTHER_TIMES)])
    together = measure(clips, RATE)
    alone = [measure(clip[None], RATE) for clip in clips]
    for facet in FACETS:
        parts = np.concatenate([one[facet] for one in alone])
        np.testing.assert_allclose(together[facet], parts, atol=1e-4)


def slow_edits(a, b, change):
    """The textbook's table, from the start on; the rest of the longer one is free."""
    if len(a) > len(b):
        a, b = b, a
    table = np.zeros((len(a) + 1, len(b) + 1))
    table[:, 0], table[0] = np.arange(len(a) + 1), np.arange(len(b) + 1)
    for i in range(len(a)):
        for j in range(len(b)):
            table[i + 1, j + 1] = min(
                table[i, j] + change(a[i], b[j]), table[i, j + 1] + 1, table[i + 1, j] + 1
            )
    return min(1, table[-1].min() / max(len(a), 4))


def test_edits_against_the_textbook():
    """Fault: insertions in a row, padding that is counted, or the longer sequence in the place of the shorter."""
    generator = np.random.default_rng(0)
    sequences = [generator.integers(1, 5, generator.integers(0, 12)).astype(float) for _ in range(80)]
    rows = np.full((80, 12), np.nan)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence

    def change(x, y):
        return np.minimum(1, np.abs(x - y) / 3)

    found = _edit_distance(rows[:40], rows[40:], change)
    wanted = [slow_edits(a, b, change) for a, b in zip(sequences[:40], sequences[40:], strict=True)]
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_intervals_and_times_by_hand():
    """C D E G C against: a step that is a third (half an edit), a fall in the place of a rise (one), other octaves."""

    def melody(*pitches):
        return np.array([[*pitches, *[-1] * (8 - len(pitches))]], dtype=float)

    tune = melody(60, 62, 64, 67, 60)
    for other, edits in (
        (melody(60, 62, 64, 67, 60), 0),
        (melody(60, 62, 65, 68, 61), 0.5),
        (melody(60, 58, 60, 63, 56), 1),
        (melody(60, 74, 76, 67, 72), 0),
        (melody(60, 62, 64), 0),
        (melody(60), 0),
        (melody(), 0),
    ):
        assert _melody_distance(tune, other)[0] == pytest.approx(edits / 4)
    times = melody(0, 0.4, 0.8, 1.2, 1.6)
    assert _rhythm_distance(times, 2 * np.maximum(times, -0.5))[0] == pytest.approx(1)  # twice as slow
    late = melody(0.2, 0.6, 1.0, 1.4, 1.8)
    assert _rhythm_distance(times, late)[0] == pytest.approx(0, abs=1e-9)


def test_distances_of_groups():
    """Fault: clips of two prompts that are compared."""
    values = np.random.default_rng(0).random((2, 3, 4, 13))
    found = facet_distances("pitch", values)
    assert found.shape == (2, 3, 4, 4)
    assert torch.equal(found, found.mT) and (found.diagonal(dim1=-2, dim2=-1) == 0).all()
    np.testing.assert_allclose(found[1, 2], facet_distances("pitch", values[1, 2]))


# ---- as a reward ---------------------------------------------------------------------------------


def test_a_facet_rewards_the_clip_that_differs():
    """Fault: rewards of the wrong clip, or of clips that a guard has sorted out."""
    clips = torch.stack([played(), played(level=0.05), played(instrument=HOLLOW), played(OTHER_TUNE)])
    audio = {"num_generations": 4, "sampling_rate": RATE}
    reward = FacetReward("melody")
    rewards = reward(waveforms=clips, **audio)
    assert (reward.__name__, reward.pairwise, reward.reads) == ("diversity_melody", True, "waveforms")
    assert rewards[3] > 0.4 and max(rewards[:3]) < 0.25
    assert reward.distances.shape == (1, 4, 4)
    clips[3, RATE:] = 0
    guarded = FacetReward("melody", GuardConfig(max_silence=0.1))
    assert guarded(waveforms=clips, **audio)[3] == 0


def test_rests_are_no_reward():
    with pytest.raises(ValueError, match="'rests' is no reward; known: melody, rhythm"):
        FacetReward("rests")


def test_several_distances_are_added(tmp_path):
    """Fault: one of them alone is followed, or the prefix baseline is given embeddings of one and the beginnings of
    another."""
    rewards = [DiversityReward(CodeEmbedder()), FacetReward("timbre"), DiversityReward(WaveEmbedder())]
    trainer = tiny_trainer(
        tmp_path, reward=rewards, diversity_coef=2.0, prefix_baseline=True, clip_seconds=0.4
    )
    columns = torch.rand(8, 3)
    codes = torch.zeros(8, 4, 20, dtype=torch.long)
    trainer._advantages.prefix = None
    none = torch.zeros(8, dtype=torch.bool)
    found, _ = trainer._advantages(columns, codes, 4, none, lambda codes: CodeEmbedder().embed(codes))
    wanted = 2.0 * diversity_advantages(columns.sum(1).view(2, 4))
    torch.testing.assert_close(found[:, 0, 0], wanted.flatten())

    trainer = tiny_trainer(
        tmp_path, reward=rewards, diversity_coef=2.0, prefix_baseline=True, clip_seconds=0.4
    )
    before = trained(trainer)
    trainer.train()
    assert largest_difference(before, trained(trainer)) > 0
    logged = trainer.state.log_history[0]
    names = [f"rewards/{name}/mean" for name in ("diversity", "diversity_timbre")]
    assert not [name for name in names if name not in logged]
    assert logged["reward/diversity"] == pytest.approx(rewards[0].distances.sum().item() / 24, rel=1)


def test_a_facet_is_capped_by_its_own_distance():
    """Fault: the cap of a facet measured as a cosine."""
    clips = torch.stack([played(), played(level=0.05), played(instrument=HOLLOW), played(OTHER_TUNE)])
    reward, guards = FacetReward("melody"), GuardConfig(distance_quantile=0.5)
    reward(waveforms=clips, num_generations=4, sampling_rate=RATE)
    pairs = [float(reward.distances[0, i, j]) for i in range(4) for j in range(i)]
    CrossGuards(guards, ["diversity_melody"], [reward]).measure_distances(reward, reward.embeddings, 4)
    assert reward.distance_cap == pytest.approx(np.median(pairs))
    reward(waveforms=clips, num_generations=4, sampling_rate=RATE)
    assert float(reward.distances.max()) == pytest.approx(reward.distance_cap)


def test_a_prefix_baseline_needs_an_encoder_first(tmp_path):
    """Fault: a facet's sequence that is read as an embedding."""
    rewards = [FacetReward("melody"), DiversityReward(CodeEmbedder())]
    with pytest.raises(ValueError, match="facet melody', which has none: put one with an encoder first"):
        tiny_trainer(tmp_path, reward=rewards, prefix_baseline=True)
