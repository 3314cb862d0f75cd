"""A checkpoint as merging sees it: named tensors, and how far each lies from a reference.

A full model answers with its tensors, a LoRA adapter with the products B·A of the layers that it touches.
Both are opened, and refused if they cannot be merged exactly, before anything is written.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import MusicgenConfig

from diverse_cfg.functional import interpolation
from diverse_cfg.merging.tensors import TensorInfo, find_tensors, read_tensor
from diverse_cfg.musicgen import layout
from diverse_cfg.musicgen.audiocraft.folders import transformers_folder
from diverse_cfg.provenance import Provenance, read_provenance

_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.model", "*.txt"]
_ADAPTER_PREFIX = "base_model.model."
# LoRA variants whose difference from the base is not scaling · B·A, or whose base is not the one they name.
_UNSUPPORTED = (
    "use_rslora",
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
)
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class Checkpoint:
    """What full models and adapters have in common: a folder, its provenance, tensors that can be kept."""

    kind: str

    def __init__(self, source: str | os.PathLike, folder: Path) -> None:
        self.source = os.fspath(source)
        self.folder = folder
        self.provenance: Provenance | None = read_provenance(folder)
        self._kept: dict[TensorInfo, Tensor] = {}

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
                if not torch.isfinite(tensor).all():
                    raise ValueError(
                        f"{self.source} has NaN or infinite values in {name}: its training broke"
                    )
                self._kept[info] = tensor.to(device)

    def _read(self, info: TensorInfo) -> Tensor:
        kept = self._kept.get(info)
        return read_tensor(info) if kept is None else kept

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

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The widest type in which the files hold what belongs to this tensor; None without any."""
        dtypes = [info.dtype for info in self._sources(name)]
        return max(dtypes, key=lambda dtype: dtype.itemsize) if dtypes else None


class FullCheckpoint(Checkpoint):
    """A `MusicgenForConditionalGeneration` folder: student, merge or base."""

    kind = "full"

    def __init__(self, source: str | os.PathLike, folder: Path) -> None:
        super().__init__(source, folder)
        self.config: MusicgenConfig = layout.load_config(folder)
        shapes, self.aliases = layout.expected_tensors(self.config)
        self.tensors = self._match(find_tensors(folder, "model"), shapes)

    def _match(
        self, found: dict[str, TensorInfo], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, TensorInfo]:
        tensors: dict[str, TensorInfo] = {}
        for stored_name, info in found.items():
            name = layout.canonical_name(stored_name, self.aliases)
            if name is None:
                continue
            if name not in shapes:
                raise ValueError(f"{self.source}: tensor {stored_name} is not part of a MusicGen model")
            if info.shape != shapes[name]:
                raise ValueError(
                    f"{self.source}: tensor {stored_name} has shape {info.shape}, but its config.json asks "
                    f"for {shapes[name]}"
                )
            tensors[name] = info
        if missing := [name for name in shapes if name not in tensors]:
            raise ValueError(
                f"{self.source} lacks {len(missing)} tensor(s) of its model, e.g. {missing[0]}: it is "
                "incomplete"
            )
        return {name: tensors[name] for name in shapes}

    def _sources(self, name: str) -> list[TensorInfo]:
        return [self.tensors[name]]

    def changes(self, name: str) -> bool:
        return True

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        tensor = self._read(self.tensors[name])
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def difference(self, name: str, reference: Tensor) -> Tensor | None:
        tensor = self._read(self.tensors[name])
        if self._kept or tensor.dtype != reference.dtype:
            return tensor.to(reference) - reference
        # Nobody else holds what was just read, and making a new tensor costs more than the subtraction.
        return tensor.sub_(reference)


class AdapterCheckpoint(Checkpoint):
    """A LoRA adapter folder together with the base that it belongs to."""

    kind = "adapter"

    def __init__(self, source: str | os.PathLike, folder: Path, base: FullCheckpoint) -> None:
        super().__init__(source, folder)
        self.base = base
        self.lora = _lora_config(self.source, folder)
        self.factors: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        self.replaced: dict[str, TensorInfo] = {}
        self._embeddings: set[str] = set()  # PEFT names and transposes their factors differently
        self._collect(find_tensors(folder, "adapter_model"))
        self._check()

    def _collect(self, found: dict[str, TensorInfo]) -> None:
        halves: dict[str, dict[str, TensorInfo]] = {}
        for stored_name, info in found.items():
            path = stored_name.removeprefix(_ADAPTER_PREFIX)
            for half, ending in (
                ("A", ".lora_A.weight"),
                ("B", ".lora_B.weight"),
                ("A", ".lora_embedding_A"),
                ("B", ".lora_embedding_B"),
            ):
                if path.endswith(ending):
                    halves.setdefault(path.removesuffix(ending) + ".weight", {})[half] = info
                    break
            else:  # a module of `modules_to_save`, or a trained bias
                name = layout.canonical_name(path, self.base.aliases)
                if name not in self.base.tensors:
                    raise ValueError(
                        f"{self.source}: {stored_name} matches no tensor of its base {self.base.source}"
                    )
                self.replaced[name] = info
        for path, pair in halves.items():
            name = layout.canonical_name(path, self.base.aliases)
            if len(pair) != 2:
                raise ValueError(
                    f"{self.source} holds only half of the LoRA factors of {path}: it is incomplete"
                )
            if name not in self.base.tensors:
                raise ValueError(
                    f"{self.source} adapts {path}, which its base {self.base.source} does not have: it was "
                    "trained on another model"
                )
            self.factors[name] = (pair["A"], pair["B"])
            if f"{_ADAPTER_PREFIX}{self._module(path)}.lora_embedding_A" in found:
                self._embeddings.add(name)

    def _check(self) -> None:
        if not self.factors and not self.replaced:
            raise ValueError(f"{self.source} holds no LoRA weights: adapter_model.safetensors is empty")
        for name, (lora_a, lora_b) in self.factors.items():
            shape, rank = self.base.tensors[name].shape, self.rank(name)
            product = (lora_b.shape[0], lora_a.shape[-1])
            if name in self._embeddings:
                product = product[::-1]
            if product != shape or lora_a.shape[0] != rank or lora_b.shape[1] != rank:
                raise ValueError(
                    f"{self.source}: the LoRA factors {lora_b.shape} · {lora_a.shape} of {name} (rank "
                    f"{rank}) do not fit its base's {shape}: it was trained on another model"
                )
        for name, info in self.replaced.items():
            if info.shape != (shape := self.base.tensors[name].shape):
                raise ValueError(f"{self.source}: {name} has shape {info.shape}, but {shape} in its base")
        wanted = {
            name
            for name, info in self.base.tensors.items()
            if name.endswith(".weight")
            and len(info.shape) == 2
            and check_target_module_exists(self.lora, name.removesuffix(".weight"))
        }
        if missing := sorted(wanted - set(self.factors) - set(self.replaced)):
            raise ValueError(
                f"{self.source} lacks the LoRA factors of {len(missing)} of its target modules, e.g. "
                f"{missing[0]}: it is incomplete"
            )

    def _module(self, name: str) -> str:
        return name.removesuffix(".weight")

    def rank(self, name: str) -> int:
        """r of one adapted layer."""
        pattern = self.lora.rank_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), self._module(name)), self.lora.r)

    def scaling(self, name: str) -> float:
        """α / r of one adapted layer."""
        pattern = self.lora.alpha_pattern or {}
        alpha = pattern.get(get_pattern_key(list(pattern), self._module(name)), self.lora.lora_alpha)
        return alpha / self.rank(name)

    def lora_factors(self, name: str, dtype: torch.dtype) -> interpolation.LoraFactors:
        """A [r, in], B [out, r] and scaling of one adapted layer (for an embedding, of its transpose)."""
        lora_a, lora_b = (self._read(info).to(dtype) for info in self.factors[name])
        return interpolation.LoraFactors(lora_a, lora_b, self.scaling(name))

    def factor_key(self, name: str, half: str) -> str:
        """PEFT's name for one half ("A" or "B") of the factors of a layer."""
        kind = f"lora_embedding_{half}" if name in self._embeddings else f"lora_{half}.weight"
        return f"{_ADAPTER_PREFIX}{self._module(name)}.{kind}"

    def _sources(self, name: str) -> list[TensorInfo]:
        if name in self.factors:
            return list(self.factors[name])
        return [self.replaced[name]] if name in self.replaced else []

    def changes(self, name: str) -> bool:
        return name in self.factors or name in self.replaced

    def _product(self, name: str, dtype: torch.dtype) -> Tensor:
        delta = interpolation.lora_delta(*self.lora_factors(name, dtype))
        return delta.T if name in self._embeddings else delta

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """PEFT's `merge_and_unload` on a base loaded in `dtype`, to the bit."""
        if name in self.replaced:
            return self._read(self.replaced[name]).to(dtype)
        tensor = self.base.tensor(name, dtype)
        if name not in self.factors:
            return tensor
        delta = self._product(name, torch.promote_types(dtype, torch.float32))
        # PEFT rounds an embedding's product before adding it, a projection's sum only once.
        return tensor.clone().add_(delta.to(dtype) if name in self._embeddings else delta)

    def difference(self, name: str, reference: Tensor) -> Tensor | None:
        if name in self.replaced:
            return self._read(self.replaced[name]).to(reference) - reference
        if name in self.factors:
            return self._product(name, reference.dtype)
        return None


def open_checkpoint(
    source: str | os.PathLike, *, base: FullCheckpoint | None = None
) -> FullCheckpoint | AdapterCheckpoint:
    """Open a model or an adapter: a folder, or a Hub id (downloaded or taken from the cache).

    Args:
        source: folder or id.
        base: for an adapter, the base to use instead of the one that it names.

    Raises:
        ValueError, FileNotFoundError: what it is and why it cannot be merged.
    """
    folder = locate(source)
    if not (folder / "adapter_config.json").is_file():
        return FullCheckpoint(source, folder)
    return AdapterCheckpoint(source, folder, base or open_base(source, folder))


def open_base(source: str | os.PathLike, folder: Path) -> FullCheckpoint:
    """The base that an adapter names in its configuration."""
    named = base_name(source, folder)
    if named is None:
        raise ValueError(
            f"the adapter {source} does not name its base (base_model_name_or_path is empty): pass base=…"
        )
    return FullCheckpoint(named, locate(named, near=folder))


def base_name(source: str | os.PathLike, folder: Path) -> str | None:
    """`base_model_name_or_path` of an adapter."""
    return _lora_config(source, folder).base_model_name_or_path or None


def same_base(first: str, second: str) -> bool:
    """Whether two names mean one base: equal ids, or paths to one folder."""
    return first.rstrip("/") == second.rstrip("/") or os.path.realpath(first) == os.path.realpath(second)


def locate(source: str | os.PathLike, near: Path | None = None) -> Path:
    """Local folder of a path or Hub id; relative paths are also tried `near` a folder (an adapter's own).

    An AudioCraft checkpoint is answered with its conversion.

    Raises:
        FileNotFoundError: neither a folder nor an id that can be fetched.
    """
    for candidate in (Path(source), *([near / source, near.parent / source] if near else [])):
        if candidate.is_dir():
            return Path(transformers_folder(candidate))
        if candidate.is_file():
            raise ValueError(f"{source} is a file: pass the model's folder")
    if os.fspath(source) == "nano":
        raise FileNotFoundError("there is no folder nano; in Python use diverse_cfg.nano_path()")
    try:
        folder = Path(snapshot_download(os.fspath(source), allow_patterns=_FILES))
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
        converted = transformers_folder(source)
        return folder if converted == os.fspath(source) else Path(converted)
    except HFValidationError:
        raise FileNotFoundError(
            f"{source} is neither an existing folder nor a Hub id like 'user/model'"
        ) from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise FileNotFoundError(
            f"{source} is not an existing folder, and fetching it from the Hub failed: {type(error).__name__}"
        ) from error


def inexact_options(config: LoraConfig) -> list[str]:
    """Options of an adapter whose effect is not `scaling · B·A` on the very base that it names."""
    used = [f"{name}={value!r}" for name in _UNSUPPORTED if (value := getattr(config, name, None))]
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        used.append(f"init_lora_weights={init!r}")
    return used


def _lora_config(source: str | os.PathLike, folder: Path) -> LoraConfig:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{source} is a {config.peft_type} adapter; only plain LoRA adapters can be merged")
    if used := inexact_options(config):
        raise ValueError(
            f"{source} uses {', '.join(used)}: its difference from the base is not a plain LoRA product, so "
            "mixing it would be silently wrong. Load it with PEFT, call merge_and_unload(), save the full "
            "model, and merge that"
        )
    return config
