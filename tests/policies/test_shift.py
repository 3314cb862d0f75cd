"""A student that is told γ: folded into the bias it is a plain MusicGen that computes the same."""

import copy

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.sampler.rollout import fast_generate
from diverse_cfg.policies.shift import SHIFT_FILE, read_shift
from tests import toy
from tests.checkpoints import teacher_forced_logits
from tests.tiny import PROMPTS, save_tiny, tiny_musicgen, tiny_processor

RANGE = GuidanceRange.of({"low": 1, "high": 5})


def told_musicgen(guidance=RANGE, audio_channels=1):
    """A model whose table is drawn at random, large enough to be heard."""
    model = tiny_musicgen(audio_channels)
    policy = as_policy(model, tiny_processor(audio_channels=audio_channels))
    policy.learn_guidance(guidance)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        policy.shift.table.copy_(torch.randn(policy.shift.table.shape, generator=generator) / 16)
    return policy


@pytest.mark.parametrize(
    ("value", "knots", "reference"),
    [
        ({"low": 1, "high": 5}, (1, 2, 3, 4, 5), 3),
        ({"low": 1, "high": 2}, (1, 1.25, 1.5, 1.75, 2), 2),
        ({"low": 1, "high": 4}, (1, 1.75, 2.5, 3, 3.25, 4), 3),
        ([4, 1, 2.5], (1, 2.5, 4), 2.5),
        ([1, 6], (1, 6), 6),
    ],
)
def test_range(value, knots, reference):
    guidance = GuidanceRange.of(value)
    assert guidance.knots == knots
    assert guidance.reference == reference
    drawn = [guidance.draw(n / 1000) for n in range(1000)]
    assert min(drawn) == knots[0]
    assert knots[-1] - 0.01 < max(drawn) <= knots[-1]
    assert set(drawn) == set(knots) if isinstance(value, list) else len(set(drawn)) == 1000


@pytest.mark.parametrize(
    "value",
    [
        *({"low": 3, "high": 1}, {"low": 0.5, "high": 2}, {"low": 2, "high": 2}, {"low": 1}),
        *({"low": 1, "high": 2, "step": 1}, [3], [2, 2], [1, "x"], [1, float("nan")], [True, 3]),
    ],
)
def test_what_is_no_range_is_refused(value):
    with pytest.raises(ValueError, match=r"guidance_scale=.*low: 1, high: 5"):
        GuidanceRange.of(value)


def test_shift_is_linear_between_the_knots():
    """Against NumPy's own interpolation; fault: a wrong neighbour, or a reference that is not 0."""
    policy = told_musicgen(GuidanceRange.of([1, 2.5, 3, 6]))
    table = policy.shift.table.detach().double().numpy() * 16
    places = [1.0, 1.75, 2.5, 2.6, 3.0, 4.5, 6.0]
    wanted = [[np.interp(x, [1, 2.5, 3, 6], column) - column[2] for column in table.T] for x in places]
    found = policy.model.guidance_shift(torch.tensor(places)).detach().numpy()
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (policy.shift.at(3) == 0).all()


@pytest.mark.parametrize("guidance_scale", [1, 2.3, 3, 5])
def test_folded_and_told_compute_the_same(guidance_scale):
    """Teacher-forced in float64, texts of different length; the folded one by stock transformers, which knows of no
    table. Fault: padding that is shifted too, or a shift before the projection."""
    policy = told_musicgen()
    policy.model.double()
    told = policy.encode_text(PROMPTS).told(torch.tensor([float(guidance_scale)] * 4))
    codes = torch.randint(16, (4, 4, 9), generator=torch.Generator().manual_seed(1))
    logits = policy.code_logits(codes, told)
    folded = copy.deepcopy(policy.model)
    as_policy(folded).fold_guidance(guidance_scale)
    plain = MusicgenForConditionalGeneration(folded.config).double().eval()
    plain.load_state_dict(folded.state_dict(), strict=True)
    tokens = policy.tokenizer(PROMPTS, padding=True, return_tensors="pt")
    assert (tokens.attention_mask == 0).any()
    shifted = torch.full((4, 4, 12), 16)
    for k in range(4):
        shifted[:, k, 1 + k : 10 + k] = codes[:, k, : 11 - k]
    stock = plain(**tokens, decoder_input_ids=shifted.flatten(0, 1)).logits.unflatten(0, (4, 4))
    for k in range(4):
        assert (stock[:, k, k : k + 9] - logits[:, k]).abs().max() < 1e-5
    null = policy.code_logits(codes, told.null())
    assert torch.equal(null, policy.code_logits(codes, None))
    assert (logits - policy.code_logits(codes, told.told(None))).abs().max() > 1e-3 or guidance_scale == 3


@pytest.mark.parametrize("audio_channels", [1, 2])
def test_clips_of_the_folded_model_are_those_of_the_told_one(audio_channels):
    """To the code, for a seed, by both samplers; rows of one batch may be told different γ."""
    policy = told_musicgen(audio_channels=audio_channels)
    settings = {"processor": policy.processor, "num_frames": 12, "seed": 3, "decode": False}
    scales, codes = [1.0, 2.3, 3.0, 4.9], []
    for prompt, scale in zip(PROMPTS, scales, strict=True):
        folded = copy.deepcopy(policy.model)
        as_policy(folded).fold_guidance(scale)
        for backend in ("fast", "transformers"):
            plain = fast_generate(folded, prompt, rollout_backend=backend, **settings)
            told = fast_generate(
                policy.model, prompt, student_guidance=scale, rollout_backend=backend, **settings
            )
            assert torch.equal(plain.codes, told.codes)
        codes.append(plain.codes)
    assert not torch.equal(codes[0], fast_generate(policy.model, PROMPTS[0], **settings).codes)
    together = policy.sample(
        policy.encode_text(PROMPTS).told(torch.tensor(scales)), 12, seed=3, sample_ids=[0] * 4
    )
    assert torch.equal(together.codes, torch.cat(codes))


def test_files(tmp_path):
    """Beside the weights, which stay a plain model's; fault: a table in `model.safetensors`, which others refuse."""
    folder = save_tiny(tmp_path / "student")
    policy = told_musicgen()
    policy.model.save_pretrained(folder)
    assert not any("shift" in name for name in load_file(tmp_path / "student" / "model.safetensors"))
    plain = MusicgenForConditionalGeneration.from_pretrained(folder).eval()
    policy.shift.save(folder)
    loaded = as_policy(load_policy(folder))
    assert torch.equal(loaded.shift.table, policy.shift.table)
    assert loaded.shift.guidance == RANGE
    assert torch.equal(teacher_forced_logits(loaded.model), teacher_forced_logits(plain))
    assert as_policy(load_policy(folder, torch_dtype=torch.bfloat16)).shift.table.dtype == torch.bfloat16
    tensors = load_file(tmp_path / "student" / SHIFT_FILE)
    for broken in (
        {"table": tensors["table"][:3]},
        {"table": tensors["table"] * torch.nan},
        {"knots": tensors["knots"][:1]},
    ):
        save_file(tensors | broken, tmp_path / "student" / SHIFT_FILE)
        with pytest.raises(ValueError, match=SHIFT_FILE):
            read_shift(folder)
    save_file(tensors | {"table": tensors["table"][:, :5].clone()}, tmp_path / "student" / SHIFT_FILE)
    with pytest.raises(ValueError, match="width 5"):
        load_policy(folder)


def test_refusals(tmp_path):
    policy = told_musicgen()
    settings = {"processor": policy.processor, "num_frames": 5}
    for wrong in (0.9, 5.1, float("nan"), "3", True):
        with pytest.raises(ValueError, match="from 1 to 5"):
            fast_generate(policy.model, "sad cello", student_guidance=wrong, **settings)
    with pytest.raises(ValueError, match="one γ"):
        fast_generate(tiny_musicgen(), "sad cello", student_guidance=2, **settings)
    with pytest.raises(ValueError, match=r"from 1 to 5.*--bake-guidance"):
        policy.learn_guidance(GuidanceRange.of([1, 3]))
    policy.learn_guidance(RANGE)
    with pytest.raises(ValueError, match="toy-letters"):
        as_policy(toy.ToyModel(toy.ToyConfig())).learn_guidance(RANGE)
    wide = as_policy(tiny_musicgen(hidden_size=12))  # as wide as its T5
    assert not hasattr(wide.model, "enc_to_dec_proj")
    with pytest.raises(ValueError, match=r"enc_to_dec_proj.*as wide"):
        wide.learn_guidance(RANGE)
