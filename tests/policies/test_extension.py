"""Clips that begin with given codes: one model after another, and longer music window by window."""

import pytest
import torch

from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import code_logits, encode_text
from diverse_cfg.policies.sampler import rollout
from diverse_cfg.policies.sampler.extension import extend
from diverse_cfg.policies.sampler.rollout import fast_generate, sample_codes
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
