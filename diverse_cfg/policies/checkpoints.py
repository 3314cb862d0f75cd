"""The one reader of checkpoints: everything that loads, merges, inspects or publishes a model opens it here.

A full model must hold exactly the tensors of its configuration, an adapter exactly those that PEFT saves for its
settings on its base, and that base must be the one that it names. What does not fit is refused by name, before a
model is built or anything is written.

Merging asks for more: how far each tensor lies from a reference. A full model answers with its tensors, a plain
LoRA adapter with the products B·A of the layers that it touches.
"""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import GenerationConfig

from diverse_cfg.functional import interpolation
from diverse_cfg.policies.audiocraft.folders import looks_local
from diverse_cfg.policies.families import family_of, own_settings
from diverse_cfg.policies.stored import (
    Checkpoint,
    FullCheckpoint,
    is_adapter,
    locate,
    require_exactly,
    require_floats,
    same_base,
    same_values,
)
from diverse_cfg.policies.tensors import TensorInfo, find_tensors, read_tensor, require_finite
from diverse_cfg.reading import read_json, reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern")
_PASS_BASE = "pass it (base=… in Python; --base, or --model with --adapter)"
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")


class AdapterCheckpoint(Checkpoint):
    """An adapter folder together with the base that it belongs to.

    Attributes:
        lora: its configuration; another kind than LoRA only with `plain=False`.
        factors, replaced: of a plain LoRA adapter, the pairs A, B and the whole tensors that it brings.
    """

    kind = "adapter"

    def __init__(
        self, source: str | os.PathLike, folder: Path, base: FullCheckpoint, *, plain: bool = True
    ) -> None:
        super().__init__(source, folder)
        self.base, self.family = base, base.family
        self.lora: Any = _plain_lora(self.source, folder) if plain else _peft_config(folder)
        self._require_unchanged_base()
        found = read_adapter(self.source, folder, base.config, base.source)
        self._found = found
        self.factors: dict[str, tuple[TensorInfo, TensorInfo]] = {}
        self.replaced: dict[str, TensorInfo] = {}
        self._embeddings: set[str] = set()  # PEFT names and transposes their factors differently
        if plain:
            self._collect(found)

    def _require_unchanged_base(self) -> None:
        """Refuse a base that was trained again in the folder that the adapter names."""
        recorded = self.provenance.training.get("base_fingerprint") if self.provenance else None
        named = self.lora.base_model_name_or_path or ""
        named_here = recorded and looks_local(named) and same_base(named, self.base.source)
        if named_here and recorded != self.base.fingerprint(recorded):
            raise ValueError(
                f"{self.source} was trained on the base {named!r}, whose weights have changed since: put the former "
                "weights and config.json back, or train the adapter again"
            )

    def _collect(self, found: dict[str, TensorInfo]) -> None:
        for stored_name, info in found.items():
            path = stored_name.removeprefix(_ADAPTER_PREFIX)
            if match := re.fullmatch(r"(.+)(\.lora_A\.weight|\.lora_embedding_A)", path):
                module, half = match.groups()
                name = self._base_name(stored_name, f"{module}.weight")
                self.factors[name] = (info, found[f"{_ADAPTER_PREFIX}{module}{half.replace('_A', '_B')}"])
                if "embedding" in half:
                    self._embeddings.add(name)
            elif not path.endswith((".lora_B.weight", ".lora_embedding_B")):
                # a module of `modules_to_save`, or a trained bias
                self.replaced[self._base_name(stored_name, path.replace(".base_layer.", "."))] = info

    def _base_name(self, stored_name: str, path: str) -> str:
        name = self.base.family.canonical_name(path, self.base.aliases)
        if name not in self.base.tensors:
            raise ValueError(
                f"{self.source}: {stored_name} matches no tensor of its base {self.base.source}: load it with PEFT, "
                "call merge_and_unload(), save the full model, and use that"
            )
        return name

    def _of_layer(self, name: str, pattern: dict[str, Any] | None, usual: float) -> Any:
        pattern = pattern or {}
        return pattern.get(get_pattern_key(list(pattern), name.removesuffix(".weight")), usual)

    def rank(self, name: str) -> int:
        """r of one adapted layer."""
        return self._of_layer(name, self.lora.rank_pattern, self.lora.r)

    def scaling(self, name: str) -> float:
        """α / r of one adapted layer."""
        return self._of_layer(name, self.lora.alpha_pattern, self.lora.lora_alpha) / self.rank(name)

    def lora_factors(self, name: str, dtype: torch.dtype) -> interpolation.LoraFactors:
        """A [r, in], B [out, r] and scaling of one adapted layer (for an embedding, of its transpose)."""
        lora_a, lora_b = (self._read(info).to(dtype) for info in self.factors[name])
        return interpolation.LoraFactors(lora_a, lora_b, self.scaling(name))

    def factor_key(self, name: str, half: str) -> str:
        """PEFT's name for one half ("A" or "B") of the factors of a layer."""
        kind = f"lora_embedding_{half}" if name in self._embeddings else f"lora_{half}.weight"
        return f"{_ADAPTER_PREFIX}{name.removesuffix('.weight')}.{kind}"

    @property
    def distilled(self) -> bool:
        return super().distilled or self.base.distilled

    @property
    def settings(self) -> GenerationConfig | None:
        if self.distilled:  # nothing of its base's
            return self.generation
        return own_settings(self.folder, self.base.generation or GenerationConfig())

    def require_finite(self) -> None:
        """Raise where one of its own tensors is NaN or infinite, before it makes its base so."""
        for name, info in self._found.items():
            require_finite({name: read_tensor(info)}, self.source)

    @property
    def _files(self) -> dict[str, TensorInfo]:
        return self._found

    @property
    def _shaping(self) -> dict[str, Any]:
        return {name: getattr(self.lora, name, None) for name in _SCALING}

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
    source: str | os.PathLike, *, base: FullCheckpoint | None = None, plain: bool = True
) -> FullCheckpoint | AdapterCheckpoint:
    """Open a model or an adapter: a folder, or a Hub id (downloaded or taken from the cache).

    Args:
        source: folder or id.
        base: for an adapter, the base to use instead of the one that it names; it must be the same model.
        plain: refuse adapters whose difference from their base is not a plain LoRA product.

    Raises:
        ValueError, FileNotFoundError: what it is and why it cannot be used.
    """
    folder = locate(source)
    if not is_adapter(folder):
        return FullCheckpoint(source, folder)
    if base is None:
        base = open_base(source, folder)
    else:
        require_named_base(source, folder, base.source, base.stored)
    return AdapterCheckpoint(source, folder, base, plain=plain)


def open_base(source: str | os.PathLike, folder: Path) -> FullCheckpoint:
    """The base that an adapter names in its configuration."""
    located = locate_base(source, folder)
    named = str(base_name(folder))
    return FullCheckpoint(named if not looks_local(named) or os.path.isdir(named) else located, located)


def locate_base(source: str | os.PathLike, folder: Path) -> Path:
    """Folder of the base that an adapter names.

    Raises:
        ValueError, FileNotFoundError: it names none, or one that is not here.
    """
    named = base_name(folder)
    if named is None:
        raise ValueError(
            f"the adapter {source} does not name its base (base_model_name_or_path is empty): {_PASS_BASE}"
        )
    try:
        located = locate(named, near=folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{source} names {named} as its base model, which is not here: {_PASS_BASE} ({error})"
        ) from error
    if is_adapter(located):
        raise ValueError(
            f"{source} names {named} as its base model, which is an adapter itself: save that one whole (merge it "
            f"alone) and {_PASS_BASE}"
        )
    return located


def base_name(folder: Path) -> str | None:
    """`base_model_name_or_path` of an adapter."""
    return _peft_config(folder).base_model_name_or_path or None


def require_named_base(
    source: str | os.PathLike, folder: Path, given: str, tensor: Callable[[str], Tensor]
) -> None:
    """Refuse another base than the one that an adapter names, unless it has the same weights.

    Warns where the named one is not here to compare with.

    Args:
        source, folder: the adapter.
        given: id or folder of the base that it shall be used with.
        tensor: its tensors by name, in the type that they are stored in.

    Raises:
        ValueError: it is another model.
    """
    named = base_name(folder)
    if named is None or same_base(named, given):
        return
    try:
        located = locate(named, near=folder, cached=True)
    except FileNotFoundError:
        warnings.warn(
            f"{source} was trained on the base {named!r}, which is not here: whether {given} has the same weights "
            "cannot be checked",
            UserWarning,
            stacklevel=3,
        )
        return
    if Path(given).is_dir() and located.resolve() == locate(given).resolve():
        return
    original = FullCheckpoint(named, located)
    try:
        changed = next(
            (name for name in original.tensors if not same_values(original.stored(name), tensor(name))), None
        )
    except KeyError as error:
        changed = str(error.args[0])
    if changed is not None:
        raise ValueError(
            f"{source} was trained on the base {named!r}, and {given} is another model ({changed} differs): use it "
            "with its own base"
        )


def read_adapter(
    source: str | os.PathLike, folder: Path, base: Any, base_source: str
) -> dict[str, TensorInfo]:
    """Tensors of an adapter, which must be exactly those that PEFT saves for its settings on its base.

    Args:
        source, folder: the adapter.
        base: configuration of the base.
        base_source: how messages name it.

    Raises:
        ValueError: tensors that are missing, left over or of another shape.
    """
    config = _peft_config(folder)
    if isinstance(config, LoraConfig):
        config.init_lora_weights = True  # nothing is computed here, and the clever ones need the weights
    config.inference_mode, config.base_model_name_or_path = True, None  # or PEFT warns of another base
    with (
        reading(folder / "adapter_config.json", f"it does not fit its base {base_source}"),
        torch.device("meta"),
    ):
        model = get_peft_model(cast("PreTrainedModel", family_of(base).build(base)), config)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    found = find_tensors(folder, "adapter_model")
    require_exactly(
        {name: tuple(tensor.shape) for name, tensor in state.items()},
        found,
        f"{source} does not fit its base {base_source}, with the settings of its adapter_config.json",
    )
    require_floats(state, found, os.fspath(source))
    return found


def _peft_config(folder: Path) -> PeftConfig:
    path = folder / "adapter_config.json"
    named = read_json(path).get("base_model_name_or_path")
    if not isinstance(named, str | None):
        raise ValueError(
            f"{path}: base_model_name_or_path={named!r} must be the base's id or folder; correct it"
        )
    with reading(path):
        return PeftConfig.from_pretrained(str(folder))


def inexact_options(config: LoraConfig) -> list[str]:
    """Options of an adapter whose effect is not `scaling · B·A` on the very base that it names."""
    used = [f"{name}={value!r}" for name in _UNSUPPORTED if (value := getattr(config, name, None))]
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_INITS):
        used.append(f"init_lora_weights={init!r}")
    return used


def _plain_lora(source: str | os.PathLike, folder: Path) -> LoraConfig:
    config = _peft_config(folder)
    if not isinstance(config, LoraConfig):
        raise ValueError(f"{source} is a {config.peft_type} adapter; only plain LoRA adapters can be merged")
    if used := inexact_options(config):
        raise ValueError(
            f"{source} uses {', '.join(used)}: its difference from the base is not a plain LoRA product, so "
            "mixing it would be silently wrong. Load it with PEFT, call merge_and_unload(), save the full "
            "model, and merge that"
        )
    return config
