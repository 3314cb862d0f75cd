"""MusicGen on given codes: text in, logits over the codes of every frame out.

MusicGen (arXiv 2306.05284) is a T5 text encoder, a decoder over K interleaved streams of codes, and an
EnCodec codec. The decoder embeds the K codes of a step into one sum and has K heads, which are independent
given the hidden state: so one forward pass gives the exact log-probability of every code of a clip. This file
evaluates that pass on given codes (teacher forcing); `sampler` samples the codes. The delay between the
streams is `functional.codebooks`' business.
"""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.functional.codebooks import apply_delay_pattern
from diverse_cfg.policies.layers import effective_weight, evaluating
from diverse_cfg.policies.policy import require_prompts
from diverse_cfg.policies.shift import SHIFT
from diverse_cfg.types import TextCondition

LORA_TARGET_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
"""The decoder's own projections, for `LoraConfig(target_modules=…)`. No module of T5 or EnCodec ends in one
of these names; "all-linear" would also adapt the frozen text encoder and the heads."""

_TEXT_BATCH = 256
_LONGEST_USUAL = 10.0  # seconds


def unwrap(model: nn.Module) -> Any:
    """The MusicGen inside a `PeftModel` (its LoRA layers stay active) or a DDP-like wrapper.

    Returns:
        A `MusicgenForConditionalGeneration`; typed as anything, since transformers declares its three parts
        optional.

    Raises:
        ValueError: it is another model.
    """
    inner = model.module if hasattr(model, "module") else model
    if isinstance(inner, PeftModel):
        inner = inner.get_base_model()
    if not isinstance(inner, MusicgenForConditionalGeneration):
        raise ValueError(
            f"expected a MusicgenForConditionalGeneration, got a {type(inner).__name__}: MusicGen-Melody "
            "and other models are not supported"
        )
    return inner


def codebook_delays(num_codebooks: int, audio_channels: int = 1) -> tuple[int, ...]:
    """MusicGen's delay pattern: d_k = k (mono) or k // 2 (stereo), in decoder steps.

    Args:
        num_codebooks: K, over both channels for stereo.
        audio_channels: 1 or 2.

    Returns:
        K delays, for `functional.codebooks`.

    Raises:
        ValueError: other channel counts, or an odd K for stereo.
    """
    if audio_channels not in (1, 2):
        raise ValueError(f"audio_channels must be 1 or 2, got {audio_channels}")
    if num_codebooks < 1 or num_codebooks % audio_channels:
        raise ValueError(
            f"num_codebooks={num_codebooks} does not fit audio_channels={audio_channels}: "
            "stereo has one codebook per channel in every pair"
        )
    return tuple(codebook // audio_channels for codebook in range(num_codebooks))


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


def own_frames(model: nn.Module) -> int:
    """Length of the clips that the model's own generation settings ask for, in frames; not above 0 if they do not."""
    own = unwrap(model).generation_config
    # Read from a generation config, both count the steps after the start column.
    return (own.max_new_tokens or own.max_length or 0) - max(delays(model))


def usual_seconds(model: nn.Module) -> float:
    """Length of a clip where nobody names one: what the model's own generation settings ask for, at most 10 s."""
    seconds = own_frames(model) / frame_rate(model)
    return min(seconds, _LONGEST_USUAL) if seconds > 0 else _LONGEST_USUAL


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


@torch.no_grad()
def encode_audio(model: nn.Module, waveforms: Tensor) -> Tensor:
    """Turn audio into codes with the policy's codec.

    Args:
        model: the policy.
        waveforms: at the codec's rate, mono [N, L], stereo [N, 2, L].

    Returns:
        Codes [N, K, T], T = ⌈L / hop⌉; stereo has left and right codebooks in turn.

    Raises:
        ValueError: another number of channels, or a codec that cuts audio into chunks or has too few codebooks.
    """
    policy = unwrap(model)
    config, codec = policy.decoder.config, policy.audio_encoder
    audio = waveforms[:, None] if waveforms.ndim == 2 else waveforms
    if audio.ndim != 3 or audio.shape[1] != config.audio_channels:
        raise ValueError(
            f"waveforms of shape {tuple(waveforms.shape)} are not [N, {config.audio_channels} channel(s), L]"
        )
    audio = audio.to(codec.device, codec.dtype)
    bandwidth = max(codec.config.target_bandwidths)  # of which the released codecs have one
    with evaluating(codec), torch.autocast(codec.device.type, enabled=False):
        chunks = [codec.encode(channel, bandwidth=bandwidth).audio_codes for channel in audio.split(1, dim=1)]
    codes = torch.stack(chunks, dim=3).flatten(2, 3)[0]  # [1, N, K / C, C, T], pairs of one delay adjacent
    if len(chunks[0]) != 1 or codes.shape[1] != config.num_codebooks:
        raise ValueError(
            f"the codec gives {len(chunks[0])} chunk(s) with {codes.shape[1]} codebooks, the decoder reads one "
            f"with {config.num_codebooks}"
        )
    return codes


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
    """Text-encoder output in the decoder's width, padding zeroed, as the full model does it [B, Lt, D].

    Where the condition tells γ, the shift that the model has learnt for it is added.
    """
    policy = unwrap(model)
    hidden = condition.hidden_states
    projection = getattr(policy, "enc_to_dec_proj", None)
    if projection is not None:
        hidden = projection(hidden)
    if condition.guidance is not None:
        hidden = hidden + getattr(policy, SHIFT)(condition.guidance)[:, None]
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
