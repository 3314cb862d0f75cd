"""Rollouts: the fast loop plays what stock `generate` plays, and a clip is nobody's but its own."""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy import stats

from diverse_cfg.assets import nano_path
from diverse_cfg.functional.guidance import guided_logits
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.musicgen.model import LORA_TARGET_MODULES, code_logits, encode_text
from diverse_cfg.policies.sampler import batches
from diverse_cfg.policies.sampler import weights as weights_module
from diverse_cfg.policies.sampler.loop import DecodeLoop
from diverse_cfg.policies.sampler.rollout import RolloutWeights, decode_codes, fast_generate, sample_codes
from diverse_cfg.prompts import load_prompts
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor

CHANNELS = pytest.mark.parametrize("channels", [1, 2], ids=["mono", "stereo"])
FRAMES = 18


def stock(model, prompts, num_frames, **settings):
    """Audio and codes of plain `generate`, caught where they enter the codec."""
    caught = []
    decode = type(model.audio_encoder).decode

    def catch(codes, audio_scales):
        caught.append(codes[0])
        return decode(model.audio_encoder, codes, audio_scales)

    model.audio_encoder.decode = catch
    tokens = tiny_processor()(text=list(prompts), padding=True, return_tensors="pt")
    audio = model.generate(**tokens, max_new_tokens=num_frames + 3, **settings)
    del model.audio_encoder.decode
    return audio, (caught[0] if len(caught) == 1 else torch.stack(caught, 2).flatten(1, 2))


def policy_of(channels=1, **settings):
    return load_policy(tiny_musicgen(channels, **settings))


def generate(model, prompts=PROMPTS, **settings):
    settings = {"processor": tiny_processor(), "num_frames": FRAMES, "seed": 0} | settings
    return fast_generate(model, prompts, **settings)


def log_probabilities(logits, codes):
    return logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]


@CHANNELS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_greedy_codes_and_audio_are_those_of_generate(channels, guidance_scale):
    model = policy_of(channels)
    audio, codes = stock(model, PROMPTS, FRAMES, do_sample=False, guidance_scale=guidance_scale)
    ours = generate(model, temperature=0.0, guidance_scale=guidance_scale)
    assert torch.equal(ours.codes, codes)
    torch.testing.assert_close(ours.waveforms, audio[:, 0] if channels == 1 else audio)
    assert ours.sampling_rate == 3200
    assert torch.equal(
        generate(model, temperature=0.0, guidance_scale=guidance_scale, batch_size=3).codes, codes
    )
    order = [2, 0, 3, 1]
    shuffled = generate(model, [PROMPTS[i] for i in order], temperature=0.0, guidance_scale=guidance_scale)
    assert torch.equal(shuffled.codes, codes[order])


@CHANNELS
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.8, "top_k": 5},
        {"guidance_scale": 3.0},
        {"guidance_scale": 2.0, "top_k": 9, "top_p": 0.8, "min_p": 0.05},
        {"guidance_scale": 3.0, "negative_prompt": "sad drum"},
    ],
)
def test_both_backends_play_the_same_clips(channels, settings):
    """Stock `generate` with the clips' own random numbers: temperature, filters, guidance, order of all."""
    model = policy_of(channels)
    ours, theirs = (
        generate(model, num_generations=2, return_logps=True, rollout_backend=backend, **settings)
        for backend in ("fast", "transformers")
    )
    assert torch.equal(ours.codes, theirs.codes)
    torch.testing.assert_close(ours.logps, theirs.logps, atol=2e-5, rtol=0)
    assert ours.codes.unique().numel() > 4


def test_sampled_distribution_is_that_of_generate():
    """Two-sample χ² with plain `generate` and its own multinomial, on the codes of the last decoded frame."""
    model = policy_of()
    settings = {"guidance_scale": 2.0, "temperature": 0.9, "top_k": 6}
    prompts = [PROMPTS[0]] * 1500
    torch.manual_seed(0)
    _, theirs = stock(model, prompts, 3, do_sample=True, **settings)
    ours = generate(model, PROMPTS[:1], num_frames=3, num_generations=1500, decode=False, **settings).codes
    for codebook in range(4):
        counts = np.stack([np.bincount(codes[:, codebook, 2], minlength=16) for codes in (ours, theirs)])
        common = counts[:, counts.sum(0) >= 20]
        assert common.shape[1] >= 3
        assert stats.chi2_contingency(common).pvalue > 1e-3


@CHANNELS
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_recorded_log_probs_are_the_teacher_forced_ones(channels, guidance_scale):
    """On-policy is a numerical claim: the loop and the training forward are the same distribution."""
    model = policy_of(channels)
    condition = encode_text(model, tiny_processor(), PROMPTS)
    rollout = sample_codes(
        model, condition, FRAMES, guidance_scale=guidance_scale, temperature=0.7, return_logps=True
    )
    with torch.no_grad():
        cond = code_logits(model, rollout.codes, condition)
        null = code_logits(model, rollout.codes, condition.null())
    expected = log_probabilities(guided_logits(cond, null, guidance_scale) / 0.7, rollout.codes)
    assert (rollout.logps - expected).abs().max() < 1e-5
    assert rollout.waveforms is None


def test_a_negative_condition_may_have_another_length():
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS)
    negative = encode_text(model, tiny_processor(), ["sad"] * 4)
    assert negative.attention_mask.shape != condition.attention_mask.shape
    ours = sample_codes(model, condition, FRAMES, guidance_scale=3.0, negative_condition=negative)
    assert torch.equal(ours.codes, generate(model, guidance_scale=3.0, negative_prompt="sad").codes)


def test_a_clip_does_not_depend_on_its_batch():
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS).repeat_interleave(2)
    together = sample_codes(model, condition, FRAMES, seed=5, sample_ids=range(40, 48)).codes
    for row in (0, 3, 7):
        alone = sample_codes(model, condition.select([row]), FRAMES, seed=5, sample_ids=[40 + row]).codes
        assert torch.equal(alone[0], together[row])
    order = [6, 1, 4]
    some = sample_codes(model, condition.select(order), FRAMES, seed=5, sample_ids=[40 + i for i in order])
    assert torch.equal(some.codes, together[order])
    assert not torch.equal(together[0], together[1])


def test_clips_of_the_shipped_model_do_not_depend_on_their_batch():
    """512 codes and 150 frames: products are rounded otherwise for one row than for sixteen."""
    model, processor = load_policy(nano_path("base")), load_processor(nano_path("base"))
    prompts = list(load_prompts(str(nano_path("prompts")), split="test")["prompt"][:16])
    settings = {"processor": processor, "num_frames": 150, "decode": False, "seed": 3}
    together = fast_generate(model, prompts, **settings).codes
    different = 0
    for batch_size in (1, 5):
        codes = fast_generate(model, prompts, batch_size=batch_size, **settings).codes
        different += int((codes != together).flatten(1).any(1).sum())
    assert different <= 1  # of 32: a tie within rounding, about once in a million draws


def test_the_automatic_batch_keeps_the_caches_small(monkeypatch):
    """64 guided clips of 10 s at musicgen-small's shape would take 12 GB of caches, and a CPU is killed."""
    model, sizes = policy_of(), []
    condition = encode_text(model, tiny_processor(), PROMPTS)
    run = DecodeLoop.run
    monkeypatch.setattr(
        DecodeLoop, "run", lambda loop, noise, *_: sizes.append(len(noise)) or run(loop, noise)
    )
    # 2 layers × keys and values × 16 wide × 21 steps × 4 bytes, twice with guidance
    monkeypatch.setattr(batches, "_CPU_CACHE_BYTES", 3 * 2 * 2 * 16 * 21 * 4)
    for guidance_scale in (1.0, 3.0):
        generate(model, guidance_scale=guidance_scale, decode=False)
        sample_codes(model, condition, FRAMES, guidance_scale=guidance_scale, dtype=torch.bfloat16)
    # Four clips in two batches of equal size, and one by one with guidance.
    assert sizes == [2, 2, 2, 2, *[1] * 8]
    with pytest.raises(ValueError, match="batch_size=0"):
        sample_codes(model, condition, FRAMES, batch_size=0)


@pytest.mark.parametrize("backend", ["fast", "transformers"])
def test_batch_size_changes_nothing(backend):
    model = policy_of()
    whole, split = (
        generate(model, num_generations=2, batch_size=size, rollout_backend=backend) for size in (None, 3)
    )
    assert torch.equal(whole.codes, split.codes)
    torch.testing.assert_close(whole.waveforms, split.waveforms)
    if backend == "fast":
        condition = encode_text(model, tiny_processor(), PROMPTS).repeat_interleave(2)
        negative = encode_text(model, tiny_processor(), PROMPTS[::-1]).repeat_interleave(2)
        settings = {"guidance_scale": 2.0, "negative_condition": negative, "return_logps": True}
        whole_rows, split_rows = (
            sample_codes(model, condition, FRAMES, batch_size=size, **settings) for size in (None, 3)
        )
        assert torch.equal(whole_rows.codes, split_rows.codes)
        torch.testing.assert_close(whole_rows.logps, split_rows.logps)
    # Grouped: the clips of a prompt are adjacent.
    again = generate(model, PROMPTS[1:2], num_generations=2, sample_ids=[2, 3], rollout_backend=backend)
    assert torch.equal(again.codes, whole.codes[2:4])


def test_a_longer_clip_begins_like_a_shorter_one():
    """But for the last three frames, where the shorter one decodes beside empty cells."""
    model = policy_of()
    longer, shorter = (generate(model, num_frames=frames, decode=False).codes for frames in (30, 12))
    assert torch.equal(longer[..., :9], shorter[..., :9])
    assert torch.equal(longer[:, 0, :12], shorter[:, 0])


@pytest.mark.parametrize(("num_frames", "null"), [(1, False), (2, False), (FRAMES, True)])
def test_short_clips_and_null_rows_are_sampled_as_the_model_has_them(num_frames, null):
    """`generate` leaves out the delay pattern below K − 1 frames; the loop does not. Null rows have no prompt."""
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS)
    rows = condition.null() if null else condition
    rollout = sample_codes(model, rows, num_frames, return_logps=True)
    with torch.no_grad():
        logits = code_logits(model, rollout.codes, None if null else condition)
    assert (rollout.logps - log_probabilities(logits, rollout.codes)).abs().max() < 1e-5


@pytest.mark.parametrize("active", [True, False])
def test_lora_is_sampled_without_merging(active):
    """The adapter must count, its absence too, and the model must stay unmerged."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=LORA_TARGET_MODULES, init_lora_weights=False)
    wrapped = get_peft_model(policy_of(), config)
    before = copy.deepcopy(wrapped.state_dict())
    if active:
        ours = generate(wrapped, decode=False).codes
    else:
        with wrapped.disable_adapter():
            ours = generate(wrapped, decode=False).codes
    assert all(torch.equal(value, before[name]) for name, value in wrapped.state_dict().items())
    merged = wrapped.merge_and_unload() if active else policy_of()
    assert torch.equal(ours, generate(merged, decode=False).codes)
    assert torch.equal(ours, generate(policy_of(), decode=False).codes) is not active


def test_a_snapshot_is_refreshed_in_place(monkeypatch):
    """A CUDA graph keeps addresses: refreshing must change values, never tensors."""
    monkeypatch.setattr(weights_module, "_is_better_packed", lambda *_: False)
    model, other = policy_of(), tiny_musicgen(seed=1)
    weights = RolloutWeights.from_model(model)
    expected = RolloutWeights.from_model(load_policy(other))
    addresses = [tensor.data_ptr() for tensor in weights.tensors.values()]
    shared = {parameter.data_ptr() for parameter in model.parameters()}
    assert not shared & set(addresses)
    before = generate(model, weights=weights, decode=False).codes
    model.load_state_dict(other.state_dict())
    assert not torch.equal(generate(model, weights=weights, decode=False).codes, before)  # the text changed
    weights.refresh(model)
    assert [tensor.data_ptr() for tensor in weights.tensors.values()] == addresses
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in weights.tensors.items())
    after = generate(load_policy(other), decode=False).codes
    assert torch.equal(generate(model, weights=weights, decode=False).codes, after)


@pytest.mark.parametrize("smallest", [1, 2**30], ids=["large", "small"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_matrices_play_the_same_clips_and_are_refreshed(dtype, smallest, monkeypatch):
    """Catches a matrix packed the wrong way round, one that keeps the weights of an earlier step, an activation left
    out or computed twice, and tensors packed that should not be."""
    model, other = policy_of(), tiny_musicgen(seed=1)
    with monkeypatch.context() as patch:  # the eager loop takes them as they are
        patch.setattr(weights_module, "_is_better_packed", lambda *_: False)
        plain = RolloutWeights.from_model(model, dtype)
    assert not any(tensor.is_mkldnn for tensor in plain.tensors.values())
    expected = generate(model, weights=plain, decode=False, return_logps=True)
    monkeypatch.setattr(weights_module, "_PACKED_FROM", smallest)
    weights = RolloutWeights.from_model(model, dtype)
    packed = {name.split(".")[-1] for name, tensor in weights.tensors.items() if tensor.is_mkldnn}
    assert packed == {"fc1"} if smallest > 1 else packed == weights_module._MATRICES
    ours = generate(model, weights=weights, decode=False, return_logps=True)
    if dtype == torch.float32:
        assert torch.equal(ours.codes, expected.codes)
    torch.testing.assert_close(ours.logps[:, 0, 0], expected.logps[:, 0, 0], atol=3e-2, rtol=0)
    model.load_state_dict(other.state_dict())
    condition = encode_text(model, tiny_processor(), PROMPTS)
    old = [sample_codes(model, condition, FRAMES, weights=w).codes for w in (weights, plain)]
    assert dtype != torch.float32 or torch.equal(*old), "a snapshot does not follow the model by itself"
    weights.refresh(model)
    fresh = RolloutWeights.from_model(load_policy(other), dtype)
    assert all(
        torch.equal(weights.tensors[name].to_dense(), tensor.to_dense())
        for name, tensor in fresh.tensors.items()
    )
    ours, after = (sample_codes(model, condition, FRAMES, weights=w).codes for w in (weights, fresh))
    assert torch.equal(ours, after)


def test_without_onednn_products_are_plain(monkeypatch):
    """A build without it, and a dtype that it does not know, sample the same clips."""
    model = policy_of()
    expected = generate(model, decode=False).codes
    monkeypatch.setattr(weights_module, "_PACKED_FROM", 1)
    with monkeypatch.context() as context:
        context.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        weights = RolloutWeights.from_model(model)
        assert torch.equal(generate(model, weights=weights, decode=False).codes, expected)
    doubles = RolloutWeights.from_model(model.double())
    assert torch.equal(generate(model, weights=doubles, decode=False).codes, expected)
    assert not any(t.is_mkldnn for w in (weights, doubles) for t in w.tensors.values())


def test_half_precision_matrices_stay_close():
    """bfloat16 speeds up the matrices; residual stream, norms and draws stay in float32."""
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS)
    rollout = sample_codes(model, condition, FRAMES, return_logps=True, dtype=torch.bfloat16)
    with torch.no_grad():
        expected = log_probabilities(code_logits(model, rollout.codes, condition), rollout.codes)
    error = (rollout.logps - expected).abs()
    assert 0 < error.mean() < 0.05
    assert rollout.logps.dtype == torch.float32


def test_autocast_and_train_mode_of_the_caller_do_not_reach_in():
    model = policy_of()
    condition = encode_text(model, tiny_processor(), PROMPTS)
    expected = sample_codes(model, condition, FRAMES, return_logps=True)
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        ours = sample_codes(model, condition, FRAMES, return_logps=True)
    assert torch.equal(ours.logps, expected.logps)
    assert model.training
    (ours.logps + torch.zeros(1, requires_grad=True)).sum().backward()  # no inference tensors


@CHANNELS
def test_decoding_in_batches(channels):
    model = policy_of(channels)
    codes = torch.randint(0, 16, (5, 4 * channels, 9), generator=torch.Generator().manual_seed(0))
    whole = decode_codes(model, codes)
    torch.testing.assert_close(decode_codes(model, codes, batch_size=2), whole)
    assert whole.shape == ((5, 9 * 64) if channels == 1 else (5, 2, 9 * 64))
    left = model.audio_encoder.decode(codes[None, :, ::channels], [None]).audio_values[:, 0]
    torch.testing.assert_close(whole if channels == 1 else whole[:, 0], left)


@pytest.mark.parametrize(("num_frames", "sizes"), [(9, [5]), (100, [3, 2]), (301, [1, 1, 1, 1, 1])])
def test_a_cpu_decodes_few_frames_at_once(num_frames, sizes):
    """Twice as fast as all at once, and the longest clips still one by one."""
    model, seen = policy_of(), []
    decode = model.audio_encoder.decode
    model.audio_encoder.decode = lambda codes, scales: seen.append(codes.shape[1]) or decode(codes, scales)
    decode_codes(model, torch.zeros(5, 4, num_frames, dtype=torch.long))
    assert seen == sizes


def test_poisoned_codes_are_not_decoded():
    model = policy_of()
    codes = torch.zeros(2, 4, 5, dtype=torch.long)
    for value in (-1, 16):
        codes[0, 1, 2] = value
        with pytest.raises(ValueError, match="must lie in 0 … 15"):
            decode_codes(model, codes)
    with pytest.raises(ValueError, match="must have shape"):
        decode_codes(model, codes[:, :3])
    with pytest.raises(ValueError, match="batch_size=0"):
        decode_codes(model, torch.zeros(2, 4, 5, dtype=torch.long), batch_size=0)
