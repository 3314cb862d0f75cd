"""AudioCraft's stored configuration (`xp.cfg`) as transformers' MusicGen configuration.

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
NETWORK: dict[str, tuple[Any, Any]] = {
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
    for name, (silent, needed) in NETWORK.items():
        if (found := network.get(name, silent)) != needed:
            raise ValueError(
                f"{cfg.name} has transformer_lm.{name}={found!r}, and transformers' MusicGen is built with "
                f"{needed!r}: this checkpoint cannot be converted"
            )
    for name, value in network.items():
        if name not in NETWORK and name not in _HARMLESS and value not in (None, False, 0, "none"):
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
    for kind, names in {
        "a MusicGen-Melody": ("chroma_stem",),
        "a MusicGen-Style": ("style",),
        "a MusicGen conditioned on CLAP": ("clap",),
    }.items():
        if set(names) & set(models.values()):
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
        hidden_size=int(seanet.get("dimension", 128)),
        num_filters=int(seanet.get("n_filters", 32)),
        num_residual_layers=int(seanet.get("n_residual_layers", 3)),
        upsampling_ratios=ratios,
        norm_type="weight_norm",
        kernel_size=int(seanet.get("kernel_size", 7)),
        last_kernel_size=int(seanet.get("last_kernel_size", 7)),
        residual_kernel_size=int(seanet.get("residual_kernel_size", 3)),
        dilation_growth_rate=int(seanet.get("dilation_base", 2)),
        use_causal_conv=bool(cfg.get("encodec.causal", False)),
        pad_mode=str(seanet.get("pad_mode", "reflect")),
        compress=int(seanet.get("compress", 2)),
        num_lstm_layers=int(seanet["lstm"]),
        trim_right_ratio=trim,
        codebook_size=bins,
        use_conv_shortcut=not seanet.get("true_skip", True),
    )


def bandwidth(num_codebooks: int, sampling_rate: int, hop_length: int, bins: int) -> float:
    """Bandwidth in kbit/s from which transformers' EnCodec derives this number of codebooks.

    It does so by a division that rounds down, so that the nearest float may name one codebook too few.
    """
    bits_per_second = math.ceil(sampling_rate / hop_length) * math.ceil(math.log2(bins))
    value = num_codebooks * bits_per_second / 1000
    return value if int(1000 * value // bits_per_second) == num_codebooks else math.nextafter(value, math.inf)


def default_generation(config: MusicgenConfig, cfg: StoredConfig) -> GenerationConfig:
    """How AudioCraft's MusicGen plays unless told otherwise: top-k 250, its guidance, the trained length."""
    codec = config.audio_encoder
    seconds = float(cfg.get("dataset.segment_duration") or SECONDS)
    frames = int(seconds * codec.sampling_rate / codec.hop_length)
    special = config.decoder.vocab_size
    return GenerationConfig(
        do_sample=True,
        guidance_scale=float(cfg.get("classifier_free_guidance.inference_coef") or GUIDANCE_SCALE),
        top_k=TOP_K,
        max_new_tokens=MUSICGEN.num_frames_to_tokens(frames, config),
        pad_token_id=special,
        bos_token_id=special,
        decoder_start_token_id=special,
    )


def musicgen_config(
    text_encoder: Any, codec: EncodecConfig, decoder: MusicgenDecoderConfig
) -> MusicgenConfig:
    """The three configurations as one, with MusicGen's special token everywhere."""
    return MUSICGEN.repair_token_ids(
        MusicgenConfig(text_encoder=text_encoder, audio_encoder=codec, decoder=decoder)
    )
