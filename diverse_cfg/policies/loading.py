"""Load a model from whatever holds one: float32, no dropout, no double guidance.

A checkpoint that this package distilled has the guidance inside its weights, while the generation config that
an adapter inherits from its base still asks for guidance 3: applied twice, it costs twice and overshoots. So folders
whose `diverse_cfg.json` says student or merge come back with `generation_config.guidance_scale = 1.0`, adapters too.
An adapter without such a record was not distilled: it plays as its own generation_config.json says, else as its base.
`Checkpoint.distilled` and `Checkpoint.settings` are this rule.
"""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn

from diverse_cfg.policies.audiocraft.folders import find_file
from diverse_cfg.policies.audiocraft.live import from_audiocraft, is_live_audiocraft
from diverse_cfg.policies.checkpoints import (
    AdapterCheckpoint,
    locate_base,
    open_checkpoint,
    read_adapter,
    require_named_base,
)
from diverse_cfg.policies.families import (
    PROCESSOR_REMEDY,
    Family,
    family_of,
    has_processor_files,
    own_settings,
)
from diverse_cfg.policies.musicgen.family import MUSICGEN
from diverse_cfg.policies.policy import as_policy, plain
from diverse_cfg.policies.shift import read_shift
from diverse_cfg.policies.stored import is_adapter, locate
from diverse_cfg.policies.tensors import require_float
from diverse_cfg.provenance import PROVENANCE_FILE, read_provenance
from diverse_cfg.reading import reading

ModelSource = Any
"""Id or folder, a transformers or PEFT model, or a live AudioCraft model."""

# Attributes that transformers hands to functional dropout; `nn.Dropout` modules alone are not all of it.
_DROPOUT_ATTRIBUTES = ("dropout", "attention_dropout", "activation_dropout", "layerdrop")


def load_policy(
    model: ModelSource,
    *,
    adapter: str | os.PathLike | None = None,
    torch_dtype: torch.dtype = torch.float32,
) -> Any:
    """Load a policy's model, in eval mode and without any dropout.

    Args:
        model: Hub id or folder of a full checkpoint, also one of AudioCraft's; `nano`, the shipped base; id or
            folder of a PEFT adapter, whose base is read from its own configuration; or a live model, which is prepared
            in place and returned (what PEFT wrapped has no record, and is taken for a student). A live AudioCraft
            MusicGen, or a pair (LMModel, compression_model), is copied into transformers' class.
        adapter: id or folder of a PEFT adapter to merge into `model`.
        torch_dtype: of the text encoder and the decoder; the codec always stays in float32. Adapters are
            merged in float32 before the cast. Half precision on disk is upcast: a step of 1e-4 vanishes in
            bfloat16.

    Returns:
        The plain model, such as a `MusicgenForConditionalGeneration`, adapters merged. Its
        `generation_config.guidance_scale` is 1.0 when the checkpoint is distilled, and what the checkpoint says
        otherwise. A student without generation settings, such as an adapter, is sampled as its
        `diverse_cfg.json` says.

    Raises:
        ValueError: not a MusicGen, MusicGen-Melody, weights that are incomplete or damaged, special tokens that do
            not fit, or an adapter whose base is unknown or another model.
        FileNotFoundError: nothing there.
    """
    require_float("torch_dtype", torch_dtype)
    policy: Any
    folder = provenance = own = None  # of an adapter, and of the student
    if is_live_audiocraft(model) or isinstance(model, nn.Module):
        policy = from_audiocraft(model)[0] if is_live_audiocraft(model) else plain(model)
        family = family_of(policy)
        distilled = isinstance(model, PeftModel)
        if adapter is not None:
            folder = own = _check_on_live(policy, adapter)
            provenance = read_provenance(folder)
            distilled = distilled or getattr(policy, "is_distilled", False) or is_distilled(folder)
    else:
        checkpoint = open_checkpoint(model, plain=False)
        if adapter is not None:
            if isinstance(checkpoint, AdapterCheckpoint):
                raise ValueError(
                    f"{model} is an adapter itself: pass its base as the model, or leave out adapter="
                )
            checkpoint = open_checkpoint(adapter, base=checkpoint, plain=False)
            if not isinstance(checkpoint, AdapterCheckpoint):
                raise ValueError(f"{adapter} has no adapter_config.json: it is not a PEFT adapter")
        distilled = checkpoint.distilled
        # How a student is sampled: an adapter has no generation settings of its own, a folder may lack them.
        if isinstance(checkpoint, AdapterCheckpoint):
            folder, provenance = checkpoint.folder, checkpoint.provenance
            checkpoint = checkpoint.base
        elif not (checkpoint.folder / "generation_config.json").is_file():
            provenance = checkpoint.provenance
        family, own = checkpoint.family, folder or checkpoint.folder
        policy = family.load_model(checkpoint.folder, checkpoint.source)
        policy.name_or_path = policy.config._name_or_path = (
            checkpoint.source
        )  # adapters name their base by it
    if folder is not None:
        with reading(folder):
            policy = PeftModel.from_pretrained(policy, str(folder)).merge_and_unload()
    if own is not None:
        as_policy(policy).set_shift(read_shift(own))
    if distilled:
        policy.generation_config.guidance_scale = 1.0
        if provenance is not None:
            policy.generation_config = family.playing_config(
                policy.config, provenance.sampling, like=policy.generation_config
            )
        policy.is_distilled = True  # `fast_generate` warns when it is guided on top
    elif folder is not None:
        policy.generation_config = own_settings(folder, policy.generation_config)
    zero_dropout(policy)
    family.cast(policy, torch_dtype)
    return policy.eval()


def load_processor(path: str | os.PathLike) -> Any:
    """Load the processor (tokenizer, feature extractor) of a checkpoint; an adapter without one has its base's.

    Raises:
        ValueError: a part of it is missing or damaged, or it is another family's.
        FileNotFoundError: nothing there.
    """
    folder = locate(path)
    if is_adapter(folder) and not has_processor_files(folder):
        folder = locate_base(path, folder)
    family = require_processor(folder)
    config = family.load_config(folder) if (folder / "config.json").exists() else None
    return family.load_processor(folder, path, config)


def require_processor(folder: Path) -> Family:
    """Refuse a folder whose prompts would become unknown words.

    Returns:
        The family whose processor it holds: MusicGen where an adapter lies alone, which names none.

    Raises:
        ValueError: the tokenizer or the processor configuration is missing.
    """
    family = family_of(folder) if (folder / "config.json").exists() else MUSICGEN
    if missing := family.missing_processor(folder):
        raise ValueError(
            f"{folder} has no {missing}, without which it cannot read prompts: {PROCESSOR_REMEDY}"
        )
    return family


def torch_device(name: str | None) -> str:
    """A device that this machine has; without a name, a GPU if there is one.

    Raises:
        ValueError: it cannot be used.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device={name!r} cannot be used ({reason}): leave it out, or take cpu or cuda"
        ) from error
    return name


def is_distilled(source: str | os.PathLike) -> bool:
    """Whether a teacher's guidance is in the weights, without reading them; see `Checkpoint.distilled`."""
    source = os.fspath(source)
    if path := find_file(source, PROVENANCE_FILE):
        record = read_provenance(Path(path).parent)
        if record is not None and record.distilled:
            return True
    path = find_file(source, "adapter_config.json")
    if path is None:
        return False
    try:
        return is_distilled(locate_base(source, Path(path).parent))
    except (OSError, ValueError):
        return False  # its base is not here, as whoever loads it says


def zero_dropout(model: nn.Module) -> None:
    """Set every dropout and layerdrop of the model to zero, in place.

    The policy that is sampled must be the policy that is trained, also in `train()` mode, which gradient
    checkpointing needs. `disable_dropout` of other libraries misses the rates that are plain float
    attributes.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in _DROPOUT_ATTRIBUTES:
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _check_on_live(policy: Any, adapter: str | os.PathLike) -> Path:
    """Folder of an adapter that fits a model in memory."""
    folder = locate(adapter)
    if not is_adapter(folder):
        raise ValueError(f"{adapter} has no adapter_config.json: it is not a PEFT adapter")
    name = policy.config._name_or_path or "the given model"
    require_named_base(adapter, folder, name, policy.state_dict().__getitem__)
    read_adapter(adapter, folder, copy.deepcopy(policy.config), name)
    return folder
