"""MusicGen as a policy over codes: text in, logits over the codes of every frame out.

MusicGen (arXiv 2306.05284) is a T5 text encoder, a decoder over K interleaved streams of codes, and an
EnCodec codec. The decoder embeds the K codes of a step into one sum and has K heads, which are independent
given the hidden state: so one forward pass gives the exact log-probability of every code of a clip. This file
evaluates that pass on given codes (teacher forcing); `rollout` samples the codes. The delay between the
streams is `functional.codebooks`' business.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

from diverse_cfg.functional.codebooks import apply_delay_pattern
from diverse_cfg.policies.musicgen.layout import codebook_delays
from diverse_cfg.policies.musicgen.loading import (
    is_distilled,
    load_policy,
    load_processor,
    unwrap,
    zero_dropout,
)
from diverse_cfg.types import TextCondition

__all__ = [
    "LORA_TARGET_MODULES",
    "base_layer",
    "code_hidden_states",
    "code_logits",
    "delays",
    "effective_weight",
    "encode_text",
    "evaluating",
    "frame_rate",
    "freeze_encoders",
    "head_weights",
    "is_distilled",
    "load_policy",
    "load_processor",
    "pad_token_id",
    "project_text",
    "require_prompts",
    "unwrap",
    "usual_seconds",
    "zero_dropout",
]

LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""The decoder's own projections, for `LoraConfig(target_modules=…)`. No module of T5 or EnCodec ends in one
of these names; "all-linear" would also adapt the frozen text encoder and the heads."""

_TEXT_BATCH = 256
_LONGEST_USUAL = 10.0  # seconds

_T5_TOKENS = 512
"""What T5 was trained on: the limit of a tokenizer that has none of its own, which says so by a huge number."""

_PEFT_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)

_ADAPTED_FORWARDS = (
    lora.Linear.forward,
    lora.Embedding.forward,
    lora.ParamWrapper.forward,
    TrainableTokensLayer.forward,
)
"""Of the layers with adapters that `effective_weight` knows."""


def pad_token_id(model: nn.Module) -> int:
    """MusicGen's only special token: start and padding of the delay pattern, last row of the tables.

    Taken from the size of the table, since trainers for text models write T5's ids over the one in the
    configuration.
    """
    return unwrap(model).decoder.config.vocab_size


def delays(model: nn.Module) -> tuple[int, ...]:
    """Delay of each codebook of this model in decoder steps [K]."""
    config = unwrap(model).decoder.config
    return codebook_delays(config.num_codebooks, config.audio_channels)


def frame_rate(model: nn.Module) -> float:
    """Frames per second of audio (Hz)."""
    codec = unwrap(model).audio_encoder.config
    return codec.sampling_rate / codec.hop_length


def usual_seconds(model: nn.Module) -> float:
    """Length of a clip where nobody names one: what the model's own generation settings ask for, at most 10 s."""
    own = unwrap(model).generation_config
    # Read from a generation config, both count the steps after the start column.
    steps = own.max_new_tokens or own.max_length or 0
    seconds = (steps - max(delays(model))) / frame_rate(model)
    return min(seconds, _LONGEST_USUAL) if seconds > 0 else _LONGEST_USUAL


def freeze_encoders(model: nn.Module) -> None:
    """Freeze text encoder and codec, in place: the policy is the decoder (and the projection into it)."""
    policy = unwrap(model)
    for module in (policy.text_encoder, policy.audio_encoder):
        module.requires_grad_(False)


@torch.no_grad()
def encode_text(model: nn.Module, tokenizer: Any, prompts: Sequence[str]) -> TextCondition:
    """Run the text encoder, once per distinct prompt.

    Args:
        model: the policy; its text encoder runs in eval mode, whatever mode it is in.
        tokenizer: its tokenizer, or the processor that holds it.
        prompts: P texts; the rows of the result are in their order, repeats included.

    Returns:
        Condition with P rows, on the model's device.

    Raises:
        ValueError: no prompts, or one that is blank, no text, or longer than the text encoder was trained on.
    """
    require_prompts(prompts, tokenizer)
    policy = unwrap(model)
    distinct = list(dict.fromkeys(prompts))
    tokens = getattr(tokenizer, "tokenizer", tokenizer)(distinct, padding=True, return_tensors="pt").to(
        policy.device
    )
    with evaluating(policy.text_encoder):
        hidden = [
            policy.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            for ids, mask in zip(
                tokens.input_ids.split(_TEXT_BATCH), tokens.attention_mask.split(_TEXT_BATCH), strict=True
            )
        ]
    index = {prompt: row for row, prompt in enumerate(distinct)}
    return TextCondition(torch.cat(hidden), tokens.attention_mask).select(
        [index[prompt] for prompt in prompts]
    )


def require_prompts(prompts: Sequence[str], tokenizer: Any, where: str = "") -> None:
    """Raise unless there are prompts, each has text, and none is longer than the text encoder was trained on.

    T5 would take a longer one, in memory that grows with the square of its length: 2.7 GB for 40,000 letters.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a non-empty list of texts, got {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"prompt {index} is {prompt!r}: every prompt needs text (for clips without a prompt, pass "
                "condition.null() to sample_codes)"
            )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    limit = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else _T5_TOKENS
    distinct = list(dict.fromkeys(prompts))
    for prompt, ids in zip(distinct, tokenizer(distinct, truncation=False)["input_ids"], strict=True):
        if len(ids) > limit:
            raise ValueError(
                f"{where}prompt {prompts.index(prompt)} has {len(ids)} tokens, the text encoder takes {limit}: "
                f"shorten it ({prompt[:60]!r}…)"
            )


def code_hidden_states(model: nn.Module, codes: Tensor, condition: TextCondition | None) -> Tensor:
    """Hidden states from which the heads predict given codes (teacher forcing); gradients flow.

    Args:
        model: the policy, also inside a `PeftModel` (whose adapters apply unless they are disabled).
        codes: [N, K, T].
        condition: N rows, or None for the null prompt without the work of cross-attention.

    Returns:
        Last hidden states [N, S, D]; the one at step t + d_k predicts `codes[:, k, t]` (d: `delays`).

    Raises:
        ValueError: shapes that do not fit the model or each other, or more steps than it has positions.
    """
    policy = unwrap(model)
    config = policy.decoder.config
    if codes.ndim != 3 or codes.shape[1] != config.num_codebooks:
        raise ValueError(f"codes must have shape [N, {config.num_codebooks}, T], got {tuple(codes.shape)}")
    inputs = apply_delay_pattern(codes, pad_token_id(policy), delays(policy))[..., :-1]
    if inputs.shape[-1] > config.max_position_embeddings:
        raise ValueError(
            f"{codes.shape[-1]} frames need {inputs.shape[-1]} positions, the model has "
            f"{config.max_position_embeddings}: use shorter clips"
        )
    text, mask = None, None
    if condition is not None:
        if len(condition) != codes.shape[0]:
            raise ValueError(f"{len(condition)} conditions for {codes.shape[0]} clips")
        text, mask = project_text(policy, condition), condition.attention_mask
    return policy.decoder.model(
        input_ids=inputs.flatten(0, 1),
        encoder_hidden_states=text,
        encoder_attention_mask=mask,
        use_cache=False,
    ).last_hidden_state


def project_text(model: nn.Module, condition: TextCondition) -> Tensor:
    """Text-encoder output in the decoder's width, padding zeroed, as the full model does it [B, Lt, D]."""
    policy = unwrap(model)
    hidden = condition.hidden_states
    projection = getattr(policy, "enc_to_dec_proj", None)
    if projection is not None:
        hidden = projection(hidden)
    return hidden * condition.attention_mask[..., None].to(hidden.dtype)


def head_weights(model: nn.Module) -> Tensor:
    """Weights of the K heads [K, V, D], for a loss that applies them chunk by chunk; gradients flow."""
    return torch.stack([effective_weight(head) for head in unwrap(model).decoder.lm_heads])


def code_logits(model: nn.Module, codes: Tensor, condition: TextCondition | None) -> Tensor:
    """Teacher-forced logits of every code of a clip, the delay pattern already undone.

    Args:
        model: the policy.
        codes: [N, K, T].
        condition: N rows, or None for the null prompt.

    Returns:
        Logits [N, K, T, V] in the model's dtype; `[n, k, t]` depends on the codes before step t + d_k only.

    Raises:
        ValueError: see `code_hidden_states`.
    """
    hidden = code_hidden_states(model, codes, condition)
    num_frames = codes.shape[-1]
    heads = unwrap(model).decoder.lm_heads
    # Applying each head to its own frames never computes the junk cells of the decoder's grid.
    return torch.stack(
        [
            head(hidden[:, delay : delay + num_frames])
            for head, delay in zip(heads, delays(model), strict=True)
        ],
        dim=1,
    )


def effective_weight(module: Any, wide: bool = False) -> Tensor:
    """Weight of a linear layer or an embedding table plus its active LoRA adapters; gradients flow.

    Args:
        module: the layer, which is only read; it may be inside PEFT's `modules_to_save`, whose active copy
            counts, or have trainable tokens.
        wide: leave the sum in the wider dtype of weight and adapters, so that float32 adapters of a bfloat16
            base lose nothing. By default it is rounded to the base's dtype.

    Returns:
        Weight [out, in], of a table [entries, width].

    Raises:
        ValueError: see `base_layer`.
    """
    layer: Any = _layer_in_use(module)
    if not isinstance(layer, _PEFT_LAYERS):
        return layer.weight
    weight = base_layer(layer).weight
    if layer.disable_adapters or layer.merged:
        return weight
    if isinstance(layer, TrainableTokensLayer):
        return layer.get_merged_weights(layer.active_adapters)
    lora_layer: Any = layer
    total = weight
    for name in lora_layer.active_adapters:
        if name in lora_layer.lora_A or name in lora_layer.lora_embedding_A:
            total = total + lora_layer.get_delta_weight(name)
    return total if wide else total.to(weight.dtype)


def base_layer(module: Any) -> Any:
    """The layer below a module's adapters, which `effective_weight` can add to its weight.

    Args:
        module: any layer, with adapters or without.

    Raises:
        ValueError: a kind of adapter whose effect is not `weight + delta`.
    """
    layer = _layer_in_use(module)
    if not isinstance(layer, _PEFT_LAYERS):
        return layer
    inner: Any = getattr(layer, "base_layer", None)
    # A layer that inherits its `forward` computes the same; a subclass for quantised weights has its own.
    if type(layer).forward not in _ADAPTED_FORWARDS or isinstance(inner, _PEFT_LAYERS):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise ValueError(f"adapters of type {kind} are not supported: use LoRA")
    adapted: Any = layer
    if adapted.disable_adapters and adapted.merged:
        raise ValueError(
            "adapters are merged into the weights and disabled at once: call unmerge_adapter() first"
        )
    if isinstance(layer, LoraLayer):
        for name in layer.active_adapters:
            if name in layer.lora_variant or layer.lora_bias.get(name, False):
                raise ValueError(
                    f"adapter {name!r} is a variant of LoRA (DoRA, a bias, …) that cannot be merged: use LoRA"
                )
    return inner


def _layer_in_use(module: Any) -> Any:
    """The copy of a layer that its forward pass runs, where PEFT keeps several."""
    if isinstance(module, ModulesToSaveWrapper):
        names = [] if module.disable_adapters else module.active_adapters
        return module.modules_to_save[names[0]] if names else module.original_module
    return module.token_adapter if isinstance(module, TrainableTokensWrapper) else module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule gets its own mode back."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
