"""What the fused copy understands, held against the model's own forward pass, and what it refuses."""

import copy
import re
import warnings

import accelerate
import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from torch import nn

from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import LORA_TARGET_MODULES, code_logits, encode_text
from diverse_cfg.policies.sampler import weights as weights_module
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from tests.tiny import PROMPTS, tiny_musicgen, tiny_processor

FRAMES = 12
LAYERS = "decoder.model.decoder.layers"
TABLES = [f"embed_tokens.{codebook}" for codebook in range(4)]
HEADS = [f"lm_heads.{codebook}" for codebook in range(4)]


def policy_of(**settings):
    return load_policy(tiny_musicgen(**settings))


def contents(weights):
    return {name: tensor.to_dense().clone() for name, tensor in weights.tensors.items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def error_of_logps(model, weights=None):
    """Largest difference between the log-probabilities of sampled codes and those of the model's own forward."""
    condition = encode_text(model, tiny_processor(), PROMPTS)
    rollout = sample_codes(model, condition, FRAMES, return_logps=True, weights=weights)
    with torch.no_grad():
        logps = code_logits(model, rollout.codes, condition).float().log_softmax(-1)
    return (logps.gather(-1, rollout.codes[..., None])[..., 0] - rollout.logps).abs().max()


def lora(**settings):
    return LoraConfig(r=2, init_lora_weights=False, **settings)


UNDERSTOOD = {
    "lora": lora(target_modules=LORA_TARGET_MODULES),
    "rslora": lora(target_modules=["fc1", "q_proj"], use_rslora=True, rank_pattern={"fc1": 4}),
    "tables": lora(target_modules=TABLES),
    "heads": lora(target_modules=HEADS),
    "projection": lora(target_modules=["enc_to_dec_proj"]),
    "text encoder": lora(target_modules=["wo"]),
    "parameter": lora(target_modules=[], target_parameters=["fc1.weight", "embed_tokens.0.weight"]),
    "tokens": TrainableTokensConfig(token_indices=[0, 1, 16], target_modules=["embed_tokens.0"]),
    "lora and tokens": lora(target_modules=["fc1"], trainable_token_indices={"embed_tokens.0": [0, 1, 16]}),
    "whole modules": lora(
        target_modules=["fc1"],
        modules_to_save=["enc_to_dec_proj", "layer_norm", "fc2", "embed_tokens.1", "lm_heads.2"],
    ),
    "whole attention": lora(target_modules=["fc1"], modules_to_save=["self_attn"]),
    "biases": lora(target_modules=["fc1"], bias="all"),
}
REFUSED = {
    "dora": lora(target_modules=["fc1"], use_dora=True),
    "dora of a table": lora(target_modules=TABLES, use_dora=True),
    "lora bias": lora(target_modules=["enc_to_dec_proj"], lora_bias=True),
    "norms": LNTuningConfig(target_modules=rf"{LAYERS}\.\d\.(self_attn_layer_norm|final_layer_norm)"),
    "last norm": LNTuningConfig(target_modules=r"decoder\.model\.decoder\.layer_norm"),
    "ia3": IA3Config(target_modules=["k_proj", "fc2"], feedforward_modules=["fc2"], init_ia3_weights=False),
    "loha": LoHaConfig(target_modules=["fc2"], init_weights=False),
    "oft": OFTConfig(target_modules=["fc2"], oft_block_size=4, r=0),
    "vera": VeraConfig(target_modules=["fc2"], r=2),
}


def adapted(config):
    """A policy with an adapter whose every trained parameter has an effect."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(policy_of(), copy.deepcopy(config))
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return wrapped


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_an_adapter_counts_in_full(kind):
    """Fault: a rollout from the base while another policy is trained. Adapters on tables were once ignored."""
    model = adapted(UNDERSTOOD[kind])
    assert error_of_logps(model) < 1e-4
    changed = contents(RolloutWeights.from_model(model))
    # T5 is no part of the snapshot: its adapter reaches the rollout through the condition.
    assert same(changed, contents(RolloutWeights.from_model(policy_of()))) is (kind == "text encoder")
    with model.disable_adapter():
        assert error_of_logps(model) < 1e-4
    if kind not in ("biases", "whole attention"):
        model.merge_adapter()
        assert error_of_logps(model) < 1e-4


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_is_not_understood_is_refused_by_name(kind):
    with pytest.raises(ValueError, match=r"(layers\.0\.|enc_to_dec|embed_|layer_norm).*'transformers'"):
        RolloutWeights.from_model(adapted(REFUSED[kind]))


@pytest.mark.parametrize("kind", ["tables", "tokens", "lora and tokens"])
def test_merged_and_disabled_at_once_is_refused(kind):
    """The weights hold the adapter, the forward pass would take it out first."""
    model = adapted(UNDERSTOOD[kind])
    model.merge_adapter()
    with model.disable_adapter(), pytest.raises(ValueError, match="unmerge_adapter"):
        RolloutWeights.from_model(model)


def test_adapters_in_float32_are_added_before_rounding(monkeypatch):
    """Fault: a small update of a bfloat16 base that the sum rounds away."""
    monkeypatch.setattr(weights_module, "_is_better_packed", lambda *_: False)
    model = policy_of().to(torch.bfloat16)
    wrapped = get_peft_model(model, lora(target_modules=["fc1", "embed_tokens.0"]))
    layer = wrapped.get_base_model().decoder.model.decoder.layers[0].fc1
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(1e-3)
    assert layer.lora_B["default"].weight.dtype == torch.float32
    expected = layer.base_layer.weight.float() + layer.get_delta_weight("default")
    wide = RolloutWeights.from_model(wrapped, torch.float32).tensors["layers.0.fc1"]
    assert torch.equal(wide, expected.T)
    narrow = RolloutWeights.from_model(wrapped)
    assert narrow.dtype == torch.bfloat16
    assert torch.equal(narrow.tensors["layers.0.fc1"], expected.T.to(torch.bfloat16))
    tokens = wrapped.get_base_model().decoder.model.decoder.embed_tokens[0]
    table = tokens.base_layer.weight.float() + tokens.get_delta_weight("default")
    assert torch.equal(narrow.tensors["embedding"][:17], table)


class Patched(nn.Linear):
    """As quantised layers are: a Linear by name, with a forward of its own."""

    def forward(self, x):
        return 2 * super().forward(x)


class Shard(nn.Parameter):
    """As DTensor's: another class of tensor."""


def quantised(decoder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(decoder, {nn.Linear})


def integers(weight):
    return nn.Parameter(weight.to(torch.int8), requires_grad=False)


def offloaded(decoder):
    return accelerate.cpu_offload(decoder, torch.device("cpu")) or decoder


LAYER = f"{LAYERS}.0"


def one():
    return nn.Parameter(torch.ones(16))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (f"{LAYER}.fc1", lambda _: Patched(16, 32, bias=False), "is a .*Patched with a forward of its own"),
        (f"{LAYER}.fc1.forward", lambda _: lambda x: x, "is a .*with a forward of its own"),
        ("decoder", quantised, r"lm_heads\.0 is a .*quantized.*not the plain Linear"),
        (f"{LAYER}.fc2.weight", integers, "has weights of torch.int8"),
        ("decoder.lm_heads.1.bias", lambda _: one(), "has a bias"),
        (f"{LAYER}.encoder_attn.q_proj.bias", lambda _: one(), "has a bias"),
        ("enc_to_dec_proj.bias", lambda _: None, "has no bias"),
        ("decoder", offloaded, r"embed_tokens\.0 is on the meta device"),
        (f"{LAYER}.fc2", lambda layer: layer.to("meta"), "is on the meta device"),
        (f"{LAYER}.fc2.weight", lambda weight: Shard(weight.detach()), "has weights of type Shard"),
        (f"{LAYER}.final_layer_norm.eps", lambda _: 1e-3, "has eps=0.001, the last norm 1e-05"),
        ("decoder.model.decoder.embed_tokens.2.max_norm", lambda _: 1.0, "has max_norm=1.0"),
        (
            f"{LAYER}.fc1",
            lambda _: nn.Linear(16, 8, bias=False),
            r"has weights of shape \(8, 16\), its configuration says \(32, 16\)",
        ),
        (
            "decoder.model.decoder.embed_positions.weights",
            lambda table: table[:64],
            r"has weights of shape \(64, 16\)",
        ),
    ],
)
def test_what_the_copy_would_get_wrong_is_refused_and_a_snapshot_stays(part, change, message):
    """Faults: numbers of int8 taken for weights, a bias that is dropped, a raw error after half of the tensors."""
    weights = RolloutWeights.from_model(policy_of())
    before = contents(weights)
    model = policy_of(seed=1)
    owner, _, name = part.rpartition(".")
    setattr(model.get_submodule(owner), name, change(getattr(model.get_submodule(owner), name)))
    named = (
        ""
        if part == "decoder"
        else re.escape(re.sub(r"\.(weights?|bias|eps|max_norm|forward)$", "", part)) + " "
    )
    message = named + message
    with pytest.raises(ValueError, match=message + ".*rollout_backend='transformers'"):
        RolloutWeights.from_model(model)
    with pytest.raises(ValueError, match=message):
        weights.refresh(model)
    assert same(contents(weights), before)


def test_layers_on_several_devices_are_refused():
    layer = nn.Linear(3, 2)
    problem = weights_module._problem_of_tensor(layer.weight, (2, 3), torch.device("cuda", 1))
    assert problem.startswith("is on cpu, the first weights on cuda:1")


def test_what_training_does_to_a_model_is_not_refused():
    """Gradient checkpointing, input gradients, recorded outputs and accelerate's hooks change no number."""
    plain, model = policy_of(), policy_of()
    model.train()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    codes = torch.zeros(4, 3, dtype=torch.long)
    model.decoder(input_ids=codes, output_hidden_states=True)
    accelerate.dispatch_model(model.decoder, {"": "cpu"}, force_hooks=True)
    layers = model.decoder.model.decoder.layers
    accelerate.hooks.add_hook_to_module(layers[0].fc1, accelerate.hooks.AlignDevicesHook("cpu"))
    assert "forward" in vars(layers[0].fc1)
    # As FSDP does it.
    layers[1].fc1.__class__ = type("FSDPLinear", (nn.Linear,), {})
    assert same(contents(RolloutWeights.from_model(model)), contents(RolloutWeights.from_model(plain)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"num_hidden_layers": 2}, "of a decoder with num_layers=3, the model has num_layers=2"),
        ({"num_attention_heads": 4}, "num_heads=2, the model has num_heads=4"),
        ({"hidden_size": 12}, "hidden_size=16, .*text_size=12, the model has .*text_size=None"),
        ({"audio_channels": 2}, r"num_codebooks=4, delays=\(0, 1, 2, 3\), the model has num_codebooks=8"),
    ],
)
def test_a_snapshot_of_another_shape_is_refused(other, message):
    """Fault: three layers of which two are refreshed."""
    weights = RolloutWeights.from_model(policy_of(num_hidden_layers=3))
    before = contents(weights)
    model = policy_of(**({"num_hidden_layers": 3} | other))
    for check in (weights.require_fits, weights.refresh):
        with pytest.raises(ValueError, match=message + ".*RolloutWeights.from_model"):
            check(model)
    assert same(contents(weights), before)
    weights.require_fits(policy_of(num_hidden_layers=3, seed=1))


def test_a_refused_adapter_leaves_the_snapshot_as_it_was():
    weights = RolloutWeights.from_model(policy_of())
    before = contents(weights)
    model = get_peft_model(
        policy_of(seed=1), lora(target_modules=r".*decoder\.layers\.1\.fc2", use_dora=True)
    )
    with pytest.raises(ValueError, match=r"layers\.1\.fc2 .*DoRA"):
        weights.refresh(model)
    assert same(contents(weights), before)


def test_a_model_on_another_device_is_refused(monkeypatch):
    weights = RolloutWeights.from_model(policy_of())
    monkeypatch.setattr(RolloutWeights, "device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match="the snapshot is on cuda:0, the model on cpu: move"):
        weights.refresh(policy_of())


@pytest.mark.parametrize("smallest", [1, 2**30], ids=["packed", "plain"])
def test_a_snapshot_of_inference_mode_is_refreshed_outside_of_it(smallest, monkeypatch):
    monkeypatch.setattr(weights_module, "_PACKED_FROM", smallest)
    other = policy_of(seed=1)
    with torch.inference_mode():
        weights = RolloutWeights.from_model(policy_of())
    weights.refresh(other)
    expected = contents(RolloutWeights.from_model(other))
    assert same(contents(weights), expected)
    with torch.inference_mode():
        weights.refresh(policy_of())
    weights.refresh(other)
    assert same(contents(weights), expected)
    assert not any(tensor.is_inference() for tensor in weights.tensors.values())


@pytest.mark.parametrize("dtype", [torch.int8, "bfloat16"])
def test_a_dtype_that_is_no_floating_point_is_refused(dtype):
    with pytest.raises(ValueError, match=r"dtype=.*floating-point"):
        RolloutWeights.from_model(policy_of(), dtype)
