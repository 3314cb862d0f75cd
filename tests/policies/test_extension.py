"""Clips that begin with given codes: one model after another, and longer music window by window."""

import numpy as np
import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import code_logits, encode_text
from diverse_cfg.policies.sampler import rollout
from diverse_cfg.policies.sampler.draws import keyed_noise
from diverse_cfg.policies.sampler.extension import extend, hybrid_generate
from diverse_cfg.policies.sampler.rollout import fast_generate, sample_codes
from tests import oracles
from tests.policies.test_shift import told_musicgen
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


@pytest.fixture(params=[1, 2], ids=["mono", "stereo"])
def model(request):
    return load_policy(tiny_musicgen(request.param))


@pytest.fixture
def condition(model):
    return encode_text(model, tiny_processor(), PROMPTS)


@pytest.mark.parametrize("mode", ["eager", "static"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_clip_goes_on_from_its_own_beginning(model, condition, guidance_scale, mode, monkeypatch):
    """Faults: given codes that do not reach the cache, or reach it one frame or codebook late."""
    monkeypatch.setattr(rollout, "default_mode", lambda device: mode)
    settings = {"guidance_scale": guidance_scale, "seed": 5}
    whole = sample_codes(model, condition, 9, **settings).codes
    for frames in (1, 4, 8):
        again = sample_codes(model, condition, 9, prefix=whole[..., :frames], **settings).codes
        assert torch.equal(again, whole)


def test_another_models_beginning_is_followed(model, condition):
    """Greedy, every code after the beginning is the likeliest one given all before it, in stock forward passes."""
    begun = torch.randint(
        0, 16, (len(PROMPTS), whole_codebooks(model), 4), generator=torch.Generator().manual_seed(1)
    )
    codes = sample_codes(model, condition, 9, temperature=0.0, prefix=begun, batch_size=3).codes
    assert torch.equal(codes[..., :4], begun)
    assert torch.equal(code_logits(model, codes, condition).argmax(-1)[..., 4:], codes[..., 4:])


def whole_codebooks(model) -> int:
    return model.decoder.config.num_codebooks


def test_extension_is_what_every_window_computes(model):
    """Faults: a window that begins elsewhere, repeats the random numbers of the last one, or changes what is there."""
    processor = tiny_processor()
    begun = fast_generate(model, PROMPTS, processor=processor, num_frames=6, seed=1, decode=False).codes
    clips = extend(model, begun, PROMPTS, processor=processor, num_frames=17, window=8, overlap=3, seed=2)
    wanted = begun
    for number in range(3):
        more = min(5, 17 - wanted.shape[-1])
        part = fast_generate(
            model,
            PROMPTS,
            processor=processor,
            num_frames=3 + more,
            seed=2 + number,
            prefix=wanted[..., -3:],
            decode=False,
        )
        wanted = torch.cat([wanted, part.codes[..., 3:]], dim=-1)
    assert torch.equal(clips.codes, wanted)
    assert clips.waveforms.shape[-1] == 17 * 64 and torch.isfinite(clips.waveforms).all()


@torch.no_grad()
def slow_clip(models, scales, text, num_frames, noise, negative=None, adaptive=(0.0, 1)):
    """One clip by stock forward passes over all that was drawn, in float64 from the logits on.

    Args:
        models: stock models; the one of step s is `models[s]`.
        scales: γ of every step.
        text: the prompt.
        num_frames: T.
        noise: [K, T, M].
        negative: a text in the place of none.
        adaptive: (ε, n).

    Returns:
        Codes [K, T], and how many steps were guided.
    """
    shape = models[0].config.decoder
    stereo = shape.audio_channels == 2
    delays = [codebook // 2 if stereo else codebook for codebook in range(shape.num_codebooks)]
    texts = [tiny_processor()(text=[one], return_tensors="pt") for one in (text, negative or text)]
    agreed = guided_steps = 0
    grid = torch.full((len(delays), 1 + num_frames + max(delays)), shape.vocab_size)
    codes = torch.zeros(len(delays), num_frames, dtype=torch.long)
    width = next(size for size in range(int(shape.vocab_size**0.5), 0, -1) if shape.vocab_size % size == 0)
    groups = shape.vocab_size // width
    for step in range(num_frames + max(delays)):
        model, logits = models[step].eval(), []
        for inputs, seen in zip(texts, (1, negative is not None), strict=True):  # the prompt, then none
            hidden, mask = model.text_encoder(**inputs).last_hidden_state, inputs["attention_mask"]
            known = {"encoder_outputs": BaseModelOutput(hidden * seen), "attention_mask": mask * seen}
            out = model(**known, decoder_input_ids=grid[:, : step + 1], use_cache=False).logits
            logits.append(out[:, -1].double().numpy())
        guided = logits[1] + scales[step] * (logits[0] - logits[1])
        if agreed < adaptive[1]:
            guided_steps += 1
            there = [book for book, delay in enumerate(delays) if 0 <= step - delay < num_frames]
            apart = [
                0.5 * np.abs(oracles.softmax(logits[0][book]) - oracles.softmax(logits[1][book])).sum()
                for book in there
            ]
            agreed = agreed + 1 if np.mean(apart) < adaptive[0] else 0
        else:
            guided = logits[0]
        for codebook, delay in enumerate(delays):
            frame = step - delay
            if not 0 <= frame < num_frames:
                continue
            p = np.exp(guided[codebook] - guided[codebook].max())
            table = (p / p.sum()).reshape(width, groups)
            of_group, of_member = np.split(noise[codebook, frame].double().numpy(), [groups])
            group = int((table.sum(0) / of_group).argmax())
            member = int((table[:, group] / of_member).argmax())
            codes[codebook, frame] = grid[codebook, step + 1] = member * groups + group
    return codes, guided_steps


@pytest.mark.parametrize(
    ("frames", "scales"), [(4, (1.0, 1.0)), (1, (3.0, 1.0)), (8, (1.0, 3.0)), (4, (3.0, 2.0))]
)
def test_one_model_begins_and_another_goes_on(model, scales, frames):
    """Every code against stock forward passes, clip by clip. Faults: codes of the first model that the second draws
    anew or never hears, a switch that is one step off, γ of the wrong model, null rows that nobody counts."""
    channels, length, steps = model.config.decoder.audio_channels, 9, 12
    second = load_policy(tiny_musicgen(channels))
    second.decoder.load_state_dict(tiny_musicgen(channels, seed=1).decoder.state_dict())
    texts = PROMPTS[:3]
    how = {"processor": tiny_processor(), "num_frames": length, "seed": 3, "decode": False}
    settings = how | {"first_frames": frames, "first_guidance_scale": scales[0], "guidance_scale": scales[1]}
    clips = hybrid_generate(model, second, texts, batch_size=2, **settings)
    noise = keyed_noise(3, range(len(texts)), 4 * channels, length, 16)
    for row, text in enumerate(texts):
        turns = [0] * frames + [1] * (steps - frames)
        wanted, _ = slow_clip(
            [(model, second)[turn] for turn in turns],
            [scales[turn] for turn in turns],
            text,
            length,
            noise[row],
        )
        assert torch.equal(clips.codes[row], wanted)
    cost = (frames + 3) * (1 + (scales[0] > 1)) + steps * (1 + (scales[1] > 1))
    assert clips.decoder_rows.tolist() == [cost] * len(texts)
    alone = sample_codes(
        second, encode_text(second, tiny_processor(), texts), length, seed=3, guidance_scale=scales[1]
    )
    again = hybrid_generate(
        second, second, texts, **settings | {"first_guidance_scale": scales[1]}
    )  # which follows itself
    assert torch.equal(again.codes, alone.codes)


@pytest.mark.parametrize("negative", [None, "sad drum"])
@pytest.mark.parametrize("mode", ["eager", "static"])
def test_null_rows_end_when_they_have_agreed(model, mode, negative, monkeypatch):
    """Every code against stock forward passes, clip by clip. Faults: one clip's agreement taken for another's, null
    rows that change places in the cache, cells without a code that count, an end one step too early or too late."""
    monkeypatch.setattr(rollout, "default_mode", lambda device: mode)
    channels, length = model.config.decoder.audio_channels, 14
    adaptive = (0.2 if channels == 1 else 0.15, 2)
    settings = {"processor": tiny_processor(), "num_frames": length, "seed": 3, "guidance_scale": 3.0}
    settings |= {"adaptive_guidance": adaptive, "negative_prompt": negative, "decode": False}
    clips = fast_generate(model, PROMPTS, batch_size=3, **settings)
    noise, steps = keyed_noise(3, range(len(PROMPTS)), 4 * channels, length, 16), length + 3
    ends = []
    for row, text in enumerate(PROMPTS):
        wanted, guided_steps = slow_clip(
            [model] * steps, [3.0] * steps, text, length, noise[row], negative, adaptive
        )
        assert torch.equal(clips.codes[row], wanted)
        ends.append(guided_steps)
    assert len(set(ends)) > 2 and min(ends) < 8  # or the test sees nothing
    null_rows = torch.tensor(ends) if mode == "eager" else steps  # a GPU computes them in vain
    assert torch.equal(clips.decoder_rows, steps + torch.zeros(4).long() + null_rows)
    again = fast_generate(model, PROMPTS, **settings)
    assert torch.equal(again.codes, clips.codes) and torch.equal(again.decoder_rows, clips.decoder_rows)


def test_a_student_of_a_range_is_told_its_guidance_when_it_goes_on():
    """Fault: the model that begins is told too, which it refuses, or neither is."""
    student, base = told_musicgen().model, load_policy(tiny_musicgen())
    how = {"processor": tiny_processor(), "num_frames": 9, "seed": 3, "first_frames": 4, "decode": False}
    found = hybrid_generate(base, student, PROMPTS, student_guidance=2.0, **how).codes
    folded = told_musicgen()
    folded.fold_guidance(2.0)
    assert torch.equal(found, hybrid_generate(base, folded.model, PROMPTS, **how).codes)
    assert not torch.equal(found, hybrid_generate(base, student, PROMPTS, student_guidance=4.0, **how).codes)


def test_models_that_cannot_follow_each_other_are_refused(model):
    """Fault: codes looked up in another codebook, or a first part that is none."""
    channels = model.config.decoder.audio_channels
    how = {"processor": tiny_processor(), "num_frames": 9, "seed": 0, "first_frames": 4}
    for other in (load_policy(tiny_musicgen(3 - channels)), load_policy(tiny_musicgen(channels, seed=1))):
        with pytest.raises(ValueError, match="codes of another codec"):
            hybrid_generate(other, model, PROMPTS, **how)
    for change, said in (
        ({"first_frames": 9}, "first_frames=9 must be an integer of at least 1 and below the clip's 9"),
        ({"first_frames": 0}, "first_frames=0 must"),
        ({"rollout_backend": "transformers"}, "a first model needs rollout_backend='fast'"),
        ({"negative_prompt": "sad drum"}, "needs guidance"),
    ):
        with pytest.raises(ValueError, match=said):
            hybrid_generate(model, model, PROMPTS, **how | change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": torch.zeros(1, 4, 3, dtype=torch.long)}, r"prefix must be codes \[4, 4, Tp\]"),
        ({"prefix": torch.zeros(4, 4, 9, dtype=torch.long)}, "prefix has 9 frames, the clips 9"),
        ({"prefix": torch.full((4, 4, 3), 16)}, "codes from 0 to 15: is it of another codec"),
        ({"return_logps": True}, "prefix needs"),
        ({"rollout_backend": "transformers"}, "prefix needs rollout_backend='fast'"),
    ],
)
def test_beginnings_that_cannot_be_are_refused(change, message):
    mono = load_policy(tiny_musicgen())
    settings = {"prefix": torch.zeros(4, 4, 3, dtype=torch.long)} | change
    with pytest.raises(ValueError, match=message):
        fast_generate(mono, PROMPTS, processor=tiny_processor(), num_frames=9, seed=0, **settings)
    for settings, said in (
        ({"window": 4, "overlap": 4}, "overlap=4"),
        ({"num_frames": 3}, "have 3 frames already"),
    ):
        with pytest.raises(ValueError, match=said):
            codes = torch.zeros(4, 4, 3, dtype=torch.long)
            extend(mono, codes, PROMPTS, processor=tiny_processor(), **({"num_frames": 9} | settings))
