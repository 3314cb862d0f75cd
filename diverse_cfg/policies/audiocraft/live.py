"""Live AudioCraft objects: taken in for training, and made from a trained model.

Only `to_audiocraft` needs the package; taking an object in works on the object.
"""

import contextlib
import copy
import functools
import importlib
from collections.abc import Iterator
from typing import Any

from peft import PeftModel
from torch import nn
from torch.nn import functional
from transformers import (
    AutoTokenizer,
    EncodecModel,
    GenerationConfig,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
)

from diverse_cfg.policies.audiocraft import configuration, names
from diverse_cfg.policies.audiocraft.folders import transformers_folder
from diverse_cfg.policies.audiocraft.importing import import_audiocraft
from diverse_cfg.policies.audiocraft.reading import Parts, assemble, build_model, check_codec
from diverse_cfg.policies.audiocraft.stored_config import StoredConfig
from diverse_cfg.policies.audiocraft.writing import codec_state, known_text_encoder, language_model_state

_CONDITIONERS = {
    "T5Conditioner": "t5",
    "ChromaStemConditioner": "chroma_stem",
    "CLAPEmbeddingConditioner": "clap",
    "StyleConditioner": "style",
    "LUTConditioner": "lut",
}


def is_live_audiocraft(model: Any) -> bool:
    """Whether this is an object of AudioCraft's: a `MusicGen`, an `LMModel`, or (LMModel, compression_model)."""
    if isinstance(model, tuple | list):
        return len(model) == 2 and all(is_live_audiocraft(part) for part in model)
    return any(kind.__module__.partition(".")[0] == "audiocraft" for kind in type(model).__mro__)


def from_audiocraft(model: Any) -> tuple[MusicgenForConditionalGeneration, MusicgenProcessor]:
    """A live AudioCraft MusicGen as transformers' class, with weights of its own.

    Args:
        model: `audiocraft.models.MusicGen`, or a pair (LMModel, compression_model).

    Returns:
        Model in float32 and eval mode that plays as the object was set to, and its processor.

    Raises:
        ValueError: an LMModel alone, or a model that transformers' MusicGen cannot hold.
    """
    if isinstance(model, tuple | list):
        language_model, codec = model
        seconds, playing, name = None, None, None
    elif hasattr(model, "lm") and hasattr(model, "compression_model"):
        language_model, codec = model.lm, model.compression_model
        seconds, playing, name = model.max_duration, model, model.name
    else:
        raise ValueError(
            f"an AudioCraft {type(model).__name__} alone has no codec: pass the MusicGen that holds it, or the pair "
            "(lm, compression_model)"
        )
    if not hasattr(language_model, "condition_provider") or not hasattr(language_model, "transformer"):
        raise ValueError(
            f"expected a pair (LMModel, compression_model), got ({type(language_model).__name__}, "
            f"{type(codec).__name__})"
        )
    stereo = type(codec).__name__ == "InterleaveStereoCompressionModel"
    values = _language_model_settings(language_model, seconds)
    values["interleave_stereo_codebooks"] = {"use": stereo, "per_timestep": stereo and codec.per_timestep}
    values["compression_model_n_q"] = (codec.model if stereo else codec).num_codebooks
    cfg = StoredConfig(values, f"the live {type(model).__name__}")
    configuration.check_language_model(cfg)
    codec_parts = _codec_parts(codec.model if stereo else codec)
    check_codec(cfg, codec_parts.config, "of the live model")
    conditioner = language_model.condition_provider.conditioners["description"]
    text = Parts(copy.deepcopy(conditioner.t5.config), dict(conditioner.t5.state_dict()))
    state = names.language_model_to_transformers(language_model.state_dict())
    stored = assemble(cfg, state, text, codec_parts, conditioner.t5_tokenizer)
    result = build_model(stored)
    if playing is not None:
        params, nucleus = playing.generation_params, playing.generation_params.get("top_p") or 0.0
        result.generation_config = configuration.generation_config(
            result.config,
            int(playing.duration * playing.frame_rate),
            params.get("cfg_coef"),
            # AudioCraft leaves top-k out where it has a top-p.
            0 if nucleus else int(params.get("top_k", configuration.TOP_K)),
            top_p=nucleus or 1.0,
            do_sample=bool(params.get("use_sampling", True)),
            temperature=float(params.get("temp") or 1.0),
        )
    result.config._name_or_path = name or ""
    return result, stored.processor


def to_audiocraft(model: nn.Module, processor: Any = None) -> Any:
    """A live `audiocraft.models.MusicGen` with a copy of this model's weights.

    Args:
        model: a transformers MusicGen; of a `PeftModel`, the adapters are merged into the copy.
        processor: the model's processor or tokenizer; by default that of the folder or Hub id it was loaded
            from, or of the T5 that its text encoder is.

    Returns:
        The object, on the model's device, set to play as the model does. A distilled model thus comes with
        `cfg_coef=1`, at which it takes one decoder row per clip (`without_null_rows`); AudioCraft's own default would
        guide it a second time.

    Raises:
        ImportError: audiocraft is not installed.
        ValueError: the model has something that AudioCraft's MusicGen lacks, or its tokenizer is unknown.
    """
    import_audiocraft()
    builders = importlib.import_module("audiocraft.models.builders")
    omegaconf = importlib.import_module("omegaconf")
    if isinstance(model, PeftModel):
        model = copy.deepcopy(model).merge_and_unload()
    if not isinstance(model, MusicgenForConditionalGeneration):
        raise ValueError(f"expected a MusicgenForConditionalGeneration, got a {type(model).__name__}")
    generation = model.generation_config or GenerationConfig()
    tokenizer = _tokenizer(model, processor)
    name = known_text_encoder(model.config) or "text_encoder"
    configs = configuration.audiocraft_configs(model.config, generation, name, finetuned_text_encoder=False)
    device = {"device": model.device.type}
    cfg, codec_cfg = (omegaconf.OmegaConf.create(values | device) for values in configs)
    with _own_text_encoder(name, model.text_encoder, tokenizer):
        language_model = builders.get_lm_model(cfg)
    language_model.load_state_dict(language_model_state(model))
    language_model.cfg = cfg
    codec = builders.get_compression_model(codec_cfg)
    codec.load_state_dict(codec_state(model.audio_encoder))
    musicgen = importlib.import_module("audiocraft.models").MusicGen(
        model.config._name_or_path or "diverse-cfg", codec.eval(), language_model.eval()
    )
    frames = configuration.num_frames(model.config, generation)
    musicgen.set_generation_params(
        use_sampling=bool(generation.do_sample),
        top_k=min(configuration.top_k(generation), language_model.card),
        top_p=0.0 if generation.top_p in (None, 1.0) else generation.top_p,
        temperature=generation.temperature or 1.0,
        duration=_seconds(frames, musicgen.frame_rate) if frames else musicgen.max_duration,
        cfg_coef=float(generation.guidance_scale or 1.0),
    )
    return without_null_rows(musicgen)


def without_null_rows(music: Any) -> Any:
    """Let an `audiocraft.models.MusicGen` leave out the null prompt's rows where `cfg_coef` is 1.

    AudioCraft computes them always, also where the guided logits are the conditional ones: two decoder rows per
    clip. With this it is one, and the codes are the same up to rounding. Any other `cfg_coef` guides as before.

    Returns:
        The same object.
    """
    if not hasattr(music.lm, "skips_null_rows"):
        music.lm.__class__ = _one_row(type(music.lm))
    return music


@functools.cache
def _one_row(kind: type) -> type:
    """The class of an AudioCraft LMModel, with a step that has no null rows at `cfg_coef` 1."""

    class OneRow(kind):
        skips_null_rows = True

        def _sample_next_token(
            self, sequence, cfg_conditions, *args, cfg_coef=None, two_step_cfg=None, **kwargs
        ):
            step = super()._sample_next_token
            coefficient = self.cfg_coef if cfg_coef is None else cfg_coef
            if coefficient != 1 or not cfg_conditions:
                return step(
                    sequence, cfg_conditions, *args, cfg_coef=cfg_coef, two_step_cfg=two_step_cfg, **kwargs
                )
            if isinstance(cfg_conditions, tuple):  # two_step_cfg: conditional and null apart
                conditions = cfg_conditions[0]
            else:
                rows = len(sequence)
                conditions = {name: (x[:rows], mask[:rows]) for name, (x, mask) in cfg_conditions.items()}
            # Without conditions AudioCraft computes one row per clip; they come in at the model's own door.
            hook = self.register_forward_pre_hook(
                lambda _, given, named: (given, named | {"condition_tensors": conditions}), with_kwargs=True
            )
            try:
                return step(sequence, {}, *args, cfg_coef=1.0, two_step_cfg=False, **kwargs)
            finally:
                hook.remove()

    OneRow.__name__, OneRow.__qualname__ = kind.__name__, kind.__qualname__
    return OneRow


def _seconds(frames: int, frame_rate: float) -> float:
    """A duration of which AudioCraft, which rounds down, makes this number of frames."""
    seconds = frames / frame_rate
    while int(seconds * frame_rate) < frames:
        seconds += 1e-9
    return seconds


def _tokenizer(model: MusicgenForConditionalGeneration, processor: Any) -> Any:
    if processor is not None:
        return getattr(processor, "tokenizer", processor)
    origin = model.config._name_or_path
    for source in (origin and transformers_folder(origin), known_text_encoder(model.config)):
        with contextlib.suppress(OSError, ValueError):
            if source:
                return AutoTokenizer.from_pretrained(source)
    raise ValueError("the model does not know its tokenizer: call to_audiocraft(model, processor)")


@contextlib.contextmanager
def _own_text_encoder(name: str, encoder: nn.Module, tokenizer: Any) -> Iterator[None]:
    """AudioCraft builds its T5 from a list of names; meanwhile that list leads to a copy of this encoder."""
    conditioners = importlib.import_module("audiocraft.modules.conditioners")

    class Encoder:
        from_pretrained = staticmethod(lambda _: copy.deepcopy(encoder).eval().requires_grad_(False))

    class Tokenizer:
        from_pretrained = staticmethod(lambda _: tokenizer)

    width = encoder.config.d_model  # pyright: ignore
    saved = (conditioners.T5EncoderModel, conditioners.T5Tokenizer)
    kind = conditioners.T5Conditioner
    lists = (kind.MODELS, kind.MODELS_DIMS)
    conditioners.T5EncoderModel, conditioners.T5Tokenizer = Encoder, Tokenizer
    kind.MODELS, kind.MODELS_DIMS = [*lists[0], name], {**lists[1], name: width}
    try:
        yield
    finally:
        conditioners.T5EncoderModel, conditioners.T5Tokenizer = saved
        kind.MODELS, kind.MODELS_DIMS = lists


# ---- what a live object was built with ----------------------------------------------------------------------


def _language_model_settings(lm: Any, seconds: float | None) -> dict[str, Any]:
    """The configuration that the object's own attributes tell; the one it was loaded with may be absent."""
    transformer, layer = lm.transformer, lm.transformer.layers[0]
    attention, provider, fuser = layer.self_attn, lm.pattern_provider, lm.fuser
    network = {
        "dim": lm.dim,
        "num_heads": attention.num_heads,
        "num_layers": len(transformer.layers),
        "hidden_scale": layer.linear1.out_features / lm.dim,
        "n_q": lm.n_q,
        "card": lm.card,
        "norm_first": layer.norm_first,
        "norm": "layer_norm" if isinstance(layer.norm1, nn.LayerNorm) else type(layer.norm1).__name__,
        "bias_proj": lm.linears[0].bias is not None,
        "bias_ff": layer.linear1.bias is not None,
        "bias_attn": any(name.endswith("bias") for name, _ in attention.named_parameters()),
        "activation": "gelu" if layer.activation is functional.gelu else str(layer.activation),
        "causal": attention.causal,
        "past_context": attention.past_context,
        "positional_embedding": transformer.positional_embedding,
        "positional_scale": transformer.positional_scale,
        "max_period": transformer.max_period,
        "layer_scale": None if isinstance(layer.layer_scale_1, nn.Identity) else "learned",
        "qk_layer_norm": attention.qk_layer_norm,
        "qk_layer_norm_cross": bool(layer.cross_attention and layer.cross_attention.qk_layer_norm),
        "kv_repeat": attention.kv_repeat,
    }
    delayed = type(provider).__name__ == "DelayedPatternProvider"
    pattern = {"modeling": "delay" if delayed else type(provider).__name__}
    if delayed:
        pattern["delay"] = {
            "delays": list(provider.delays),
            "flatten_first": provider.flatten_first,
            "empty_initial": provider.empty_initial,
        }
    conditioners = {}
    for name, conditioner in lm.condition_provider.conditioners.items():
        model = _CONDITIONERS.get(type(conditioner).__name__, type(conditioner).__name__)
        conditioners[name] = {"model": model}
        if model == "t5":
            conditioners[name]["t5"] = {
                "name": conditioner.name,
                "normalize_text": conditioner.normalize_text,
            }
    magnet = type(lm).__name__ == "MagnetLMModel"
    return {
        "lm_model": "transformer_lm_magnet" if magnet else "transformer_lm",
        # AudioGen is the same class; only the configuration that it was loaded with tells.
        "solver": lm.cfg.get("solver") if hasattr(lm, "cfg") else None,
        "transformer_lm": network,
        "codebooks_pattern": pattern,
        "conditioners": conditioners,
        "fuser": {**fuser.fuse2cond, "cross_attention_pos_emb": fuser.cross_attention_pos_emb},
        "dataset": {"segment_duration": seconds or configuration.SECONDS},
        "classifier_free_guidance": {"inference_coef": configuration.GUIDANCE_SCALE},
    }


def _codec_parts(codec: Any) -> Parts:
    inner = getattr(codec, "model", None)
    if isinstance(inner, EncodecModel):  # a pretrained one of transformers
        return Parts(copy.deepcopy(inner.config), dict(inner.state_dict()))
    if type(codec).__name__ != "EncodecModel":
        raise ValueError(
            f"the live model decodes with a {type(codec).__name__}, and transformers' MusicGen with an EnCodec: it "
            "cannot be converted"
        )
    cfg = StoredConfig(_codec_settings(codec), "the live codec")
    return Parts(configuration.codec_config(cfg), names.codec_to_transformers(codec.state_dict()))


def _codec_settings(codec: Any) -> dict[str, Any]:
    encoder, decoder = codec.encoder, codec.decoder
    convolutions = [module for module in encoder.model if hasattr(module, "pad_mode")]
    residuals = [module for module in encoder.model if hasattr(module, "shortcut")]
    lstms = [module for module in encoder.model if hasattr(module, "lstm")]
    transposed = [module for module in decoder.model if hasattr(module, "convtr")]
    first, last = convolutions[0], convolutions[-1]
    seanet: dict[str, Any] = {
        "dimension": encoder.dimension,
        "n_filters": encoder.n_filters,
        "n_residual_layers": encoder.n_residual_layers,
        "ratios": list(decoder.ratios),
        "activation": type(encoder.model[-2]).__name__,
        "norm": first.conv.norm_type,
        "kernel_size": first.conv.conv.kernel_size[0],
        "last_kernel_size": last.conv.conv.kernel_size[0],
        "pad_mode": first.pad_mode,
        "lstm": lstms[0].lstm.num_layers if lstms else 0,
        "disable_norm_outer_blocks": encoder.disable_norm_outer_blocks,
        "decoder": {
            "trim_right_ratio": transposed[0].trim_right_ratio,
            "final_activation": None
            if hasattr(decoder.model[-1], "conv")
            else type(decoder.model[-1]).__name__,
        },
    }
    if residuals:
        entry = residuals[0].block[1].conv.conv
        seanet |= {
            "residual_kernel_size": entry.kernel_size[0],
            "compress": entry.in_channels // entry.out_channels,
            "true_skip": isinstance(residuals[0].shortcut, nn.Identity),
            # Dilation grows from one residual layer to the next: the second layer shows the factor.
            "dilation_base": residuals[1].block[1].conv.conv.dilation[0]
            if encoder.n_residual_layers > 1
            else 2,
        }
    return {
        "compression_model": "encodec",
        "encodec": {
            "autoencoder": "seanet",
            "quantizer": "rvq" if hasattr(codec.quantizer, "vq") else type(codec.quantizer).__name__,
            "sample_rate": codec.sample_rate,
            "channels": codec.channels,
            "causal": codec.causal,
            "renormalize": codec.renormalize,
        },
        "seanet": seanet,
        "rvq": {"n_q": codec.total_codebooks, "bins": codec.cardinality},
    }
