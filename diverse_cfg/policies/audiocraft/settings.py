"""The configurations (`xp.cfg`) from which AudioCraft builds a MusicGen that transformers holds."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import EncodecConfig, GenerationConfig, MusicgenConfig

from diverse_cfg.policies.audiocraft.configuration import NETWORK, SECONDS
from diverse_cfg.policies.musicgen.family import MUSICGEN
from diverse_cfg.policies.musicgen.model import codebook_delays


@dataclass(frozen=True)
class AudioCraftConfigs:
    """What is written as `xp.cfg`: of the language model, and of the codec."""

    language_model: dict[str, Any]
    codec: dict[str, Any]


def audiocraft_configs(
    config: MusicgenConfig, generation: GenerationConfig, text_encoder: str, *, finetuned_text_encoder: bool
) -> AudioCraftConfigs:
    """The configurations from which AudioCraft builds this model.

    Args:
        config: of the transformers model.
        generation: its generation settings: guidance and length.
        text_encoder: name of the T5 that AudioCraft shall load.
        finetuned_text_encoder: the checkpoint brings the T5's weights.

    Raises:
        ValueError: the model has something that AudioCraft's MusicGen lacks.
    """
    decoder, codec = config.decoder, config.audio_encoder
    require_convertible(config)
    stereo = decoder.audio_channels == 2
    delays = list(codebook_delays(decoder.num_codebooks, decoder.audio_channels))
    frame_rate = codec.sampling_rate / codec.hop_length
    frames = num_frames(config, generation) or 0
    language_model = {
        "solver": "musicgen",
        "device": "cpu",
        "dtype": "float32",
        "sample_rate": codec.sampling_rate,
        "channels": decoder.audio_channels,
        "compression_model_checkpoint": "compression_state_dict.bin",
        "compression_model_n_q": decoder.num_codebooks // decoder.audio_channels,
        "interleave_stereo_codebooks": {"use": stereo, "per_timestep": False},
        # A MusicGen of at most 18 s cannot be constructed (its default stride for longer clips is 18 s), and
        # nothing in the network depends on it: how long this model plays is asked of `duration`.
        "dataset": {"segment_duration": max(SECONDS, float(math.ceil(frames / frame_rate)))},
        "lm_model": "transformer_lm",
        "transformer_lm": {
            "dim": decoder.hidden_size,
            "num_heads": decoder.num_attention_heads,
            "num_layers": decoder.num_hidden_layers,
            "hidden_scale": decoder.ffn_dim / decoder.hidden_size,
            "n_q": decoder.num_codebooks,
            "card": decoder.vocab_size,
            "dropout": 0.0,
            **{
                name: needed
                for name, (_, needed) in NETWORK.items()
                if name not in ("positional_scale", "max_period")
            },
            "custom": False,
            "memory_efficient": True,
            "cross_attention": True,
        },
        "codebooks_pattern": {
            "modeling": "delay",
            "delay": {"delays": delays, "flatten_first": 0, "empty_initial": 0},
        },
        "classifier_free_guidance": {
            "training_dropout": 0.3,
            "inference_coef": float(generation.guidance_scale or 1.0),
        },
        "attribute_dropout": {},
        "fuser": {
            "cross_attention_pos_emb": False,
            "cross_attention_pos_emb_scale": 1,
            "sum": [],
            "prepend": [],
            "cross": ["description"],
            "input_interpolate": [],
        },
        "conditioners": {
            "description": {
                "model": "t5",
                "t5": {
                    "name": text_encoder,
                    "finetune": finetuned_text_encoder,
                    "word_dropout": 0.3,
                    "normalize_text": False,
                },
            }
        },
        "generate": {"lm": {"use_sampling": True, "top_k": top_k(generation)}},
        "diverse_cfg": {"max_position_embeddings": decoder.max_position_embeddings},
    }
    return AudioCraftConfigs(language_model, _codec_settings(codec))


def top_k(generation: GenerationConfig) -> int:
    """The top-k that these settings play with: transformers takes 50 where they are silent."""
    return 50 if generation.top_k is None else generation.top_k


def num_frames(config: MusicgenConfig, generation: GenerationConfig) -> int | None:
    """Length of the clips that these generation settings make, in frames; None if they do not say."""
    tokens = generation.max_new_tokens or generation.max_length
    return tokens - MUSICGEN.num_frames_to_tokens(0, config) if tokens else None


def _codec_settings(codec: EncodecConfig) -> dict[str, Any]:
    return {
        "solver": "compression",
        "device": "cpu",
        "sample_rate": codec.sampling_rate,
        "channels": 1,
        "compression_model": "encodec",
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq",
            "sample_rate": codec.sampling_rate,
            "channels": 1,
            "causal": codec.use_causal_conv,
            "renormalize": False,
        },
        "seanet": {
            "dimension": codec.hidden_size,
            "channels": 1,
            "causal": codec.use_causal_conv,
            "n_filters": codec.num_filters,
            "n_residual_layers": codec.num_residual_layers,
            "ratios": list(codec.upsampling_ratios),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": "weight_norm",
            "norm_params": {},
            "kernel_size": codec.kernel_size,
            "residual_kernel_size": codec.residual_kernel_size,
            "last_kernel_size": codec.last_kernel_size,
            "dilation_base": codec.dilation_growth_rate,
            "pad_mode": codec.pad_mode,
            "true_skip": not codec.use_conv_shortcut,
            "compress": codec.compress,
            "lstm": codec.num_lstm_layers,
            "disable_norm_outer_blocks": 0,
            "encoder": {},
            "decoder": {
                "trim_right_ratio": codec.trim_right_ratio,
                "final_activation": None,
                "final_activation_params": None,
            },
        },
        "rvq": {
            "n_q": codec.num_quantizers,
            "q_dropout": False,
            "bins": codec.codebook_size,
            "kmeans_init": False,
        },
    }


def require_convertible(config: MusicgenConfig) -> None:
    """Raise for what a transformers MusicGen may have and AudioCraft's cannot.

    Raises:
        ValueError: naming the setting.
    """
    decoder, codec = config.decoder, config.audio_encoder
    faults = []
    if codec.model_type != "encodec":
        faults.append(f"its codec is a {codec.model_type!r}, not an EnCodec")
    else:
        if codec.audio_channels != 1 or codec.normalize or codec.norm_type != "weight_norm":
            faults.append(
                f"its codec has audio_channels={codec.audio_channels}, normalize={codec.normalize}, norm_type="
                f"{codec.norm_type!r} (mono, false and 'weight_norm' are needed)"
            )
        if codec.codebook_size != decoder.vocab_size:
            faults.append(f"its codec has {codec.codebook_size} codes, its decoder {decoder.vocab_size}")
        if codec.codebook_dim != codec.hidden_size:
            faults.append(f"codebook_dim={codec.codebook_dim} differs from hidden_size={codec.hidden_size}")
    if decoder.activation_function != "gelu" or decoder.scale_embedding:
        faults.append(
            f"activation_function={decoder.activation_function!r}, scale_embedding={decoder.scale_embedding}"
        )
    if config.text_encoder.model_type != "t5":
        faults.append(f"its text encoder is a {config.text_encoder.model_type!r}, not a T5")
    if faults:
        raise ValueError(f"AudioCraft's MusicGen cannot hold this model: {'; '.join(faults)}")
