"""Arrays kept by what they were computed from, so that adding a system or a metric recomputes only what is
new.

A key is the hash of everything that decides the content: the bytes of the weights, the sampling settings,
the prompts, the seed, the encoder. The same description is written into the file and compared when it is
read, so that a file that was renamed, or made by another encoder, is refused and never used.
"""

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from transformers.utils import cached_file

from diverse_cfg.atomic import replacing
from diverse_cfg.evaluation.systems import Mixture

logger = logging.getLogger(__name__)

# What decides which clips a model folder plays: weights, architecture, and how text is read.
_MODEL_FILES = (
    "*.safetensors",
    "pytorch_model*.bin",
    "state_dict.bin",  # AudioCraft's
    "compression_state_dict.bin",
    "config.json",
    "encoder.json",
    "judge.json",
    "adapter_config.json",
    "modules.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "spiece.model",
)


def digest(value: Any) -> str:
    """Hash of plain values (dicts, lists, strings, numbers), independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_digest(source: str | os.PathLike) -> str:
    """Hash of a model's or encoder's content: its files for a folder, the commit for a Hub id.

    An adapter's hash contains that of its base.

    Raises:
        FileNotFoundError: neither a folder nor in the Hub's cache.
        ValueError: a folder without a model file.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or os.fspath(source).startswith((".", "~")) or len(folder.parts) > 2:
            raise FileNotFoundError(f"there is no folder {source}")
        return _hub_digest(os.fspath(source))
    files = sorted(
        {path for pattern in _MODEL_FILES for path in folder.rglob(pattern) if _belongs(path, folder)}
    )
    if not files:
        raise ValueError(f"{folder} holds no model: no weights and no configuration")
    parts = {str(path.relative_to(folder)): file_digest(path) for path in files}
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        parts["base"] = content_digest(base) if base else "none"
    return digest(parts)


def file_digest(path: Path) -> str:
    """Hash of a file's bytes; a file that has not changed is read once."""
    status = path.stat()
    return _file_digest(path, status.st_size, status.st_mtime_ns)


def mixture_digest(mixture: Mixture) -> str:
    """Hash of a model, or of a merge by its experts and weights (nothing has to be merged to know it)."""
    parts = [[content_digest(checkpoint), weight] for checkpoint, weight in mixture if weight]
    # A merge that gives one expert everything is that expert, to the bit.
    return parts[0][0] if len(parts) == 1 and parts[0][1] == 1 else digest(parts)


class Cache:
    """A folder of safetensors files, each named after the hash of its description.

    Args:
        folder: created when first written to.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def path(self, kind: str, description: Mapping[str, Any]) -> Path:
        """Where arrays of this kind and description are kept."""
        return self.folder / kind / f"{digest(description)}.safetensors"

    def load(self, kind: str, description: Mapping[str, Any]) -> dict[str, np.ndarray] | None:
        """Arrays of this description; None if they are not there, or the file is damaged.

        Raises:
            ValueError: the file holds something else than its name says.
        """
        path = self.path(kind, description)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="numpy") as file:
                stored = json.loads((file.metadata() or {}).get("description", "null"))
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        except (SafetensorError, json.JSONDecodeError) as error:
            logger.warning("%s is damaged (%s) and is made again", path, error)
            return None
        if stored != json.loads(json.dumps(description)):
            raise ValueError(
                f"{path} was made from {_difference(stored, description)}: it does not belong here; delete it"
            )
        return arrays

    def save(self, kind: str, description: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Write arrays; a reader finds all of them or none."""
        path = self.path(kind, description)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        text = json.dumps(description, ensure_ascii=False)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"description": text})


def _difference(stored: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(stored, dict):
        return "an unknown source"
    names = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
    return "other settings (" + ", ".join(f"{name}={str(stored.get(name))[:40]!r}" for name in names) + ")"


def _belongs(path: Path, folder: Path) -> bool:
    """Checkpoints of a training run below a model folder are other models."""
    return not any(part.startswith("checkpoint-") for part in path.relative_to(folder).parts[:-1])


@lru_cache(maxsize=1024)
def _file_digest(path: Path, size: int, modified: int) -> str:
    """Size and time of change are arguments so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _hub_digest(source: str) -> str:
    for name in ("config.json", "adapter_config.json", "modules.json", "state_dict.bin"):
        path = cached_file(
            source,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=not hub_constants.HF_HUB_OFFLINE,
        )
        if path is not None:
            return digest([source, Path(path).parent.name])  # …/snapshots/<commit>/config.json
    raise FileNotFoundError(f"{source!r} is neither a folder nor a model of the Hub or its cache")
