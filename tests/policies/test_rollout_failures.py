"""Rollouts that cannot work: refused in time, or stopped with everything as it was."""

import copy
import math

import pytest
import torch

from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import encode_text
from diverse_cfg.policies.sampler.decoders import EagerDecoder
from diverse_cfg.policies.sampler.loop import DecodeLoop
from diverse_cfg.policies.sampler.rollout import RolloutWeights, fast_generate, sample_codes
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor

FRAMES = 18


def policy_of(channels=1):
    return load_policy(tiny_musicgen(channels))


def generate(model, prompts=PROMPTS, **settings):
    settings = {"processor": tiny_processor(), "num_frames": FRAMES, "seed": 0} | settings
    return fast_generate(model, prompts, **settings)


def test_a_broken_codec_is_no_music():
    """Fault: NaN became samples at full scale, and the clip was written."""
    model = policy_of()
    with torch.no_grad():
        model.audio_encoder.decoder.layers[0].conv.bias[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"audio_encoder.*copy, download or save the model again"):
        generate(model)


@pytest.mark.parametrize("backend", ["fast", "transformers"])
def test_an_exception_leaves_everything_as_it_was(backend, monkeypatch):
    model = policy_of()
    model.train()
    model.decoder.eval()
    weights = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    config, attributes, state = model.generation_config, set(vars(model.audio_encoder)), torch.get_rng_state()
    calls = []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(*args, **kwargs)

    if backend == "fast":
        original = EagerDecoder.step
        monkeypatch.setattr(EagerDecoder, "step", interrupted)
    else:
        original = model.decoder.forward
        monkeypatch.setattr(model.decoder, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        generate(model, rollout_backend=backend, guidance_scale=3.0)
    monkeypatch.undo()
    assert len(calls) == 5
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is config
    assert set(vars(model.audio_encoder)) == attributes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert torch.equal(generate(model, rollout_backend=backend).codes, generate(policy_of()).codes)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory"),
    MemoryError("Unable to allocate 2 GiB"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.fixture
def limited(monkeypatch):
    """Memory for three clips at once; the list of what was tried."""
    run, sizes = DecodeLoop.run, []

    def running(loop, noise, *_):
        sizes.append(len(noise))
        if len(noise) > 3:
            run(loop, noise)  # the failure comes late, when everything has been written to
            raise sizes.error
        run(loop, noise)

    class Sizes(list):
        error = ERRORS[0]

    sizes = Sizes()
    monkeypatch.setattr(DecodeLoop, "run", running)
    return sizes


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_out_of_memory_halves_the_batch(error, limited, caplog, monkeypatch):
    """Faults: a failure that could be helped, noise that moves with the batch, a weight that was touched."""
    model = policy_of()
    expected = generate(model, num_generations=2, batch_size=2)
    limited.clear()
    limited.error = error
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    weights = RolloutWeights.from_model(model)
    ours = generate(model, num_generations=2, weights=weights)
    assert limited == [8, 4, 2, 2, 2, 2]
    assert torch.equal(ours.codes, expected.codes)
    torch.testing.assert_close(ours.waveforms, expected.waveforms)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    fresh = RolloutWeights.from_model(model)
    tensors = {
        name: (value.to_dense(), fresh.tensors[name].to_dense()) for name, value in weights.tensors.items()
    }
    assert all(torch.equal(*pair) for pair in tensors.values())
    messages = [record.getMessage().split(":")[0] for record in caplog.records if "memory" in record.message]
    assert messages == [f"out of memory, going on with {size} clips at once" for size in (4, 2)]
    # What fits is known from then on.
    limited.clear()
    condition = encode_text(model, tiny_processor(), PROMPTS).repeat_interleave(2)
    again = sample_codes(model, condition, FRAMES, weights=weights)
    assert limited == [2, 2, 2, 2]
    assert torch.equal(again.codes, expected.codes)


def test_one_clip_that_does_not_fit_is_an_error_with_a_remedy(monkeypatch):
    def never(loop, *_):
        raise ERRORS[2]

    monkeypatch.setattr(DecodeLoop, "run", never)
    with pytest.raises(torch.OutOfMemoryError, match=r"one clip at once: DefaultCPUAllocator.*shorter clips"):
        generate(policy_of())


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    calls = []

    def broken(loop, *_):
        calls.append(1)
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DecodeLoop, "run", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        generate(policy_of())
    assert len(calls) == 1


@pytest.mark.parametrize("backend", ["fast", "transformers"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_name_prompt_and_step(backend, temperature):
    """A NaN would otherwise be drawn as some code, and the clip would look like music."""
    model = policy_of()
    with torch.no_grad():
        model.decoder.model.decoder.embed_positions.weights[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"'a calm piano song' are not finite at step 5"):
        generate(model, rollout_backend=backend, temperature=temperature)
    # One prompt alone: the word "cello" is broken.
    model = policy_of()
    with torch.no_grad():
        model.text_encoder.shared.weight[tiny_processor().tokenizer("cello").input_ids[0]] = math.inf
    with pytest.raises(FloatingPointError, match=r"'sad cello' are not finite at step 0"):
        generate(model, rollout_backend=backend, temperature=temperature)


def test_broken_row_of_a_condition_is_named():
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS)
    condition.hidden_states[2, 0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="row 2 of the condition are not finite at step 0"):
        sample_codes(model, condition, FRAMES)
    # Named by its caller, and found in its own batch.
    with pytest.raises(FloatingPointError, match="of sad cello are not finite at step 0"):
        sample_codes(model, condition, FRAMES, names=PROMPTS, batch_size=1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prompts": []}, "non-empty list"),
        ({"prompts": ["a", ""]}, "prompt 1 is ''"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_generations": 0}, "num_generations=0"),
        ({"num_frames": 0}, "num_frames=0 must be an integer"),
        ({"num_frames": True}, "num_frames=True must be an integer"),
        ({"guidance_scale": "3"}, "guidance_scale='3' must be a number"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"num_frames": 18.0}, "num_frames=18.0 must be an integer"),
        ({"seed": 1.5}, "seed 1.5"),
        ({"sample_ids": [0, 1, 2, 3.5]}, "sample id 3.5"),
        (
            {"rollout_backend": "transformers", "dtype": torch.bfloat16},
            "dtype=torch.bfloat16 needs rollout_backend='fast'",
        ),
        ({"num_frames": 126}, "126 needs 129 positions of 128: ask for at most 125"),
        ({"num_frames": 1501}, "1501 is 30.0 s; .*at most 1500"),
        ({"guidance_scale": 0.5}, "guidance_scale=0.5"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan"),
        ({"rollout_backend": "vllm"}, "'vllm' must be one of fast, transformers"),
        ({"negative_prompt": "bad"}, "needs guidance"),
        ({"negative_prompt": " ", "guidance_scale": 3.0}, "needs text"),
        ({"sample_ids": [1]}, "1 sample_ids for 4 clips"),
        ({"seed": -1}, "seed -1"),
        ({"rollout_backend": "transformers", "num_frames": 2}, "at least 3 frames"),
    ],
)
def test_bad_requests_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        generate(policy_of(), settings.pop("prompts", PROMPTS), **settings)


def test_bad_conditions_are_refused():
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS)
    with pytest.raises(ValueError, match="no rows"):
        sample_codes(model, condition.select([]), FRAMES)
    with pytest.raises(ValueError, match="1 negative conditions for 4 clips"):
        sample_codes(model, condition, FRAMES, guidance_scale=2.0, negative_condition=condition.select([0]))


def test_unknown_attention_is_refused():
    model = policy_of()
    model.decoder.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match=r"paged\|sdpa.*rollout_backend"):
        generate(model)


def test_without_a_seed_the_global_state_moves_only_when_there_are_clips(monkeypatch):
    model, state = policy_of(), torch.get_rng_state()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DecodeLoop, "run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        generate(model, seed=None)
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (generate(model, seed=None).codes for _ in range(2))
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(generate(model, seed=None).codes, first)


def test_autocast_of_the_caller_does_not_reach_in():
    model = policy_of()
    expected = generate(model, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        clips = generate(model, seed=2)
    assert torch.equal(clips.codes, expected.codes)
    assert clips.waveforms.dtype == torch.float32
    assert torch.equal(clips.waveforms, expected.waveforms)


def test_a_snapshot_of_another_model_or_dtype_is_refused():
    model, stereo = policy_of(), RolloutWeights.from_model(policy_of(2))
    with pytest.raises(ValueError, match=r"delays=\(0, 0, .*, the model has .*delays=\(0, 1, 2, 3\)"):
        generate(model, weights=stereo)
    with pytest.raises(ValueError, match=r"no effect on weights that are torch\.float32"):
        generate(model, weights=RolloutWeights.from_model(model), dtype=torch.bfloat16)
