"""AudioCraft's exported checkpoints as transformers' MusicGen, without the audiocraft package.

A checkpoint is a folder (or Hub repository) with `state_dict.bin`, the language model, and
`compression_state_dict.bin`, the codec or a pointer to one. Both are pickles of tensors and strings, and are
read as nothing else. The text encoder is not in them: their configuration names a T5.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    EncodecConfig,
    EncodecFeatureExtractor,
    EncodecModel,
    GenerationConfig,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    T5EncoderModel,
)

from diverse_cfg.policies.audiocraft import configuration, names
from diverse_cfg.policies.audiocraft.stored_config import StoredConfig
from diverse_cfg.policies.families import load_generation_config
from diverse_cfg.policies.musicgen.family import MUSICGEN, special_token_is_no_news
from diverse_cfg.reading import load_complete, reading

LANGUAGE_MODEL_FILE = "state_dict.bin"
CODEC_FILE = "compression_state_dict.bin"
TEXT_ENCODER_FOLDER = "text_encoder"
"""Subfolder of a checkpoint that may hold its T5, for machines without a network."""

_EXPORT = (
    "export it where it was trained: audiocraft.utils.export.export_lm(checkpoint, 'state_dict.bin') and "
    "export_pretrained_compression_model('facebook/encodec_32khz', 'compression_state_dict.bin')"
)
_MELODY = ("self_wav", "chroma")
_REPORTED = 5


@dataclass(frozen=True)
class Stored:
    """A checkpoint as it was read: everything that a transformers folder is written from.

    Args:
        config: configuration of the transformers model.
        state: its tensors by name, in the precision in which they were stored.
        generation: how it plays.
        processor: tokenizer and feature extractor.
    """

    config: MusicgenConfig
    state: dict[str, Tensor]
    generation: GenerationConfig
    processor: MusicgenProcessor


@dataclass(frozen=True)
class Parts:
    """A codec or a text encoder on its way into the model: configuration and tensors, under its own names."""

    config: Any
    state: dict[str, Tensor] = field(repr=False)


def read_checkpoint(
    language_model: Path, codec: Path, *, text_encoder: str | os.PathLike | None = None
) -> Stored:
    """Read the two files of an AudioCraft checkpoint.

    Args:
        language_model: `state_dict.bin`.
        codec: `compression_state_dict.bin`.
        text_encoder: folder or Hub id of the T5, where it shall not be found by the name that the checkpoint
            gives it.

    Raises:
        ValueError: what it is, and what to do, when it is no complete MusicGen that transformers can hold.
    """
    package = _read_package(language_model)
    cfg = StoredConfig(package["xp.cfg"], str(language_model))
    configuration.check_language_model(cfg)
    codec_parts = _read_codec(codec)
    check_codec(cfg, codec_parts.config, str(codec))
    state = names.language_model_to_transformers(package["best_state"])
    text, tokenizer = _read_text_encoder(cfg, state, language_model.parent, text_encoder)
    generation = load_generation_config(language_model.parent)
    return assemble(cfg, state, text, codec_parts, tokenizer, generation)


def assemble(
    cfg: StoredConfig,
    state: Mapping[str, Tensor],
    text: Parts,
    codec: Parts,
    tokenizer: Any,
    generation: GenerationConfig | None = None,
) -> Stored:
    """The parts as one model, after checking that every tensor is there and has its shape.

    Raises:
        ValueError: tensors are missing, left over, or of another shape; the message lists them.
    """
    decoder = configuration.decoder_config(cfg, codec.config.sampling_rate / codec.config.hop_length)
    with special_token_is_no_news():
        config = MusicgenConfig(text_encoder=text.config, audio_encoder=codec.config, decoder=decoder)
    MUSICGEN.repair_token_ids(config).dtype = "float32"
    shapes, aliases = MUSICGEN.expected_tensors(config)
    found = {name: tensor for name, tensor in state.items() if not name.startswith(names.TEXT_ENCODER)}
    found |= {names.TEXT_ENCODER + name: tensor for name, tensor in text.state.items()}
    found |= {names.CODEC + name: tensor for name, tensor in codec.state.items()}
    tensors = {
        canonical: tensor
        for name, tensor in found.items()
        if (canonical := MUSICGEN.canonical_name(name, aliases)) is not None
    }
    _require_complete(tensors, shapes, cfg.name)
    features = EncodecFeatureExtractor(
        feature_size=decoder.audio_channels, sampling_rate=codec.config.sampling_rate, padding_side="left"
    )
    seconds = float(cfg.get("dataset.segment_duration") or configuration.SECONDS)
    frames = int(seconds * codec.config.sampling_rate / codec.config.hop_length)
    guidance = cfg.get("classifier_free_guidance.inference_coef")
    return Stored(
        config,
        {name: tensors[name] for name in shapes},
        generation or configuration.generation_config(config, frames, guidance),
        MusicgenProcessor(features, tokenizer),
    )


def build_model(stored: Stored) -> MusicgenForConditionalGeneration:
    """The model in float32 and eval mode, with weights of its own."""
    model = MusicgenForConditionalGeneration(stored.config)
    missing, unexpected = model.load_state_dict(stored.state, strict=False)
    assert not unexpected, unexpected
    aliases = MUSICGEN.expected_tensors(stored.config)[1]
    assert set(missing) <= set(aliases), missing
    model.generation_config = stored.generation
    return model.float().eval()


def _read_package(path: Path) -> dict[str, Any]:
    """One exported file as a dictionary with `best_state` and `xp.cfg` (or `pretrained`).

    Raises:
        ValueError: not there, truncated, a raw training checkpoint, or something else.
    """
    if not path.is_file():
        raise ValueError(
            f"there is no {path}: an AudioCraft checkpoint is {LANGUAGE_MODEL_FILE} with {CODEC_FILE}"
        )
    with reading(path):
        path.open("rb").close()  # or its permissions would pass for damage
    try:
        package = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if _mentions(path, b"omegaconf"):
            raise ValueError(
                f"{path} is a raw training checkpoint, whose pickled objects are never loaded here: {_EXPORT}"
            ) from error
        raise ValueError(
            f"{path} is no AudioCraft export, which holds tensors and strings only, or it is damaged "
            f"({_first_line(error)}): copy it again, or {_EXPORT}"
        ) from error
    except (EOFError, OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({_first_line(error)}): copy or download it again"
        ) from error
    if not isinstance(package, dict):
        raise ValueError(f"{path} holds a {type(package).__name__}, not an AudioCraft export: {_EXPORT}")
    if "pretrained" in package:
        return package
    if (
        "ema" in package
        or "optimizer" in package
        or isinstance(package.get("best_state", {}).get("model"), dict)
    ):
        raise ValueError(f"{path} is a raw training checkpoint: {_EXPORT}")
    if not isinstance(package.get("best_state"), dict) or not isinstance(package.get("xp.cfg"), str):
        found = ", ".join(map(str, list(package)[:_REPORTED])) or "nothing"
        raise ValueError(
            f"{path} lacks 'best_state' or 'xp.cfg' (it has {found}): it is no AudioCraft export; {_EXPORT}"
        )
    return package


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _mentions(path: Path, word: bytes) -> bool:
    """Whether a pickle names a module, found without unpickling."""
    try:
        with zipfile.ZipFile(path) as archive:
            [member] = [name for name in archive.namelist() if name.endswith("data.pkl")]
            return word in archive.read(member)
    except (zipfile.BadZipFile, ValueError):
        with path.open("rb") as file:
            return word in file.read(io.DEFAULT_BUFFER_SIZE)


def _read_codec(path: Path) -> Parts:
    """The codec of `compression_state_dict.bin`, or the pretrained one that it points to."""
    package = _read_package(path)
    if "pretrained" in package:
        return _pretrained_codec(str(package["pretrained"]), path)
    cfg = StoredConfig(package["xp.cfg"], str(path))
    return Parts(configuration.codec_config(cfg), names.codec_to_transformers(package["best_state"]))


def _pretrained_codec(name: str, pointer: Path) -> Parts:
    name = name.removeprefix("//pretrained/")
    if name.startswith("dac_"):
        raise ValueError(
            f"{pointer} points to the codec {name} (DAC), and transformers' MusicGen decodes with an EnCodec: this "
            "checkpoint cannot be converted"
        )
    for candidate in (Path(name), pointer.parent / name):
        if candidate.is_file() or (candidate / CODEC_FILE).is_file():
            target = candidate if candidate.is_file() else candidate / CODEC_FILE
            if target.resolve() == pointer.resolve():
                raise ValueError(f"{pointer} points to itself: put the codec's own export there")
            return _read_codec(target)
    local = next((str(path) for path in (Path(name), pointer.parent / name) if path.is_dir()), name)
    try:
        model = load_complete(EncodecModel, local)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{pointer} names the codec {name}, which is neither a folder, nor in the Hub's cache, nor within "
            f"reach ({_first_line(error)}): run `hf download {name}` where there is a network, or put its folder at "
            f"{pointer.parent / name}"
        ) from error
    if model.config.normalize or model.config.audio_channels != 1:
        raise ValueError(
            f"{pointer} names the codec {name}, which is stereo or normalises loudness; MusicGen's is mono and "
            "does not"
        )
    return Parts(model.config, dict(model.state_dict()))


def check_codec(cfg: StoredConfig, codec: EncodecConfig, name: str) -> None:
    """Whether the codec speaks the codes of the language model; its bandwidth is set to theirs, in place.

    Raises:
        ValueError: another number of codes, of codebooks, or another sampling rate.
    """
    network = cfg.require("transformer_lm")
    stereo = bool(cfg.get("interleave_stereo_codebooks.use"))
    wanted = int(network["n_q"]) // (2 if stereo else 1)
    used = cfg.get("compression_model_n_q")
    used = codec.num_quantizers if used is None else int(used)
    per_channel = " per channel" if stereo else ""
    if used != wanted or used > codec.num_quantizers:
        raise ValueError(
            f"{cfg.name} models {wanted} codebooks{per_channel}, but the codec {name} has {codec.num_quantizers}, of "
            f"which {used} are used: it is not the codec that this model was trained with"
        )
    if codec.codebook_size != int(network["card"]):
        raise ValueError(
            f"{cfg.name} models {network['card']} codes per codebook, but the codec {name} has "
            f"{codec.codebook_size}: it is not the codec that this model was trained with"
        )
    rate = cfg.get("sample_rate")
    if rate not in (None, "???") and int(rate) != codec.sampling_rate:
        raise ValueError(
            f"{cfg.name} was trained on {rate} Hz, but the codec {name} is for {codec.sampling_rate} Hz: it is not "
            "the codec that this model was trained with"
        )
    # The first bandwidth is the one that `encode` uses, the last one sizes the quantizer.
    bandwidths = [
        configuration.bandwidth(count, codec.sampling_rate, codec.hop_length, codec.codebook_size)
        for count in sorted({used, codec.num_quantizers})
    ]
    codec.target_bandwidths = bandwidths


def _read_text_encoder(
    cfg: StoredConfig,
    state: Mapping[str, Tensor],
    folder: Path,
    given: str | os.PathLike | None,
) -> tuple[Parts, Any]:
    """The T5 that the checkpoint names, and its tokenizer.

    It is looked for in `given`, in the checkpoint's own `text_encoder/`, and by its name (a folder, the Hub's
    cache, the Hub). Its weights are those of the checkpoint where that brings some (a fine-tuned T5).

    Raises:
        ValueError: it is nowhere to be found; the message says how to get it.
    """
    name = str(cfg.require("conditioners.description.t5.name"))
    if given is not None:
        candidates = [os.fspath(given)]
    elif (folder / TEXT_ENCODER_FOLDER).is_dir():
        candidates = [str(folder / TEXT_ENCODER_FOLDER)]
    else:  # the names without an owner have moved to one
        candidates = [name] if "/" in name else [name, f"google-t5/{name}"]
    own = {
        key.removeprefix(names.TEXT_ENCODER): tensor
        for key, tensor in state.items()
        if key.startswith(names.TEXT_ENCODER)
    }
    error: Exception | None = None
    for candidate in candidates:
        try:
            with reading(candidate):
                tokenizer = AutoTokenizer.from_pretrained(candidate)
                if own:
                    with torch.device("meta"):
                        encoder = T5EncoderModel(AutoConfig.from_pretrained(candidate))
                    return Parts(encoder.config, own), tokenizer
            encoder = load_complete(T5EncoderModel, candidate, dtype=torch.float32)
            return Parts(encoder.config, dict(encoder.state_dict())), tokenizer
        except (OSError, ValueError) as caught:
            error = error or caught
    assert error is not None
    raise ValueError(
        f"{cfg.name} reads its text with the T5 {candidates[0]!r}, which AudioCraft does not store with the "
        f"checkpoint and which is neither in the Hub's cache nor within reach ({_first_line(error)}): run "
        f"`hf download {name}` where there is a network, put its folder at {folder / TEXT_ENCODER_FOLDER}, or "
        "name it (text_encoder=…, convert --text-encoder …)"
    ) from error


def _require_complete(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], name: str
) -> None:
    """Raise unless these are exactly the tensors that the configuration asks for.

    Raises:
        ValueError: what is missing, left over or of another shape, by AudioCraft's names.
    """
    missing = [key for key in shapes if key not in tensors]
    unexpected = [key for key in tensors if key not in shapes]
    wrong = [
        f"{names.language_model_name(key)} is {tuple(tensors[key].shape)} instead of {shapes[key]}"
        for key in shapes
        if key in tensors and tuple(tensors[key].shape) != shapes[key]
    ]
    if not missing and not unexpected and not wrong:
        return
    if any(word in key for key in unexpected for word in _MELODY):
        raise ValueError(
            f"{name} has the weights of a melody conditioner ({unexpected[0]}): only text-conditioned MusicGen is "
            "supported"
        )
    report = [
        _listed("it lacks", sorted({names.language_model_name(key) for key in missing})),
        _listed("nothing asks for", sorted(unexpected)),
        _listed("wrong shapes:", wrong),
    ]
    raise ValueError(
        f"{name} does not hold the tensors of its configuration; {'; '.join(part for part in report if part)}. Export "
        "it again"
    )


def _listed(title: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - _REPORTED} more" if len(items) > _REPORTED else ""
    return f"{title} {', '.join(items[:_REPORTED])}{more}"
