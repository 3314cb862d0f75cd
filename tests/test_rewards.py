"""Reward functions on clips whose reward is known by construction."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from diverse_cfg.acoustics import WHITE_FLATNESS, validity
from diverse_cfg.config import GuardConfig
from diverse_cfg.rewards import (
    AestheticsReward,
    DiversityReward,
    TextAdherenceReward,
    checked,
    valid_audio,
)
from diverse_cfg.trainer.advantages import CrossGuards
from tests.training import CodeEmbedder, WaveEmbedder

RATE = 3200


class Directions:
    """Hands out given embeddings."""

    name = "directions"
    reads = "waveforms"
    sampling_rate = RATE

    def __init__(self, *degrees):
        angles = torch.tensor(degrees).deg2rad()
        self.vectors = (
            torch.stack([angles.cos(), angles.sin()], dim=1) * torch.arange(1, len(degrees) + 1)[:, None]
        )

    def embed(self, inputs, sampling_rate=None):
        assert sampling_rate == RATE
        return self.vectors

    def embed_text(self, texts):
        return torch.tensor([[1.0, 0.0], [0.0, 1.0]])[: len(texts)]


def tone(seconds=1.0, level=0.3, frequency=220.0):
    return level * torch.sin(2 * math.pi * frequency * torch.arange(int(RATE * seconds)) / RATE)


def test_diversity_by_hand():
    """Fault: similarity for distance, lengths that count, mixed groups, or a clip compared with itself."""
    reward = DiversityReward(Directions(0, 90, 180, 0, 0, 60))
    found = reward(num_generations=3, sampling_rate=RATE, waveforms=torch.zeros(6, 10))
    wanted = [(1 + 2) / 2, (1 + 1) / 2, (2 + 1) / 2, (0 + 0.5) / 2, (0 + 0.5) / 2, 0.5]
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert reward.embeddings.shape == (6, 2) and reward.distances.shape == (2, 3, 3)


def test_completions_are_enough():
    """Fault: the function works inside the trainer only."""
    reward = DiversityReward(WaveEmbedder())
    clips = [tone(), tone(level=0.1), tone(), tone(frequency=100.0)]
    assert len(reward(clips, num_generations=2, sampling_rate=RATE)) == 4


@pytest.mark.parametrize("clips", [3, 5])
def test_broken_groups_are_refused(clips):
    with pytest.raises(ValueError, match=f"{clips} clips in groups of 2"):
        DiversityReward(WaveEmbedder())(torch.rand(clips, 100), num_generations=2, sampling_rate=RATE)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_clip_without_embedding_is_named(value):
    embedder = Directions(0, 90, 180, 10)
    embedder.vectors[2, 1] = value
    with pytest.raises(ValueError, match=r"'directions' returned non-finite values for clip 2"):
        DiversityReward(embedder)(num_generations=4, sampling_rate=RATE, waveforms=torch.zeros(4, 10))


def test_a_silent_clip_with_a_zero_embedding_is_refused():
    embedder = Directions(0, 90, 180, 10)
    embedder.vectors[1] = 0
    with pytest.raises(ValueError, match="silent"):
        DiversityReward(embedder)(num_generations=4, sampling_rate=RATE, waveforms=torch.zeros(4, 10))


def test_an_embedder_of_codes_needs_no_audio_unless_a_guard_listens():
    """Fault: 64 clips decoded for nothing; or a guard that gets codes for audio."""
    assert DiversityReward(CodeEmbedder()).reads == "codes"
    assert DiversityReward(CodeEmbedder(), GuardConfig(silence_dbfs=-50.0)).reads == "waveforms"


def test_validity_by_ear():
    """Fault: a limit the wrong way round; brown noise and square waves passed a flatness alone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(RATE, generator=generator)
    brown = noise.cumsum(0)
    clips = torch.stack(
        [tone(), tone(level=1e-4), tone(level=5.0).clamp(-1, 1), 0.2 * noise, 0.5 * brown / brown.abs().max()]
    )

    def valid(**limits):
        return valid_audio(clips, RATE, GuardConfig(**limits)).tolist()

    assert valid() == [True] * 5
    assert valid(max_silence=0.5) == [True, False, True, True, True]
    assert valid(silence_dbfs=-50.0) == [True, False, True, True, True]
    assert valid(max_clipping=0.01) == [True, True, False, True, True]
    assert valid(max_flatness=0.5) == [True, True, True, False, True]
    flatness = validity(clips, RATE)["flatness"] / WHITE_FLATNESS
    assert flatness[0] < 0.05 and flatness[3] == pytest.approx(1, abs=0.05)
    # As the evaluation measures: by the worst channel, which a mean over both would hide.
    clips = torch.stack([torch.stack([tone(), clip]) for clip in clips])
    assert valid(max_clipping=0.6) == [True, True, False, True, True]
    assert valid(max_flatness=0.9) == [True, True, True, False, True]


def test_a_silent_tail_is_measured_in_frames():
    """Fault: a clip that falls silent half-way has nearly the level of a whole one; a rest between notes passes."""
    clips = torch.stack([tone(), tone(), tone()])
    clips[1, int(0.6 * RATE) :] = 0
    clips[2, int(0.8 * RATE) :] = 0
    for waveforms in (clips, clips[:, None].expand(-1, 2, -1)):
        assert valid_audio(waveforms, RATE, GuardConfig(silence_dbfs=-50.0, max_silence=0.3)).tolist() == [
            True, False, True,
        ]  # fmt: skip


def test_an_invalid_clip_earns_nothing_and_gives_nothing():
    """Fault: silence is far from all music, and would be the best paid clip of its group."""
    reward = DiversityReward(Directions(0, 90, 180, 45), GuardConfig(silence_dbfs=-40.0))
    waveforms = torch.stack([tone(), tone(), torch.zeros(RATE), tone()])
    found = reward(num_generations=4, sampling_rate=RATE, waveforms=waveforms)
    near = 1 - math.cos(math.pi / 4)
    np.testing.assert_allclose(found, [(1 + near) / 3, (1 + near) / 3, 0, 2 * near / 3], atol=1e-6)


def test_adherence_is_the_cosine_with_the_own_prompt():
    """Fault: prompts and clips paired by position among the distinct ones."""
    reward = TextAdherenceReward(Directions(0, 60, 90, 45))
    prompts = ["first", "first", "second", "second"]
    found = reward(prompts, sampling_rate=RATE, waveforms=torch.zeros(4, 10))
    np.testing.assert_allclose(found, [1, 0.5, 1, math.sqrt(0.5)], atol=1e-6)


def test_adherence_needs_a_text_tower():
    with pytest.raises(ValueError, match="'waves' has no text tower"):
        TextAdherenceReward(WaveEmbedder())


class Aesthetics(torch.nn.Module):
    """Level of the unmasked part, standardised as the real model's output is."""

    target_transform = {"CE": {"mean": 5.0, "std": 2.0}}  # noqa: RUF012

    def forward(self, batch):
        assert batch["wav"].shape == batch["mask"].shape == (2, 1, 160_000)
        masked = (batch["wav"].abs() * batch["mask"]).sum(dim=(1, 2)) / batch["mask"].sum(dim=(1, 2))
        return {"CE": masked}


def test_aesthetics_averages_windows_by_their_length():
    """Fault: a short last window counts as much as a whole one, or its padding counts."""
    waveforms = torch.cat([torch.full((2, 160_000), 0.5), torch.full((2, 40_000), 0.1)], dim=1)
    waveforms[1] = 0.3
    found = AestheticsReward(model=Aesthetics())(sampling_rate=16_000, waveforms=waveforms)
    np.testing.assert_allclose(found, [5 + 2 * (0.5 * 0.8 + 0.1 * 0.2), 5.6], atol=1e-5)


def test_aesthetics_names_what_to_install(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "audiobox_aesthetics", None)
    with pytest.raises(ImportError, match="--no-deps audiobox_aesthetics"):
        AestheticsReward()
    with pytest.raises(ValueError, match="axis='XX'"):
        AestheticsReward("XX")


def test_checked_passes_none_and_names_the_rest():
    call = checked(lambda **_: [None, 1.0, math.nan], "mine", ["a", "b", "c"], {})
    with pytest.raises(ValueError, match=r"'mine' returned nan for clip 2 \(prompt 'c'\)"):
        call()
    assert checked(lambda **_: [None, 1.0], "mine", ["a", "b"], {})() == [None, 1.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, r"'mine' returned None for 2 clips, the first of prompt 'a'; return a list"),
        (0.5, "returned 0.5 for 2 clips"),
        ("ab", "returned 'ab' for 2 clips"),
        ({"a": 1.0, "b": 2.0}, "for 2 clips, the first of prompt 'a'; return a list"),
        ([1.0], "returned 1 rewards for 2 clips, the first of prompt 'a'"),
        (torch.zeros(3), "returned 3 rewards for 2 clips"),
        (torch.zeros(2, 1), r"returned \[0.0\] for clip 0 \(prompt 'a'\)"),
        ([1.0, "0.5"], r"returned '0.5' for clip 1 \(prompt 'b'\)"),
        ([1.0, 1e39], r"returned 1e\+39 for clip 1 \(prompt 'b'\)"),
        ([1.0, torch.tensor([1.0, 2.0])], "for clip 1"),
    ],
)
def test_what_is_no_number_per_clip_is_refused(returned, message):
    """Fault: a traceback of TRL's, or weights of NaN: 1e39 is finite, but not in float32."""
    with pytest.raises(ValueError, match=message):
        checked(lambda **_: returned, "mine", ["a", "b"], {})()


def test_every_kind_of_number_is_taken():
    for returned in (np.array([1, 2]), [np.float32(1), torch.tensor(2)], (True, Fraction(2)), iter([1, 2])):
        assert checked(lambda **_: returned, "mine", ["a", "b"], {})() == [1.0, 2.0]  # noqa: B023


def test_a_function_gets_what_it_names():
    """Fault: a TypeError about arguments and columns that the function did not ask for."""
    call = checked(lambda prompts, style=None: [len(style)] * 2, "mine", ["a", "b"], {"style": "xyz", "n": 1})
    assert call(prompts=["a", "b"], trainer_state=None) == [3, 3]


def test_the_diversity_of_a_clip_always_applies():
    """Fault: one None among the rewards of a group makes NaN of the whole group's advantages."""
    reward = DiversityReward(Directions(0, 90, 180))
    reward.__class__ = type("Sometimes", (DiversityReward,), {"__call__": lambda self, **_: [None, 1.0, 1.0]})
    with pytest.raises(ValueError, match=r"'diversity' returned None for clip 0 \(prompt 'a'\); fix"):
        checked(reward, "diversity", ["a"] * 3, {})()


def guarded(names, rewards, **settings):
    diversity = DiversityReward(Directions(0, 90, 180))
    diversity(num_generations=3, sampling_rate=RATE, waveforms=torch.zeros(3, 10))
    guards = CrossGuards(GuardConfig(**settings), names, [diversity, lambda **_: None])
    guards.gate_threshold = 0.5
    return guards.apply(torch.tensor(rewards), [True, False])[:, 0].tolist()


def test_gate_and_product_weigh_both_clips_of_a_pair():
    """Fault: only the clip's own quality counts, so that it still profits from being far from a bad one."""
    rewards = [[9.0, 1.0], [9.0, 0.4], [9.0, 0.5]]
    assert guarded(["diversity", "q"], rewards, gate="q") == [1.0, 0.0, 1.0]
    found = guarded(["diversity", "q"], rewards, quality_product="q")
    np.testing.assert_allclose(found, [(0.4 + 2 * 0.5) / 2, (0.4 + 0.2) / 2, (2 * 0.5 + 0.2) / 2], atol=1e-6)
    assert guarded(["diversity", "q"], rewards) == [9.0, 9.0, 9.0]


def test_a_guard_on_an_unknown_reward_is_refused():
    with pytest.raises(
        ValueError, match=r"guards.gate='clap' is none of the reward functions \(diversity, q\)"
    ):
        guarded(["diversity", "q"], [], gate="clap")


def test_a_gate_that_judges_nothing_is_refused():
    """Fault: RuntimeError about the quantile of nothing."""
    guards = CrossGuards(GuardConfig(gate="mine"), ["mine"], [lambda prompts, **_: [None] * len(prompts)])
    with pytest.raises(ValueError, match="gate='mine' gave none of the teacher's clips a reward"):
        guards.measure_gate(["a", "b"], {"waveforms": torch.zeros(2, 10)})


def test_a_negative_quality_is_refused():
    with pytest.raises(ValueError, match="needs rewards ≥ 0, got -1"):
        guarded(["diversity", "q"], [[9.0, 1.0], [9.0, -1.0], [9.0, 1.0]], quality_product="q")


def test_limits_are_measured_before_training(tmp_path):
    """Fault: a gate or cap that is never set, or set from the student's own clips."""
    from diverse_cfg.trainer import CFGDiversityTrainer
    from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor
    from tests.training import tiny_args

    def loudness(waveforms, **_):
        return waveforms.square().mean(dim=-1).sqrt().tolist()

    trainer = CFGDiversityTrainer(
        tiny_musicgen(),
        [DiversityReward(CodeEmbedder()), loudness],
        tiny_args(tmp_path, guards={"gate": "loudness", "gate_quantile": 0.5, "distance_quantile": 0.9}),
        train_dataset=PROMPTS,
        processing_class=tiny_processor(),
    )
    trainer.train()
    assert trainer._cross_guards.gate_threshold > 0
    cap = trainer.reward_funcs[0].distance_cap
    assert 0 < cap < 2 and trainer.reward_funcs[0].distances.max().item() <= cap + 1e-6
