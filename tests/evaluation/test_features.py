"""Features: divergence to the teacher against a slow loop, silence, and codecs that do not fit."""

import math
import sys

import numpy as np
import pytest
import torch

from diverse_cfg.evaluation.features import (
    AestheticsFeature,
    Batch,
    DivergenceFeature,
    EmbeddingFeature,
    FacetsFeature,
    RulesFeature,
    TextAdherenceFeature,
    ValidityFeature,
    code_digest,
)
from diverse_cfg.evaluation.generations import Player
from diverse_cfg.evaluation.systems import System, single
from diverse_cfg.policies.musicgen.model import code_logits, encode_text
from tests import oracles
from tests.evaluation.worlds import CodesEncoder, WaveEncoder, broken_audio, encoder_folder
from tests.tiny import PROMPTS, save_tiny, tiny_musicgen, tiny_processor


class Memory(Player):
    """A player of a model in memory."""

    def __init__(self, model):
        super().__init__(single("memory")[0])
        self.__dict__["_loaded"] = (model, tiny_processor())


def batch(system, model, num_frames=5, seed=0):
    codes = torch.randint(16, (len(PROMPTS), 4, num_frames), generator=torch.Generator().manual_seed(seed))
    return Batch(system, Memory(model), list(PROMPTS), codes)


class FixedAudio(Player):
    """Plays the given waveforms, whatever the codes."""

    sampling_rate = 3200

    def __init__(self, waveforms):
        super().__init__(single("fixed")[0])
        self.waveforms = waveforms

    def decode(self, codes):
        return self.waveforms


def of_audio(waveforms):
    system = System("audio", single("fixed"))
    return Batch(
        system, FixedAudio(waveforms), ["a piano"] * len(waveforms), torch.zeros(len(waveforms), 4, 3).long()
    )


@torch.no_grad()
def both_logits(policy, one):
    """Of every code, under its prompt and under none."""
    condition = encode_text(policy, tiny_processor(), one.prompts)
    return [code_logits(policy, one.codes, text).double().numpy() for text in (condition, condition.null())]


def slow_divergence(model, teacher, one, student_settings, teacher_scale):
    """KL per clip and entropy of codebook 0, cell by cell in float64; `student_settings` = (γ, T, k)."""
    scale, temperature, top_k = student_settings
    ours, theirs = both_logits(model, one), both_logits(teacher, one)
    kl, entropy = np.zeros(len(one.codes)), np.zeros(len(one.codes))
    clips, codebooks, frames = one.codes.shape
    for n, k, t in np.ndindex(clips, codebooks, frames):
        guided = oracles.guided_logits(ours[0][n, k, t], ours[1][n, k, t], scale)
        if temperature == 0:
            p = np.zeros(len(guided))
            p[guided.argmax()] = 1
        else:
            p = oracles.softmax(guided / temperature)
            p[np.argsort(p)[: len(p) - top_k]] = 0
            p /= p.sum()
        q = oracles.softmax(oracles.guided_logits(theirs[0][n, k, t], theirs[1][n, k, t], teacher_scale))
        kl[n] += oracles.kl(p, q)
        if k == 0:
            entropy[n] += oracles.entropy(p) / frames
    return kl, entropy


@pytest.mark.parametrize("settings", [(1.0, 1.0, 16), (2.0, 0.8, 16), (1.0, 1.2, 5), (1.0, 0.0, 16)])
def test_divergence_is_that_of_what_was_sampled(tmp_path, settings):
    """Catches a KL of raw logits: guidance, temperature and top-k belong to the policy that played the
    clip."""
    student, teacher = tiny_musicgen(seed=1), tiny_musicgen(seed=0)
    folder = save_tiny(tmp_path / "base")
    system = System(
        "x",
        single("memory"),
        guidance_scale=settings[0],
        temperature=settings[1],
        top_k=settings[2] if settings[2] < 16 else 0,
    )
    one = batch(system, student)
    found = DivergenceFeature(Memory(teacher), folder, 3.0).compute(one)
    kl, entropy = slow_divergence(student, teacher, one, settings, 3.0)
    np.testing.assert_allclose(found["kl"], kl, rtol=1e-4)
    np.testing.assert_allclose(found["entropy_0"], entropy, rtol=1e-4, atol=1e-6)


def test_every_code_of_a_hybrid_belongs_to_the_model_that_drew_it(tmp_path):
    """Fault: a KL of the second model alone, or a border between frames where it lies between decoder steps."""
    first, second, teacher = (tiny_musicgen(seed=seed) for seed in (2, 1, 0))
    system = System("x", single("memory"), first="first", first_frames=3, first_guidance_scale=2.0)
    one = batch(system, second)
    one.player.first = Memory(first)
    found = DivergenceFeature(Memory(teacher), save_tiny(tmp_path / "base"), 3.0).compute(one)
    parts = [(*both_logits(model, one), γ) for model, γ in ((first, 2.0), (second, 1.0), (teacher, 3.0))]
    wanted = np.zeros(len(one.codes))
    for n, k, t in np.ndindex(*one.codes.shape):
        p, q = (
            oracles.softmax(oracles.guided_logits(cond[n, k, t], null[n, k, t], scale))
            for cond, null, scale in (parts[0 if t + k < 3 else 1], parts[2])
        )
        wanted[n] += oracles.kl(p, q)
    np.testing.assert_allclose(found["kl"], wanted, rtol=1e-4)


@pytest.mark.parametrize("steps", [1, 2])
def test_adaptive_guidance_ends_where_the_sampler_ended_it(tmp_path, steps):
    """Fault: a KL under γ of codes that were drawn without; steps of the decoder taken for frames."""
    student, teacher = tiny_musicgen(seed=1), tiny_musicgen(seed=0)
    schedule = f"adaptive 0.3 {steps}"
    system = System("x", single("memory"), guidance_scale=3.0, guidance_schedule=schedule)
    one = batch(system, student)
    found = DivergenceFeature(Memory(teacher), save_tiny(tmp_path / "base"), 3.0).compute(one)
    ours, theirs = both_logits(student, one), both_logits(teacher, one)
    wanted, ends = np.zeros(len(one.codes)), []
    for n in range(len(one.codes)):
        run = 0
        for step in range(5 + 3):
            cells = [(n, k, step - k) for k in range(4) if 0 <= step - k < 5]
            pairs = [(ours[0][cell], ours[1][cell]) for cell in cells]
            guided = run < steps
            apart = np.mean([0.5 * np.abs(oracles.softmax(c) - oracles.softmax(u)).sum() for c, u in pairs])
            for (cond, null), cell in zip(pairs, cells, strict=True):
                p = oracles.softmax(oracles.guided_logits(cond, null, 3.0 if guided else 1.0))
                q = oracles.softmax(oracles.guided_logits(theirs[0][cell], theirs[1][cell], 3.0))
                wanted[n] += oracles.kl(p, q)
            run = (run + 1 if apart < 0.3 else 0) if guided else run
            ends.append(guided)
    assert 0 < sum(ends) < len(ends)
    np.testing.assert_allclose(found["kl"], wanted, rtol=1e-4)


def test_the_guided_base_is_its_own_teacher(tmp_path):
    base = tiny_musicgen()
    one = batch(System("guided", single("memory"), guidance_scale=3.0), base)
    found = DivergenceFeature(Memory(base), save_tiny(tmp_path / "base"), 3.0).compute(one)
    np.testing.assert_allclose(found["kl"], 0, atol=1e-5)
    assert (found["entropy_0"] > 0.1).all() and (found["entropy_0"] < math.log(16)).all()


def test_the_divergence_of_a_schedule_is_zero_where_it_is_the_teachers(tmp_path):
    """Fault: a clip of a schedule that is compared as if it had had the constant scale."""
    base = tiny_musicgen()
    half = System("half", single("memory"), guidance_scale=3.0, guidance_schedule="interval 0 0.4")
    whole = System("whole", single("memory"), guidance_scale=3.0, guidance_schedule="interval 0 1")
    feature = DivergenceFeature(Memory(base), save_tiny(tmp_path / "base"), 3.0)
    np.testing.assert_allclose(feature.compute(batch(whole, base))["kl"], 0, atol=1e-5)
    assert (feature.compute(batch(half, base))["kl"] > 0.01).all()


def test_memory_is_bounded_and_changes_nothing(tmp_path, monkeypatch):
    one = batch(System("x", single("memory")), tiny_musicgen(seed=1))
    feature = DivergenceFeature(Memory(tiny_musicgen()), save_tiny(tmp_path / "base"), 3.0)
    whole = feature.compute(one)
    monkeypatch.setattr("diverse_cfg.evaluation.features._LOGIT_BYTES", 1)
    for name, values in feature.compute(one).items():
        np.testing.assert_allclose(values, whole[name], rtol=1e-6)


def test_a_teacher_with_other_codes_is_refused(tmp_path):
    other = tiny_musicgen(vocab_size=32)
    feature = DivergenceFeature(Memory(other), save_tiny(tmp_path / "base", vocab_size=32), 3.0)
    with pytest.raises(ValueError, match="vocab_size=16 and the teacher 32"):
        feature.compute(batch(System("x", single("memory")), tiny_musicgen()))


def test_silence_has_no_embedding(tmp_path):
    """Catches a zero vector that is kept: a cosine with it is undefined."""
    audio = broken_audio("noise", 3, 640)
    audio[1] = 0
    feature = EmbeddingFeature("heldout", WaveEncoder(), encoder_folder(tmp_path / "e"))
    values = feature.compute(of_audio(audio))["values"]
    assert np.isnan(values).any(axis=1).tolist() == [False, True, False]


def test_an_encoder_of_other_codes_is_refused(tmp_path):
    """Codes of another codec mean other sounds: their histogram says nothing."""
    feature = EmbeddingFeature("reward", CodesEncoder(), encoder_folder(tmp_path / "e"))
    one = of_audio(broken_audio("noise", 2, 640))
    one.player.sampling_rate = 32000
    with pytest.raises(ValueError, match=r"3200 Hz codec.*32000 Hz"):
        feature.compute(one)


def test_an_encoder_with_rows_missing_is_refused(tmp_path):
    class Pooled(WaveEncoder):
        def embed(self, inputs, sampling_rate=None):
            return super().embed(inputs).mean(dim=0, keepdim=True)

    feature = EmbeddingFeature("heldout", Pooled(), encoder_folder(tmp_path / "e"))
    with pytest.raises(ValueError, match="for 3 clips"):
        feature.compute(of_audio(broken_audio("noise", 3, 640)))


def test_broken_audio_is_not_valid():
    for kind in ("silence", "noise", "clipping"):
        columns = ValidityFeature().compute(of_audio(broken_audio(kind, 3, 3200)))
        assert columns["valid"].tolist() == [0, 0, 0], kind
    time = torch.arange(3200) / 3200
    tone = 0.2 * torch.sin(2 * math.pi * 220 * time).repeat(2, 1)
    assert ValidityFeature().compute(of_audio(tone))["valid"].tolist() == [1, 1]


def test_rules_leave_out_what_a_prompt_does_not_name():
    one = of_audio(broken_audio("clipping", 2, 9600))
    one.prompts = ["a slow melody on a piano", "a melody in C major on a piano"]
    columns = RulesFeature().compute(one)
    assert np.isnan(columns["key"]).tolist() == [True, False]
    assert np.isnan(columns["tempo"]).tolist() == [False, True]
    assert np.isfinite(columns["mean"]).all()


class TwoTowers(WaveEncoder):
    """Text and clips in one space: "piano" is the first axis, anything else the second."""

    def embed(self, inputs, sampling_rate=None):
        level = inputs.abs().mean(dim=1)
        return torch.stack([level, 1 - level], dim=1)

    def embed_text(self, texts):
        return torch.tensor([[1.0, 0.0] if "piano" in text else [0.0, 1.0] for text in texts])


def test_text_adherence_belongs_to_the_clip_and_its_own_prompt(tmp_path):
    """Catches prompts that are shuffled against their clips."""
    one = of_audio(torch.tensor([[0.6], [0.2], [0.6]]).expand(3, 640))
    one.prompts = ["a piano", "a flute", "a flute"]
    scores = TextAdherenceFeature(TwoTowers(), encoder_folder(tmp_path / "e")).compute(one)["score"]
    expected = [0.6 / math.hypot(0.6, 0.4), 0.8 / math.hypot(0.2, 0.8), 0.4 / math.hypot(0.6, 0.4)]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    with pytest.raises(ValueError, match="no text tower"):
        TextAdherenceFeature(WaveEncoder(), encoder_folder(tmp_path / "e"))


class Judge(torch.nn.Module):
    """Stands for AesMultiOutput: normalised scores of two axes from the level."""

    def __init__(self):
        super().__init__()
        self.target_transform = {"CE": {"mean": 5.0, "std": 2.0}, "PQ": {"mean": 7.0, "std": 1.0}}

    def forward(self, batch):
        level = (batch["wav"].abs() * batch["mask"]).sum(dim=(1, 2)) / batch["mask"].sum(dim=(1, 2))
        return {"CE": level, "PQ": -level}


def test_aesthetics_have_an_axis_each():
    one = of_audio(torch.tensor([[0.5], [0.1]]).expand(2, 3200))
    enjoyment, quality = (
        AestheticsFeature(name, Judge(), "cpu") for name in ("aesthetics_ce", "aesthetics_pq")
    )
    np.testing.assert_allclose(enjoyment.compute(one)["score"], [6.0, 5.2], atol=0.05)
    np.testing.assert_allclose(quality.compute(one)["score"], [6.5, 6.9], atol=0.05)
    assert enjoyment.fingerprint != quality.fingerprint


def test_judges_from_elsewhere_are_known_by_their_weights_and_code(tmp_path):
    """Catches scores of a model that was exchanged under the same name, or of a rule that was changed."""
    first, second = Judge(), Judge()
    second.register_buffer("bias", torch.ones(1))
    one, two = (AestheticsFeature("aesthetics_ce", judge, "cpu").fingerprint for judge in (first, second))
    assert one != two and one == AestheticsFeature("aesthetics_ce", Judge(), "cpu").fingerprint
    second = Judge()
    second.target_transform["CE"]["std"] = 3.0
    assert AestheticsFeature("aesthetics_ce", second, "cpu").fingerprint != one
    text = TextAdherenceFeature(TwoTowers(), encoder_folder(tmp_path / "e")).fingerprint
    assert text["code"] == code_digest("diverse_cfg.rewards", __name__, "diverse_cfg.embeddings.audio")


def test_facets_of_clips():
    """Fault: rows of different lengths in the parts of one replicate."""
    time = torch.arange(3200) / 3200
    clips = 0.2 * torch.sin(2 * math.pi * torch.tensor([220.0, 330.0])[:, None] * time)
    clips[1, 1600:] = 0
    rows = FacetsFeature().compute(of_audio(clips))
    assert rows["melody"][:, 0].tolist() == [57, 64]
    assert all(len(values) == 2 and np.isfinite(values).all() for values in rows.values())
    silent = FacetsFeature().compute(of_audio(broken_audio("silence", 3, 3200)))
    assert all(values.shape[1:] == rows[column].shape[1:] for column, values in silent.items())


@pytest.mark.parametrize("name", ["policies.musicgen.model", "policies.sampler.draws", "functional.guidance"])
def test_the_divergence_belongs_to_the_code_that_computes_it(tmp_path, monkeypatch, name):
    folder = save_tiny(tmp_path / "base")
    before = DivergenceFeature(Memory(tiny_musicgen()), folder, 3.0).fingerprint
    (tmp_path / "changed.py").write_text("# another rule")
    monkeypatch.setattr(sys.modules[f"diverse_cfg.{name}"], "__file__", str(tmp_path / "changed.py"))
    assert DivergenceFeature(Memory(tiny_musicgen()), folder, 3.0).fingerprint != before
