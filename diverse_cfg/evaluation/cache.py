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
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import nn
from transformers.utils import cached_file

from diverse_cfg.atomic import replacing
from diverse_cfg.evaluation.systems import Mixture
from diverse_cfg.policies.families import holds_policy

logger = logging.getLogger(__name__)

# Files of a model folder that decide nothing; every other one is part of its hash, since no list of what does
# is ever complete. Names in lower case.
_DECIDES_NOTHING = (
    "*.md",
    "license*",
    "notice*",
    # How a model plays by default: who evaluates it says how.
    "generation_config.json",
    # What was written about it, by this package and its recipes.
    "diverse_cfg.json",
    "evaluation.json",
    "done.json",
    "*.yaml",
    "*.log",
    "*.csv",
    "*.html",
    "*.parquet",
    "events.out.tfevents*",
    # What training needs to go on.
    "trainer_state.json",
    "training_args.bin",
    "optimizer*",
    "scheduler*",
    "scaler*",
    "rng_state*",
    # Pictures, sound, what Python compiled.
    *("*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.pdf"),
    *("*.wav", "*.flac", "*.mp3", "*.ogg"),
    "*.pyc",
)
# How audio is read. A MusicGen reads text alone; of an encoder these files decide everything.
_AUDIO_INPUT = ("preprocessor_config.json", "processor_config.json")


def digest(value: Any) -> str:
    """Hash of plain values (dicts, lists, strings, numbers), independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def content_digest(source: str | os.PathLike) -> str:
    """Hash of a model's or encoder's content: its files for a folder, the commit for a Hub id.

    An adapter's hash contains that of its base. Hidden files, cards, logs and the state of training do not
    count.

    Raises:
        FileNotFoundError: neither a folder nor in the Hub's cache.
        ValueError: a folder without a model file.
    """
    folder = Path(source)
    if not folder.is_dir():
        if folder.is_absolute() or os.fspath(source).startswith((".", "~")) or len(folder.parts) > 2:
            raise FileNotFoundError(f"there is no folder {source}")
        return _hub_digest(os.fspath(source))
    ignored = _DECIDES_NOTHING + (_AUDIO_INPUT if holds_policy(folder) else ())
    files = sorted(path for path in folder.rglob("*") if path.is_file() and _belongs(path, folder, ignored))
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


def weights_digest(model: nn.Module) -> str:
    """Hash of a model in memory: names, types, shapes and bytes of its parameters and buffers."""
    found = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


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

    def facts(self, kind: str, description: Mapping[str, Any]) -> dict[str, Any]:
        """What was noted about arrays when they were made; empty if nothing was, or they are not there."""
        try:
            with safe_open(self.path(kind, description), framework="numpy") as file:
                return json.loads((file.metadata() or {}).get("facts", "{}"))
        except (OSError, SafetensorError, json.JSONDecodeError):
            return {}

    def save(
        self,
        kind: str,
        description: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Write arrays; a reader finds all of them or none.

        Args:
            kind: folder.
            description: everything that decides the arrays: their key.
            arrays: what is kept.
            facts: how they came to be, for readers; no part of the key.
        """
        path = self.path(kind, description)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        metadata = {"description": json.dumps(description, ensure_ascii=False)}
        if facts:
            metadata["facts"] = json.dumps(facts, ensure_ascii=False)
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=metadata)


def _difference(stored: Any, wanted: Mapping[str, Any]) -> str:
    if not isinstance(stored, dict):
        return "an unknown source"
    names = sorted(key for key in {*stored, *wanted} if stored.get(key) != wanted.get(key))
    return "other settings (" + ", ".join(f"{name}={str(stored.get(name))[:40]!r}" for name in names) + ")"


def _belongs(path: Path, folder: Path, ignored: Sequence[str]) -> bool:
    """Whether a file is part of the model; checkpoints of a training run below its folder are other models."""
    *folders, name = path.relative_to(folder).parts
    hidden = any(part.startswith(".") for part in (*folders, name))
    return not (
        hidden
        or any(part.startswith("checkpoint-") for part in folders)
        or any(fnmatchcase(name.lower(), pattern) for pattern in ignored)
    )


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
