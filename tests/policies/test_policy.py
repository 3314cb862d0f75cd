"""The policy's exact logits, held against transformers' own forward and `generate`."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from diverse_cfg.functional.guidance import guided_logits
from diverse_cfg.policies.layers import effective_weight
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import (
    LORA_TARGET_MODULES,
    code_hidden_states,
    code_logits,
    delays,
    encode_text,
    frame_rate,
    head_weights,
)
from diverse_cfg.policies.policy import Policy, as_policy
from diverse_cfg.types import TextCondition
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor


@pytest.fixture(params=[1, 2], ids=["mono", "stereo"])
def policy(request):
    return load_policy(tiny_musicgen(request.param))


@pytest.fixture
def condition(policy):
    return encode_text(policy, tiny_processor(), PROMPTS)


def random_codes(policy, num_clips=4, num_frames=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (num_clips, policy.decoder.config.num_codebooks, num_frames)
    return torch.randint(0, 16, shape, generator=generator)


def test_text_is_encoded_once_per_distinct_prompt_in_order(policy):
    seen = []
    handle = policy.text_encoder.register_forward_hook(
        lambda module, args, kwargs, output: seen.append(kwargs["input_ids"].shape[0]), with_kwargs=True
    )
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[2], PROMPTS[3]]
    condition = encode_text(policy, tiny_processor(), prompts)
    handle.remove()
    assert seen == [3]
    tokens = tiny_processor()(text=prompts, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = policy.text_encoder(**tokens).last_hidden_state
    torch.testing.assert_close(condition.hidden_states, expected)
    assert torch.equal(condition.attention_mask, tokens["attention_mask"])


def test_text_encoder_is_used_without_dropout_and_left_in_its_mode():
    """A live model in train mode with its checkpoint's dropout would give every call another prompt."""
    model = tiny_musicgen().train()
    model.text_encoder.encoder.final_layer_norm.eval()
    modes = [module.training for module in model.modules()]
    first, second = (encode_text(model, tiny_processor(), PROMPTS) for _ in range(2))
    assert torch.equal(first.hidden_states, second.hidden_states)
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("prompts", [[], ["a", " "], ["a", None], "a calm piano song"])
def test_prompts_without_text_are_refused(policy, prompts):
    with pytest.raises(ValueError, match="prompt"):
        encode_text(policy, tiny_processor(), prompts)


@pytest.mark.parametrize("own", [None, 300])
def test_prompts_longer_than_the_text_encoder_takes_are_refused(policy, own):
    """Fault: gigabytes of memory for one prompt, of which T5 has seen no like."""
    processor, limit = tiny_processor(), own or 512
    if own:
        processor.tokenizer.model_max_length = own
    longest = " ".join(["piano"] * (limit - 1))  # and the end of the text
    assert encode_text(policy, processor, ["a", longest]).attention_mask.shape == (2, limit)
    with pytest.raises(
        ValueError, match=rf"prompt 1 has {limit + 1} tokens, the text encoder takes {limit}: shorten it"
    ):
        encode_text(policy, processor, ["a", longest + " song"])


def test_null_prompt_is_no_cross_attention_exactly(policy, condition):
    """Zeros with an open mask would be another prompt, through the bias of the projection."""
    codes = random_codes(policy)
    null = code_logits(policy, codes, condition.null())
    assert torch.equal(null, code_logits(policy, codes, None))
    open_mask = TextCondition(
        torch.zeros_like(condition.hidden_states), torch.ones_like(condition.attention_mask)
    )
    assert (code_logits(policy, codes, open_mask) - null).abs().max() > 0.1


def test_code_logits_are_those_of_the_full_model(policy, condition):
    """Delay off by one, swapped codebooks, forgotten projection: all differ from the stock forward."""
    codes = random_codes(policy)
    num_clips, num_codebooks, num_frames = codes.shape
    channels = policy.decoder.config.audio_channels
    delay = [k // channels for k in range(num_codebooks)]
    steps = num_frames + delay[-1]
    inputs = np.full((num_clips, num_codebooks, steps), 16)
    for n in range(num_clips):
        for k in range(num_codebooks):
            for t in range(num_frames):
                if 1 + t + delay[k] < steps:
                    inputs[n, k, 1 + t + delay[k]] = codes[n, k, t]
    tokens = tiny_processor()(text=PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        stock = policy(**tokens, decoder_input_ids=torch.tensor(inputs).flatten(0, 1), use_cache=False).logits
        ours = code_logits(policy, codes, condition)
    stock = stock.view(num_clips, num_codebooks, steps, -1)
    for k in range(num_codebooks):
        for t in range(num_frames):
            torch.testing.assert_close(ours[:, k, t], stock[:, k, t + delay[k]], atol=1e-5, rtol=0)


def test_a_code_influences_exactly_what_is_decoded_after_it(policy, condition):
    codes = random_codes(policy)
    delay = torch.tensor(delays(policy))
    step = torch.arange(codes.shape[-1]) + delay[:, None]  # when each code is decoded [K, T]
    with torch.no_grad():
        before = code_logits(policy, codes, condition)
        for codebook, frame in [(0, 0), (1, 3), (codes.shape[1] - 1, 2)]:
            changed = codes.clone()
            changed[:, codebook, frame] = (changed[:, codebook, frame] + 1) % 16
            moved = (code_logits(policy, changed, condition) - before).abs().amax((0, 3)) > 1e-6
            assert torch.equal(moved, step > step[codebook, frame])


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_teacher_forced_logits_are_the_scores_of_generate(policy, condition, guidance_scale):
    """The loss is evaluated on the distribution that stock `generate` samples from."""
    caught = []
    decode = policy.audio_encoder.decode
    policy.audio_encoder.decode = lambda codes, audio_scales: (
        caught.append(codes[0]) or decode(codes, audio_scales)
    )
    tokens = tiny_processor()(text=PROMPTS, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    output = policy.generate(
        **tokens,
        max_new_tokens=12,
        do_sample=True,
        top_k=0,
        guidance_scale=guidance_scale,
        return_dict_in_generate=True,
        output_scores=True,
    )
    codes = caught[0] if len(caught) == 1 else torch.stack(caught, 2).flatten(1, 2)
    with torch.no_grad():
        cond, null = (code_logits(policy, codes, c) for c in (condition, condition.null()))
    ours = guided_logits(cond, null, guidance_scale)
    num_clips, num_codebooks, num_frames = codes.shape
    scores = torch.stack(output.scores, 1).view(num_clips, num_codebooks, 12, -1)
    for k, delay in enumerate(delays(policy)):
        expected = scores[:, k, delay : delay + num_frames]
        torch.testing.assert_close(ours[:, k], expected, atol=2e-5, rtol=0)


def test_heads_on_hidden_states_give_the_logits(policy, condition):
    codes = random_codes(policy)
    with torch.no_grad():
        hidden, heads = code_hidden_states(policy, codes, condition), head_weights(policy)
        logits = code_logits(policy, codes, condition)
    for k, delay in enumerate(delays(policy)):
        torch.testing.assert_close(hidden[:, delay : delay + 7] @ heads[k].T, logits[:, k])


def test_shapes_that_do_not_fit_are_refused(policy, condition):
    codes = random_codes(policy)
    with pytest.raises(ValueError, match="must have shape"):
        code_logits(policy, codes[:, :3], condition)
    with pytest.raises(ValueError, match="4 conditions for 2 clips"):
        code_logits(policy, codes[:2], condition)
    with pytest.raises(ValueError, match="128: use shorter clips"):
        code_logits(policy, random_codes(policy, num_frames=127), condition)


def test_frame_rate_and_freezing(policy):
    assert frame_rate(policy) == 50
    as_policy(policy).freeze()
    trainable = {
        name.split(".")[0] for name, parameter in policy.named_parameters() if parameter.requires_grad
    }
    assert trainable == {"decoder", "enc_to_dec_proj"}


def test_lora_targets_are_the_decoders_projections_only(policy):
    """`all-linear` would adapt T5, the text projection and the heads too."""
    linear = {
        name for name, module in policy.decoder.model.named_modules() if isinstance(module, torch.nn.Linear)
    }
    wrapped = get_peft_model(policy, LoraConfig(r=2, target_modules=LORA_TARGET_MODULES))
    adapted = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    assert adapted == {f"base_model.model.decoder.model.{name}" for name in linear}


@pytest.mark.parametrize("rslora", [False, True])
def test_effective_weight_is_the_merged_weight(rslora):
    settings = LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=[*LORA_TARGET_MODULES, "lm_heads.0"],
        init_lora_weights=False,
        use_rslora=rslora,
    )
    torch.manual_seed(0)
    wrapped = get_peft_model(load_policy(tiny_musicgen()), settings)
    inner = wrapped.get_base_model().decoder
    modules = {"q": inner.model.decoder.layers[1].encoder_attn.q_proj, "head": inner.lm_heads[0]}
    weights = {name: effective_weight(module) for name, module in modules.items()}
    with wrapped.disable_adapter():
        assert torch.equal(effective_weight(modules["q"]), modules["q"].base_layer.weight)
    weights["q"].sum().backward()
    assert modules["q"].lora_B["default"].weight.grad.abs().sum() > 0
    merged = wrapped.merge_and_unload().decoder
    torch.testing.assert_close(weights["q"], merged.model.decoder.layers[1].encoder_attn.q_proj.weight)
    torch.testing.assert_close(weights["head"], merged.lm_heads[0].weight)


def test_weights_of_a_table_with_adapters_and_their_dtype():
    """Fault: heads in float32 for one adapter among bfloat16 layers, or a sum that was rounded on the way."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embed_tokens.0", "lm_heads.0"], init_lora_weights=False)
    wrapped = get_peft_model(load_policy(tiny_musicgen()).to(torch.bfloat16), config)
    decoder = wrapped.get_base_model().decoder
    for layer in (decoder.model.decoder.embed_tokens[0], decoder.lm_heads[0]):
        exact = layer.base_layer.weight.float() + layer.get_delta_weight("default")
        assert torch.equal(effective_weight(layer, wide=True), exact)
        assert torch.equal(effective_weight(layer), exact.to(torch.bfloat16))
    assert head_weights(wrapped).dtype == torch.bfloat16
    rows = torch.arange(17)
    with torch.no_grad():
        table = decoder.model.decoder.embed_tokens[0]
        torch.testing.assert_close(table(rows), effective_weight(table))


def test_adapters_upon_adapters_are_refused():
    """Only the outer one would count, since the weight is that of the innermost layer."""
    config = LoraConfig(r=2, target_modules=["fc1", "fc2"])
    layer = (
        get_peft_model(load_policy(tiny_musicgen()), config).get_base_model().decoder.model.decoder.layers[0]
    )
    layer.fc1.base_layer = layer.fc2
    with pytest.raises(ValueError, match=r"adapters of type .*Linear are not supported"):
        effective_weight(layer.fc1)


def test_adapters_that_are_no_sum_are_refused():
    """DoRA rescales the weight: adding its low-rank part alone would sample another policy."""
    config = LoraConfig(r=2, target_modules=["fc1"], use_dora=True)
    wrapped = get_peft_model(load_policy(tiny_musicgen()), config)
    with pytest.raises(ValueError, match="DoRA"):
        effective_weight(wrapped.get_base_model().decoder.model.decoder.layers[0].fc1)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_plain_way_to_sample_gives_the_same_clips(policy, condition, guidance_scale):
    """A whole forward pass per step, which shares no decoder code with the fused loop, draws the same codes."""
    live = as_policy(policy)
    settings = {"guidance_scale": guidance_scale, "temperature": 0.9, "seed": 3, "sample_ids": [5, 6, 7, 8]}
    plainly = Policy.sample(live, condition, 6, **settings)
    assert torch.equal(plainly.codes, live.sample(condition, 6, **settings).codes)


def test_a_schedule_guides_every_frame_by_its_own_scale(policy, condition):
    """Codebooks of one step are of different frames: fault: the step's scale, or that of the first codebook."""
    live, schedule = as_policy(policy), (3.0, 1.0, 2.0, 5.0, 1.0, 1.5)
    settings = {"guidance_scale": schedule, "seed": 3}
    plainly = Policy.sample(live, condition, 6, **settings).codes
    clips = live.sample(condition, 6, **settings, return_logps=True)
    assert torch.equal(plainly, clips.codes)
    cond, null = (live.code_logits(plainly, rows) for rows in (condition, condition.null()))
    scale = torch.tensor(schedule)[:, None]
    wanted = (null + scale * (cond - null)).log_softmax(-1).gather(-1, plainly[..., None])[..., 0]
    torch.testing.assert_close(clips.logps, wanted, atol=1e-4, rtol=1e-4)
    constant = live.sample(condition, 6, guidance_scale=(3.0,) * 6, seed=3).codes
    assert torch.equal(constant, live.sample(condition, 6, guidance_scale=3.0, seed=3).codes)
    with pytest.raises(ValueError, match="6 numbers, one per frame, but the clips have 7 frames"):
        live.sample(condition, 7, **settings)
    with pytest.raises(ValueError, match=r"guidance_scale=0\.5 of frame 1"):
        live.sample(condition, 2, guidance_scale=[1.0, 0.5])
    with pytest.raises(ValueError, match="rollout_backend='transformers' has one γ"):
        live.sample(condition, 6, **settings, rollout_backend="transformers")
