"""A stored model as files: where its folder is, and its tensors by name, all of them or none.

`checkpoints` is the entry; an adapter, which needs its base, is described there.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import Tensor
from transformers import GenerationConfig

from diverse_cfg.assets import nano_path
from diverse_cfg.policies.audiocraft.folders import find_file, transformers_folder
from diverse_cfg.policies.families import Family, family_of, load_generation_config
from diverse_cfg.policies.shift import GuidanceShift, read_shift
from diverse_cfg.policies.tensors import (
    TensorInfo,
    find_tensors,
    fingerprint,
    former_fingerprint,
    read_tensor,
    require_finite,
)
from diverse_cfg.provenance import Provenance, read_provenance
from diverse_cfg.reading import reading

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt"]


class Checkpoint:
    """What full models and adapters have in common: a folder, what it says of itself, tensors that can be kept."""

    kind: str

    def __init__(self, source: str | os.PathLike, folder: Path) -> None:
        self.source = os.fspath(folder if os.fspath(source) == "nano" else source)
        self.folder = folder
        self.provenance: Provenance | None = read_provenance(folder)
        self.generation: GenerationConfig | None = load_generation_config(folder)
        self._kept: dict[TensorInfo, Tensor] = {}

    @property
    def distilled(self) -> bool:
        """Whether a teacher's guidance is in the weights, which only a record of ours says, or its base's.

        A folder without one, such as somebody else's adapter, is guided as its generation settings ask.
        """
        return self.provenance is not None and self.provenance.distilled

    @property
    def settings(self) -> GenerationConfig | None:
        """How the folder says that it is sampled; None where it does not say."""
        return self.generation

    @cached_property
    def shift(self) -> GuidanceShift | None:
        """What it adds for a γ that it is told; None of one for a single γ."""
        return read_shift(self.folder)

    @property
    def name(self) -> str:
        """Short name for messages and recipes: the Hub id, or the folder's own name."""
        return self.folder.resolve().name if Path(self.source).exists() else self.source

    def keep(self, names: Iterable[str], device: torch.device | str) -> None:
        """Hold what `difference` and `tensor` need for these names, so that no file is read again.

        Raises:
            ValueError: values that are not finite, which would be found half-way through a later change.
        """
        for name in names:
            for info in self._sources(name):
                tensor = read_tensor(info)
                require_finite({name: tensor}, self.source)
                self._kept[info] = tensor.to(device)

    def _read(self, info: TensorInfo) -> Tensor:
        kept = self._kept.get(info)
        return read_tensor(info) if kept is None else kept

    @cached_property
    def _digest(self) -> str:
        return fingerprint(self._files, json.dumps(self._shaping, sort_keys=True, default=str))

    def fingerprint(self, like: str | None = None) -> str:
        """Of weights and architecture, by which a model that was trained again at the same place is told apart.

        Args:
            like: a record to compare with; former versions of this package looked at fewer bytes.
        """
        return former_fingerprint(self._files) if like and ":" not in like else self._digest

    @property
    def _files(self) -> Mapping[str, TensorInfo]:
        raise NotImplementedError

    @property
    def _shaping(self) -> dict[str, Any]:
        """Settings that say what the weights compute."""
        raise NotImplementedError

    def _sources(self, name: str) -> list[TensorInfo]:
        raise NotImplementedError

    def changes(self, name: str) -> bool:
        """Whether the checkpoint may differ from its base in this tensor."""
        raise NotImplementedError

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """The tensor as the model has it when it is loaded in `dtype`."""
        raise NotImplementedError

    def difference(self, name: str, reference: Tensor) -> Tensor | None:
        """This checkpoint's tensor minus `reference`, in its precision; None where that is nothing."""
        raise NotImplementedError

    def stored_values(self, name: str) -> list[Tensor]:
        """What the files hold of this tensor: itself, or the factors of its change."""
        return [self._read(info) for info in self._sources(name)]

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The widest type in which the files hold what belongs to this tensor; None without any."""
        dtypes = [info.dtype for info in self._sources(name)]
        return max(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else None


class FullCheckpoint(Checkpoint):
    """A folder with all weights of a model: student, merge or base."""

    kind = "full"

    def __init__(self, source: str | os.PathLike, folder: Path) -> None:
        super().__init__(source, folder)
        self.family: Family = family_of(folder)
        self.config: Any = self.family.load_config(folder)
        with reading(folder / "config.json"):
            shapes, self.aliases = self.family.expected_tensors(self.config)
        found: dict[str, TensorInfo] = {}
        for stored_name, info in find_tensors(folder, "model").items():
            if (name := self.family.canonical_name(stored_name, self.aliases)) is not None:
                found[name] = info
        require_exactly(
            shapes, found, f"{self.source} does not hold the tensors that its config.json asks for"
        )
        self.tensors = {name: found[name] for name in shapes}
        if any(not info.dtype.is_floating_point for info in found.values()):
            with torch.device("meta"):
                require_floats(self.family.build(self.config).state_dict(), self.tensors, self.source)

    @property
    def base(self) -> Self:
        """Itself, as an adapter has a base."""
        return self

    @property
    def _files(self) -> Mapping[str, TensorInfo]:
        return self.tensors

    @property
    def _shaping(self) -> dict[str, Any]:
        return self.family.architecture(self.config, changed=True)

    def _sources(self, name: str) -> list[TensorInfo]:
        return [self.tensors[name]]

    def changes(self, name: str) -> bool:
        return True

    def stored(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        return self._read(self.tensors[name])

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self.stored(name)
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def difference(self, name: str, reference: Tensor) -> Tensor | None:
        tensor = self._read(self.tensors[name])
        if self._kept or tensor.dtype != reference.dtype:
            return tensor.to(reference) - reference
        # Nobody else holds what was just read, and making a new tensor costs more than the subtraction.
        return tensor.sub_(reference)


def require_exactly(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo], problem: str
) -> None:
    """Raise unless these are the tensors that are wanted, all of them, in their shapes."""
    missing = [name for name in wanted if name not in found]
    unknown = [name for name in found if name not in wanted]
    wrong = [name for name in wanted if name in found and found[name].shape != wanted[name]]
    if not missing and not unknown and not wrong:
        return
    what = [f"it lacks {len(missing)} tensor(s), e.g. {missing[0]}"] if missing else []
    what += [f"{len(unknown)} tensor(s) are not part of it, e.g. {unknown[0]}"] if unknown else []
    what += [f"{name} has shape {found[name].shape} instead of {wanted[name]}" for name in wrong[:1]]
    remedy = "it is incomplete or belongs to another model; copy or save it again"
    if any(re.sub(r"_orig_mod\.|module\.|\.default(?=\.|$)", "", name) in missing for name in unknown):
        remedy = (
            "its names carry the prefix of a wrapper (torch.compile, DDP) or of an adapter; save the model inside it "
            "with save_pretrained"
        )
    raise ValueError(f"{problem}: {'; '.join(what)}: {remedy}")


def require_floats(wanted: Mapping[str, Tensor], found: Mapping[str, TensorInfo], source: str) -> None:
    """Raise where whole numbers are stored in the place of a model's weights."""
    for name, tensor in wanted.items():
        if name in found and tensor.is_floating_point() and not found[name].dtype.is_floating_point:
            kind = str(found[name].dtype).removeprefix("torch.")
            raise ValueError(
                f"{source} holds {kind} in {name}: another program quantised it, and its weights cannot be read as "
                "they are meant; use the checkpoint that it was made of, in float32, float16 or bfloat16"
            )


def same_values(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are one, perhaps stored in different precisions: they are compared in the coarser."""
    if first.shape != second.shape:
        return False
    dtype = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(first.to(dtype), second.to(first.device, dtype))


def same_base(first: str, second: str) -> bool:
    """Whether two names mean one base: equal ids, or paths to one folder."""
    return first.rstrip("/") == second.rstrip("/") or os.path.realpath(first) == os.path.realpath(second)


def is_adapter(source: str | os.PathLike) -> bool:
    """Whether a folder or Hub id holds an adapter.

    Raises:
        ValueError: and a full checkpoint too.
    """
    if find_file(os.fspath(source), "adapter_config.json") is None:
        return False
    if (Path(source) / "config.json").is_file():
        raise ValueError(
            f"{source} holds an adapter and a full checkpoint: move one of them into a folder of its own, "
            "since a merged checkpoint with its adapter on top would be adapted twice"
        )
    return True


def locate(source: str | os.PathLike, near: Path | None = None, cached: bool = False) -> Path:
    """Local folder of a path or Hub id; relative paths are also tried `near` a folder (an adapter's own).

    An AudioCraft checkpoint is answered with its conversion, `nano` with the shipped base.

    Args:
        source: folder or id.
        near: folder that a relative path may start from, or its parent.
        cached: download nothing.

    Raises:
        FileNotFoundError: neither a folder nor an id that can be fetched.
    """
    if not os.fspath(source):  # as a path it is this folder
        raise ValueError("the name of a model is empty: name a folder or a Hub id")
    for candidate in (Path(source), *([near / source, near.parent / source] if near else [])):
        if candidate.is_dir():
            with reading(candidate):
                os.stat(candidate / "..")  # needs the right to look inside
            return Path(transformers_folder(candidate))
        if candidate.is_file():
            raise ValueError(f"{source} is a file: pass the model's folder")
    if os.fspath(source) == "nano":
        return nano_path()
    try:
        folder = Path(snapshot_download(os.fspath(source), allow_patterns=_FILES, local_files_only=cached))
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
        converted = transformers_folder(source)
        return folder if converted == os.fspath(source) else Path(converted)
    except HFValidationError:
        raise FileNotFoundError(
            f"there is no folder {source}, and it is no Hub id: pass a checkpoint folder or an id such as owner/name"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"there is no folder {source}, and fetching it from the Hub failed ({type(error).__name__}): check the "
            "spelling and whether the Hub can be reached; the shipped base is called nano"
        ) from error
