"""The seam: an AudioCraft checkpoint wherever a transformers folder is expected.

Merging, inspecting, publishing and the evaluation's cache work on files. So an AudioCraft checkpoint that is
named as a model is converted once into a transformers folder in a cache, and everything above sees that
folder. The cache holds one folder per checkpoint, which is made anew when the checkpoint's files change.
"""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

from huggingface_hub import constants as hub_constants
from huggingface_hub.utils import WeakFileLock
from safetensors.torch import save_file
from transformers import MusicgenForConditionalGeneration, MusicgenProcessor
from transformers.utils import cached_file

from diverse_cfg import __version__
from diverse_cfg.atomic import new_folder
from diverse_cfg.policies.audiocraft.reading import (
    CODEC_FILE,
    LANGUAGE_MODEL_FILE,
    TEXT_ENCODER_FOLDER,
    Stored,
    build_model,
    read_checkpoint,
)
from diverse_cfg.policies.shift import SHIFT_FILE
from diverse_cfg.provenance import PROVENANCE_FILE

logger = logging.getLogger(__name__)

_CACHE_VARIABLE = "DIVERSE_CFG_CACHE"
"""Environment variable with the folder of converted checkpoints; by default ~/.cache/diverse-cfg."""

_STAMP = "audiocraft.json"
_OURS = ("config.json", "adapter_config.json")
_TAKEN_ALONG = (PROVENANCE_FILE, SHIFT_FILE, "README.md")


def is_audiocraft(path: str | os.PathLike) -> bool:
    """Whether a folder or Hub repository is an AudioCraft checkpoint, and not (also) a transformers model."""
    source = os.fspath(path)
    if any(find_file(source, name) for name in _OURS):
        return False
    return any(find_file(source, name) for name in (LANGUAGE_MODEL_FILE, CODEC_FILE)) or _is_training_run(
        source
    )


def load_audiocraft(
    checkpoint: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    text_encoder: str | os.PathLike | None = None,
) -> tuple[MusicgenForConditionalGeneration, MusicgenProcessor]:
    """Load an AudioCraft checkpoint as transformers' MusicGen; needs no audiocraft package.

    Args:
        checkpoint: folder or Hub id with `state_dict.bin` and `compression_state_dict.bin`, or the paths of
            the two files.
        text_encoder: folder or Hub id of the T5, where it is not found by the name that the checkpoint gives
            it. Without a network, a folder `text_encoder/` in the checkpoint does the same.

    Returns:
        Model in float32 and eval mode with AudioCraft's generation defaults (top-k 250, guidance 3, 30 s), and
        its processor.

    Raises:
        ValueError: melody, style, AudioGen, MAGNeT, a raw training checkpoint, a truncated file, a codec that
            does not fit, or no AudioCraft checkpoint at all; named, with what to do.
    """
    stored = read_audiocraft(checkpoint, text_encoder=text_encoder)
    return build_model(stored), stored.processor


def read_audiocraft(
    checkpoint: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    text_encoder: str | os.PathLike | None = None,
) -> Stored:
    """As `load_audiocraft`, with the tensors as they are stored and no model built."""
    if isinstance(checkpoint, str | os.PathLike):
        language_model, codec = checkpoint_files(os.fspath(checkpoint))
    else:
        if len(checkpoint) != 2:
            raise ValueError(f"an AudioCraft checkpoint is two files, {LANGUAGE_MODEL_FILE} and {CODEC_FILE}")
        language_model, codec = map(Path, checkpoint)
    return read_checkpoint(language_model, codec, text_encoder=text_encoder)


def checkpoint_files(source: str) -> tuple[Path, Path]:
    """The two files of a checkpoint, downloaded where it is a Hub id.

    Raises:
        ValueError: one of them is missing; the message says what was found instead.
    """
    found = [find_file(source, name) for name in (LANGUAGE_MODEL_FILE, CODEC_FILE)]
    if all(found):
        return Path(str(found[0])), Path(str(found[1]))
    if _is_training_run(source):
        raise ValueError(
            f"{source} is a training run of AudioCraft, whose checkpoint.th holds pickled objects and is never loaded "
            "here: export it with audiocraft.utils.export.export_lm and export_pretrained_compression_model, and "
            "pass the folder with the two exported files"
        )
    if not any(found):
        raise ValueError(
            f"{source} is no AudioCraft checkpoint: it has neither {LANGUAGE_MODEL_FILE} nor {CODEC_FILE} (for a "
            "Hub id, check the spelling and whether the Hub can be reached)"
        )
    if found[0]:
        raise ValueError(
            f"{source} has {LANGUAGE_MODEL_FILE} but no {CODEC_FILE}: write one with audiocraft.utils.export."
            "export_pretrained_compression_model, such as a pointer to 'facebook/encodec_32khz'"
        )
    raise ValueError(f"{source} has {CODEC_FILE} but no {LANGUAGE_MODEL_FILE}: it is a codec, not a MusicGen")


def transformers_folder(source: str | os.PathLike) -> str:
    """Where the model lies as a transformers checkpoint: `source` itself, or the conversion of an AudioCraft one.

    Raises:
        ValueError: an AudioCraft checkpoint that cannot be converted.
    """
    source = os.fspath(source)
    if not is_audiocraft(source):
        return source
    language_model, codec = checkpoint_files(source)
    stamp = _stamp(language_model, codec)
    key = blake2b(str(language_model.parent.resolve()).encode(), digest_size=8).hexdigest()
    cache = Path(os.environ.get(_CACHE_VARIABLE) or Path.home() / ".cache" / "diverse-cfg") / "audiocraft"
    folder = cache / f"{language_model.parent.resolve().name}-{key}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(folder.with_name(f".{folder.name}.lock")):
        if _read_stamp(folder) != stamp:
            logger.info("converting the AudioCraft checkpoint %s, once, into %s", source, folder)
            stored = read_checkpoint(language_model, codec)
            shutil.rmtree(folder, ignore_errors=True)
            write_transformers(stored, folder, like=language_model.parent, stamp=stamp)
    return str(folder)


def write_transformers(
    stored: Stored, folder: str | os.PathLike, *, like: Path | None = None, stamp: dict | None = None
) -> Path:
    """Write what was read as a transformers folder, in the precision in which it was stored.

    Args:
        stored: of `read_audiocraft`.
        folder: must not exist; it appears when it is complete.
        like: the checkpoint's folder, whose provenance and card are taken along.
        stamp: what the cache recognises the folder by.

    Raises:
        FileExistsError: the folder is there already.
    """
    with new_folder(folder) as temporary:
        config = stored.config
        config.architectures = ["MusicgenForConditionalGeneration"]
        config.save_pretrained(temporary)
        stored.generation.save_pretrained(temporary)
        stored.processor.save_pretrained(temporary)
        tensors = {name: tensor.contiguous() for name, tensor in stored.state.items()}
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        for name in _TAKEN_ALONG:
            if like is not None and (like / name).is_file():
                shutil.copyfile(like / name, temporary / name)
        if stamp is not None:
            (temporary / _STAMP).write_text(json.dumps(stamp), encoding="utf-8")
    return Path(folder)


def find_file(source: str, name: str) -> str | None:
    """Path of a file of a folder or Hub repository; None if it has no such file."""
    if os.path.isdir(source):
        path = Path(source) / name
        return str(path) if path.is_file() else None
    if looks_local(source):
        return None
    return cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        # Offline, a file that was never asked for looks like a connection error. Online, an unreachable Hub
        # must not pass for "this checkpoint is not distilled".
        _raise_exceptions_for_connection_errors=not hub_constants.HF_HUB_OFFLINE,
    )


def looks_local(source: str) -> bool:
    """Whether a source can only be a path: a Hub id has one slash at most."""
    return source.startswith((".", "/", "~", "\\")) or source.count("/") > 1 or os.path.exists(source)


def _is_training_run(source: str) -> bool:
    return os.path.isdir(source) and any(Path(source).glob("checkpoint*.th"))


def _stamp(language_model: Path, codec: Path) -> dict:
    """What decides the conversion's content: a checkpoint that is written again gets another one."""
    paths = [language_model, codec, language_model.with_name("generation_config.json")]
    paths += sorted((language_model.parent / TEXT_ENCODER_FOLDER).glob("*"))
    files = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths if path.is_file()]
    return {"written_by": __version__, "files": files}


def _read_stamp(folder: Path) -> dict | None:
    try:
        return json.loads((folder / _STAMP).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError):
        return None
