"""AudioCraft's stored configuration (`xp.cfg`) as transformers' MusicGen configuration, and back.

`xp.cfg` is the whole Hydra configuration of a training run as YAML text, with `${a.b}` references left in. Of
its hundreds of entries a few decide what the network computes. Each of them is checked against what
transformers' MusicGen can do; what it cannot do is refused by name, never ignored.
"""

import math
from typing import Any

from transformers import EncodecConfig, GenerationConfig, MusicgenConfig, MusicgenDecoderConfig

from diverse_cfg.policies.audiocraft.stored_config import StoredConfig
from diverse_cfg.policies.musicgen.family import MUSICGEN
from diverse_cfg.policies.musicgen.model import codebook_delays

# AudioCraft's `MusicGen.set_generation_params`.
TOP_K = 250
GUIDANCE_SCALE = 3.0
SECONDS = 30.0

_INSTEAD = "use a checkpoint of text-conditioned MusicGen (small, medium, large or their stereo versions)"
_OTHER_MODELS = {
    "audiogen": "AudioGen",
    "magnet": "MAGNeT",
    "audio_magnet": "MAGNeT",
    "jasco": "JASCO",
    "diffusion": "MultiBand Diffusion",
    "compression": "EnCodec (a codec, not a language model)",
}
# Settings of the network: AudioCraft's value when the configuration is silent, and the one that
# transformers' MusicGen is built with.
_NETWORK: dict[str, tuple[Any, Any]] = {
    "norm_first": (False, True),
    "norm": ("layer_norm", "layer_norm"),
    "bias_proj": (True, False),
    "bias_ff": (True, False),
    "bias_attn": (True, False),
    "activation": ("relu", "gelu"),
    "causal": (False, True),
    "positional_embedding": ("sin", "sin"),
    "positional_scale": (1.0, 1.0),
    "max_period": (10000, 10000),
    "xpos": (False, False),
    "layer_scale": (None, None),
    "past_context": (None, None),
    "qk_layer_norm": (False, False),
    "qk_layer_norm_cross": (False, False),
    "kv_repeat": (1, 1),
}
# Of these, what AudioCraft's own configurations do not name.
_TAKEN_FOR_GRANTED = ("positional_scale", "max_period")
# Settings that size the network, or that matter in training and to memory only.
_HARMLESS = {
    *("dim", "num_heads", "num_layers", "hidden_scale", "n_q", "card", "cross_attention", "q_modeling"),
    *("dropout", "attention_dropout", "emb_lr", "lr", "weight_decay", "checkpointing", "device", "dtype"),
    *("weight_init", "depthwise_init", "zero_bias_init", "custom", "memory_efficient"),
    *("attention_as_float32", "two_step_cfg"),
}
_CODEC: dict[str, tuple[Any, Any]] = {
    "encodec.autoencoder": (None, "seanet"),
    "encodec.quantizer": (None, "rvq"),
    "encodec.channels": (None, 1),
    "encodec.renormalize": (False, False),
    "seanet.norm": ("none", "weight_norm"),
    "seanet.activation": ("ELU", "ELU"),
    "seanet.disable_norm_outer_blocks": (0, 0),
    "seanet.decoder.final_activation": (None, None),
}
# Sizes of a codec: AudioCraft's name → (transformers', AudioCraft's value when the configuration is silent).
_SEANET: dict[str, tuple[str, Any]] = {
    "dimension": ("hidden_size", 128),
    "n_filters": ("num_filters", 32),
    "n_residual_layers": ("num_residual_layers", 3),
    "kernel_size": ("kernel_size", 7),
    "residual_kernel_size": ("residual_kernel_size", 3),
    "last_kernel_size": ("last_kernel_size", 7),
    "dilation_base": ("dilation_growth_rate", 2),
    "pad_mode": ("pad_mode", "reflect"),
    "compress": ("compress", 2),
    "lstm": ("num_lstm_layers", 0),
}
# Ours, outside of the sections from which AudioCraft builds anything.
_POSITIONS = "diverse_cfg.max_position_embeddings"


def check_language_model(cfg: StoredConfig) -> None:
    """Whether transformers' MusicGen computes what this configuration says.

    Raises:
        ValueError: another model, another conditioning, or a setting of the network without counterpart.
    """
    solver = cfg.get("solver")
    if cfg.get("lm_model") == "transformer_lm_magnet":
        solver = "magnet"
    if solver in _OTHER_MODELS:
        raise ValueError(f"{cfg.name} holds {_OTHER_MODELS[solver]}, not MusicGen: {_INSTEAD}")
    if cfg.get("lm_model", "transformer_lm") != "transformer_lm":
        raise ValueError(f"{cfg.name} holds a language model {cfg.get('lm_model')!r}: {_INSTEAD}")
    _check_conditions(cfg)
    _check_pattern(cfg)
    network = cfg.require("transformer_lm")
    for name, (silent, needed) in _NETWORK.items():
        if (found := network.get(name, silent)) != needed:
            raise ValueError(
                f"{cfg.name} has transformer_lm.{name}={found!r}, and transformers' MusicGen is built with "
                f"{needed!r}: this checkpoint cannot be converted"
            )
    for name, value in network.items():
        if name not in _NETWORK and name not in _HARMLESS and value not in (None, False, 0, "none"):
            raise ValueError(
                f"{cfg.name} has transformer_lm.{name}={value!r}, which AudioCraft 1.3.0 does not know and "
                "transformers' MusicGen does not have: this checkpoint cannot be converted"
            )
    if cfg.get("interleave_stereo_codebooks.use") and cfg.get("interleave_stereo_codebooks.per_timestep"):
        raise ValueError(
            f"{cfg.name} interleaves left and right over time (interleave_stereo_codebooks.per_timestep); "
            "transformers' MusicGen has them as codebooks of one step only: this checkpoint cannot be converted"
        )


def _check_conditions(cfg: StoredConfig) -> None:
    conditioners = {key: value for key, value in (cfg.get("conditioners") or {}).items() if key != "args"}
    models = {key: (value or {}).get("model") for key, value in conditioners.items()}
    for model, kind in {
        "chroma_stem": "a MusicGen-Melody",
        "style": "a MusicGen-Style",
        "clap": "a MusicGen conditioned on CLAP",
    }.items():
        if model in models.values():
            raise ValueError(f"{cfg.name} is {kind} checkpoint, which is conditioned on audio: {_INSTEAD}")
    if models != {"description": "t5"}:
        raise ValueError(
            f"{cfg.name} is conditioned on {models or 'nothing'}, where MusicGen has one text description "
            f"read by T5: {_INSTEAD}"
        )
    if cfg.get("conditioners.description.t5.normalize_text"):
        raise ValueError(
            f"{cfg.name} normalises its prompts with spaCy (normalize_text), which transformers' tokenizer does "
            "not: this checkpoint cannot be converted"
        )
    fuser = cfg.require("fuser")
    ways = {way: list(fuser.get(way) or []) for way in ("cross", "sum", "prepend", "input_interpolate")}
    if ways.pop("cross") != ["description"] or any(ways.values()) or fuser.get("cross_attention_pos_emb"):
        raise ValueError(
            f"{cfg.name} does not read its text by plain cross-attention (fuser={fuser}): {_INSTEAD}"
        )


def _check_pattern(cfg: StoredConfig) -> None:
    num_codebooks = cfg.require("transformer_lm.n_q")
    modeling = cfg.get("codebooks_pattern.modeling") or cfg.get("transformer_lm.q_modeling")
    pattern = cfg.get(f"codebooks_pattern.{modeling}") or {}
    # When there is no pattern, the old `q_modeling` delays every codebook by one more step.
    found = list(pattern.get("delays") or range(num_codebooks))
    wanted = codebook_delays(num_codebooks, 2 if cfg.get("interleave_stereo_codebooks.use") else 1)
    if (
        modeling != "delay"
        or found != list(wanted)
        or pattern.get("flatten_first")
        or pattern.get("empty_initial")
    ):
        raise ValueError(
            f"{cfg.name} arranges its codebooks as {modeling!r} {pattern}, where transformers' MusicGen delays "
            f"them by {list(wanted)} steps: this checkpoint cannot be converted"
        )


def decoder_config(cfg: StoredConfig, frame_rate: float) -> MusicgenDecoderConfig:
    """Configuration of the decoder; call `check_language_model` first."""
    network = cfg.require("transformer_lm")
    card = int(network["card"])
    seconds = float(cfg.get("dataset.segment_duration") or SECONDS)
    # Positions are computed, not learned, so that AudioCraft has no limit; conversions of the released
    # checkpoints say 2048.
    positions = max(2048, 2 ** math.ceil(math.log2(seconds * frame_rate + int(network["n_q"]))))
    config = MusicgenDecoderConfig(
        vocab_size=card,
        max_position_embeddings=int(cfg.get(_POSITIONS) or positions),
        num_hidden_layers=int(network["num_layers"]),
        ffn_dim=int(network.get("hidden_scale", 4) * network["dim"]),
        num_attention_heads=int(network["num_heads"]),
        hidden_size=int(network["dim"]),
        activation_function="gelu",
        dropout=float(network.get("dropout") or 0.0),
        num_codebooks=int(network["n_q"]),
        audio_channels=2 if cfg.get("interleave_stereo_codebooks.use") else 1,
        pad_token_id=card,
        bos_token_id=card,
        eos_token_id=None,
    )
    config.decoder_start_token_id = card
    return config


def codec_config(cfg: StoredConfig) -> EncodecConfig:
    """Configuration of an EnCodec that AudioCraft trained.

    Raises:
        ValueError: not an EnCodec, or one with a setting that transformers' lacks.
    """
    if cfg.get("compression_model") != "encodec":
        raise ValueError(
            f"{cfg.name} holds a compression model {cfg.get('compression_model')!r}, only EnCodec is supported: "
            "export the codec that MusicGen was trained with (audiocraft.utils.export.export_encodec)"
        )
    for path, (silent, needed) in _CODEC.items():
        if (found := cfg.get(path, silent)) != needed:
            raise ValueError(
                f"{cfg.name} has {path}={found!r}, and an EnCodec of MusicGen in transformers has {needed!r}: "
                "this codec cannot be converted"
            )
    seanet = cfg.require("seanet")
    if not seanet.get("lstm"):
        raise ValueError(f"{cfg.name} has no LSTM (seanet.lstm=0), which transformers' EnCodec always has")
    trim = float((seanet.get("decoder") or {}).get("trim_right_ratio", 1.0))
    special = set(seanet.get("encoder") or {}) | set(seanet.get("decoder") or {})
    if special - {"trim_right_ratio", "final_activation", "final_activation_params"}:
        raise ValueError(
            f"{cfg.name} sizes encoder and decoder differently ({sorted(special)}): it cannot be converted"
        )
    ratios = [int(ratio) for ratio in seanet["ratios"]]
    rate, bins = int(cfg.require("encodec.sample_rate")), int(cfg.require("rvq.bins"))
    return EncodecConfig(
        target_bandwidths=[bandwidth(int(cfg.require("rvq.n_q")), rate, math.prod(ratios), bins)],
        sampling_rate=rate,
        audio_channels=1,
        normalize=False,
        upsampling_ratios=ratios,
        norm_type="weight_norm",
        use_causal_conv=bool(cfg.get("encodec.causal", False)),
        trim_right_ratio=trim,
        codebook_size=bins,
        use_conv_shortcut=not seanet.get("true_skip", True),
        **{ours: type(usual)(seanet.get(name, usual)) for name, (ours, usual) in _SEANET.items()},
    )


def bandwidth(num_codebooks: int, sampling_rate: int, hop_length: int, bins: int) -> float:
    """Bandwidth in kbit/s from which transformers' EnCodec derives this number of codebooks.

    It does so by a division that rounds down, so that the nearest float may name one codebook too few.
    """
    bits_per_second = math.ceil(sampling_rate / hop_length) * math.ceil(math.log2(bins))
    value = num_codebooks * bits_per_second / 1000
    return value if int(1000 * value // bits_per_second) == num_codebooks else math.nextafter(value, math.inf)


def generation_config(
    config: MusicgenConfig, frames: int, guidance_scale: float | None, top_k: int = TOP_K, **settings: Any
) -> GenerationConfig:
    """How AudioCraft's MusicGen is sampled: top-k 250 and its own guidance, where nothing else is set."""
    return GenerationConfig(
        **{"do_sample": True} | settings,
        guidance_scale=float(guidance_scale or GUIDANCE_SCALE),
        top_k=top_k,
        max_new_tokens=MUSICGEN.num_frames_to_tokens(frames, config),
        **MUSICGEN.special_tokens(config),
    )


# ---- back ------------------------------------------------------------------------------------------------


def audiocraft_configs(
    config: MusicgenConfig, generation: GenerationConfig, text_encoder: str, *, finetuned_text_encoder: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configurations from which AudioCraft builds this model: of the language model, and of the codec.

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
            **{name: needed for name, (_, needed) in _NETWORK.items() if name not in _TAKEN_FOR_GRANTED},
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
    return language_model, _codec_settings(codec)


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
            **{name: getattr(codec, ours) for name, (ours, _) in _SEANET.items()},
            "channels": 1,
            "causal": codec.use_causal_conv,
            "ratios": list(codec.upsampling_ratios),
            "activation": "ELU",
            "activation_params": {"alpha": 1.0},
            "norm": "weight_norm",
            "norm_params": {},
            "true_skip": not codec.use_conv_shortcut,
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
