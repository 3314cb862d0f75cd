"""What a MusicGen folder consists of: its tensors by name, what makes two of them mergeable, and how it is
played.

Merging, inspection, cards and publishing read checkpoints as files and configurations; this module answers
their questions about MusicGen, so that none of them builds a model.
"""

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    PreTrainedConfig,
)

from diverse_cfg.reading import COPY_AGAIN, read_json, reading

# The codec gives the codes their meaning: codecs are compared, never interpolated.
CODEC_PREFIX = "audio_encoder."

# Of the settings that a configuration class declares, those that two checkpoints of one architecture may differ in:
# bookkeeping, training-time noise, token ids (written anew on saving), and what concerns a decoder of T5 or is
# decided by MusicGen itself.
_NOT_ARCHITECTURE = {
    "activation_dropout",
    "add_cross_attention",
    "attention_dropout",
    "bos_token_id",
    "classifier_dropout",
    "cross_attention_hidden_size",
    "dropout",
    "dropout_rate",
    "eos_token_id",
    "initializer_factor",
    "is_decoder",
    "layerdrop",
    "num_decoder_layers",
    "pad_token_id",
    "scale_decoder_outputs",
    "tie_word_embeddings",
    "use_cache",
}
# What makes text readable to the model: tokenizer and processor.
PROCESSOR_FILES = (
    "added_tokens.json",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
)
_PROCESSOR_NEEDS = {
    "tokenizer": ("tokenizer.json", "spiece.model"),
    "processor": ("processor_config.json", "preprocessor_config.json"),
}
PROCESSOR_REMEDY = "copy the tokenizer and processor files of its base model into it"
_SAMPLING_NUMBERS = {
    "guidance_scale": float,
    "temperature": float,
    "top_k": int,
    "top_p": float,
    "min_p": float,
    "max_length": int,
    "max_new_tokens": int,
}
# Tables that older versions saved although they are computed.
_COMPUTED = ("embed_positions.weights", "position_ids")
_OLD_WEIGHT_NORM = {
    ".weight_g": ".parametrizations.weight.original0",
    ".weight_v": ".parametrizations.weight.original1",
}


def load_config(folder: str | os.PathLike) -> MusicgenConfig:
    """Configuration of a MusicGen folder.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: the file is damaged, or describes another kind of model (melody and style checkpoints included).
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{folder} has no config.json: it is neither a MusicGen checkpoint, nor AudioCraft's (state_dict.bin and "
            "compression_state_dict.bin), nor an adapter"
        )
    kind = read_json(path).get("model_type")
    if kind == "musicgen_melody":
        raise ValueError(
            f"{folder} is a MusicGen-Melody model ({kind!r}), which reads its condition as a prefix and not by "
            "cross-attention: use a MusicGen without melody, such as facebook/musicgen-small"
        )
    if kind != MusicgenConfig.model_type:
        raise ValueError(
            f"{folder} is a {kind!r} model, not a MusicGen; use a checkpoint such as facebook/musicgen-small"
        )
    with reading(path):
        config = MusicgenConfig.from_pretrained(str(folder))
        counts = {
            name: value
            for name, value in architecture(config).items()
            if isinstance(value, int) and not name.startswith(CODEC_PREFIX)
        }
    for name, value in counts.items():
        if not isinstance(value, bool) and value < 1:
            raise ValueError(f"{path}: {name}={value} must be at least 1; {COPY_AGAIN}")
    return config


def load_generation_config(folder: str | os.PathLike) -> GenerationConfig | None:
    """How a folder says that it is sampled; None where it does not say.

    Raises:
        ValueError: the file is damaged, or a number in it is none.
    """
    path = Path(folder) / "generation_config.json"
    if not path.exists():
        return None
    content = read_json(path)
    if foreign := {"model_type", "architectures", "peft_type"} & content.keys():
        raise ValueError(
            f"{path} holds {min(foreign)}, so it is another file's content: copy or download it again"
        )
    for name, kind in _SAMPLING_NUMBERS.items():
        value = content.get(name)
        if value is None:
            continue
        if not isinstance(value, int | kind) or isinstance(value, bool) or not 0 <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(
                f"{path}: {name}={value!r} must be {what} of at least 0; correct it, or {COPY_AGAIN}"
            )
    with reading(path):
        return GenerationConfig.from_pretrained(str(folder))


def expected_tensors(config: MusicgenConfig) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Names and shapes of a complete checkpoint, found without allocating a weight.

    Returns:
        name → shape of every stored tensor, and alias → name for tensors that share their memory with
        another.
    """
    with torch.device("meta"):
        model = MusicgenForConditionalGeneration(config)
    shapes: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    names: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        first = names.setdefault(id(tensor), name)
        if first == name:
            shapes[name] = tuple(tensor.shape)
        else:
            aliases[name] = first
    return shapes, aliases


def canonical_name(name: str, aliases: Mapping[str, str]) -> str | None:
    """The name that `expected_tensors` uses for a tensor found in a file; None for computed tables."""
    if name.endswith(_COMPUTED):
        return None
    for old, new in _OLD_WEIGHT_NORM.items():
        if name.endswith(old):
            name = name.removesuffix(old) + new
    return aliases.get(name, name)


def storage_dtype(name: str, stored: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The type in which a tensor is saved when a model is asked for in `dtype`.

    The codec keeps at least the precision that it has: half precision is heard there, and it is small. So
    does what T5 cannot do in float16 and transformers therefore keeps in float32, the feed-forward outputs.
    """
    if not stored.is_floating_point:
        return stored
    fragile = dtype == torch.float16 and name.startswith("text_encoder.") and ".wo." in name
    return torch.promote_types(stored, dtype) if fragile or name.startswith(CODEC_PREFIX) else dtype


def part_of(name: str) -> str:
    """The part of the model that a tensor belongs to, in words a musician's engineer would use."""
    for prefix, part in (
        ("text_encoder.", "text encoder"),
        ("audio_encoder.", "codec"),
        ("enc_to_dec_proj.", "text projection"),
        ("decoder.lm_heads.", "heads"),
        ("decoder.model.decoder.embed", "code embeddings"),
    ):
        if name.startswith(prefix):
            return part
    for piece, part in (
        ("self_attn", "self-attention"),
        ("encoder_attn", "cross-attention"),
        ("fc", "feed-forward"),
    ):
        if f".{piece}" in name and "norm" not in name:
            return part
    return "norms"


def architecture(config: MusicgenConfig) -> dict[str, Any]:
    """Everything in a configuration that shapes the computation, as dotted name → value.

    Only what the three configuration classes declare: older versions of transformers stored dozens of settings of
    text generation beside it.
    """
    values: dict[str, Any] = {}
    for part in ("text_encoder", "audio_encoder", "decoder"):
        own = getattr(config, part)
        declared = type(own)().to_dict().keys() - PreTrainedConfig().to_dict().keys() - _NOT_ARCHITECTURE
        stored = own.to_dict()
        values[f"{part}.model_type"] = own.model_type
        values |= {f"{part}.{name}": stored.get(name) for name in sorted(declared)}
    return values


def has_processor_files(folder: Path) -> bool:
    """Whether a folder has a tokenizer and processor of its own, or a part of them; an adapter may have its base's."""
    return any((folder / name).exists() for name in PROCESSOR_FILES)


def missing_processor(folder: Path) -> str | None:
    """The file that a folder lacks to read prompts; None where it holds a tokenizer and a processor configuration."""
    for kind, names in _PROCESSOR_NEEDS.items():
        if not any((folder / name).is_file() for name in names):
            return f"{kind} ({' or '.join(names)})"
    return None


def require_processor(folder: Path) -> None:
    """Refuse a folder whose prompts would become unknown words.

    Raises:
        ValueError: the tokenizer or the processor configuration is missing.
    """
    if missing := missing_processor(folder):
        raise ValueError(
            f"{folder} has no {missing}, without which it cannot read prompts: {PROCESSOR_REMEDY}"
        )


def tokenizer_vocabulary(folder: Path) -> dict[str, int] | None:
    """Piece → id of the tokenizer in a folder; None where there is none."""
    if not any((folder / name).is_file() for name in _PROCESSOR_NEEDS["tokenizer"]):
        return None
    with reading(folder, PROCESSOR_REMEDY):
        return AutoTokenizer.from_pretrained(str(folder)).get_vocab()


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


def num_frames_to_tokens(num_frames: int, config: MusicgenConfig) -> int:
    """`max_new_tokens` for T frames: the delay pattern adds K − 1 steps in mono and K/2 − 1 in stereo."""
    decoder = config.decoder
    return num_frames + max(codebook_delays(decoder.num_codebooks, decoder.audio_channels))


def frames_to_seconds(num_frames: int, config: MusicgenConfig) -> float:
    """Length of a clip of T frames."""
    codec = config.audio_encoder
    return num_frames * math.prod(codec.upsampling_ratios) / codec.sampling_rate


def repair_token_ids(config: MusicgenConfig) -> MusicgenConfig:
    """Set pad, bos and start to the id after the last code (2048 for the released models), in place.

    Training frameworks write the text encoder's 0 and 1 there; generation would then drop code 0 as padding.
    """
    codebook_size = config.decoder.vocab_size
    config.pad_token_id = config.decoder.pad_token_id = codebook_size
    config.decoder.bos_token_id = codebook_size
    config.decoder_start_token_id = config.decoder.decoder_start_token_id = codebook_size
    config.decoder.eos_token_id = None
    return config


def playing_config(
    config: MusicgenConfig, sampling: Mapping[str, Any] | None = None, like: GenerationConfig | None = None
) -> GenerationConfig:
    """Generation settings of a distilled checkpoint: no guidance, and the sampling that it was trained with.

    Args:
        config: the model's configuration.
        sampling: `temperature`, `top_k`, `top_p`, `num_frames` of the provenance; what it does not name is
            kept from `like`.
        like: settings of the checkpoint that it came from. Its guidance is dropped, and its `max_length`
            becomes the equivalent `max_new_tokens` (read from a generation config, both count new tokens).
    """
    sampling = dict(sampling or {})
    like = like or GenerationConfig()
    max_new_tokens = like.max_new_tokens or like.max_length
    if sampling.get("num_frames"):
        max_new_tokens = num_frames_to_tokens(int(sampling["num_frames"]), config)
    codebook_size = config.decoder.vocab_size
    settings: dict[str, Any] = {
        "do_sample": True,
        "guidance_scale": 1.0,
        "max_new_tokens": max_new_tokens,
        "pad_token_id": codebook_size,
        "bos_token_id": codebook_size,
        "decoder_start_token_id": codebook_size,
    }
    for name in ("temperature", "top_k", "top_p", "min_p"):
        value = sampling.get(name, getattr(like, name, None))
        if value is not None:
            settings[name] = value
    return GenerationConfig(**settings)
