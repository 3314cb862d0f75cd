"""A LoRA run that continues a LoRA student: what is saved is one adapter on the student's own base.

    θ = θ_base + s₁·B₁A₁ + s·BA,   saved as   s · [(s₁/s)·B₁  B] · [A₁; A]

The run trains B and A on the weights of its start, into which B₁A₁ is folded; an adapter with B and A alone
would be one of a model that no folder holds. So every folder that the run writes, checkpoints too, has both
side by side, at the exact sum of their ranks: `load_policy`, PEFT, merging and publishing read it like any
adapter of the base. B and A are stored to the bit, so that a checkpoint resumes exactly.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from diverse_cfg.atomic import replacing
from diverse_cfg.merging.adapter import write_adapter
from diverse_cfg.merging.experts import Experts
from diverse_cfg.policies.audiocraft.folders import find_file
from diverse_cfg.policies.checkpoints import AdapterCheckpoint, open_checkpoint

_FILES = ("adapter_model.safetensors", "adapter_config.json")


def is_adapter(source: Any) -> bool:
    """Whether this is the folder or id of an adapter."""
    return isinstance(source, str | os.PathLike) and (
        find_file(os.fspath(source), "adapter_config.json") is not None
    )


class AdapterStart:
    """The adapter that a LoRA run starts from; it is read once, since its folder may go while the run lasts.

    Args:
        source: its folder or Hub id.
        peft_config: of the run.

    Raises:
        ValueError: the two cannot be one adapter.
    """

    def __init__(self, source: str | os.PathLike, peft_config: LoraConfig):
        remedy = (
            "train all weights (without peft_config, --use_peft false), or save the student whole, with "
            f"load_policy({os.fspath(source)!r}).save_pretrained(…), and continue from that folder"
        )
        try:
            checkpoint = open_checkpoint(source)
        except ValueError as error:
            raise ValueError(f"a LoRA run cannot continue this adapter: {error}; or {remedy}") from error
        assert isinstance(checkpoint, AdapterCheckpoint)
        whole = next(iter(checkpoint.replaced), None) or next(iter(peft_config.modules_to_save or ()), None)
        if whole is not None:
            raise ValueError(
                f"a LoRA run continues the LoRA student {checkpoint.source}, but {whole} is trained whole "
                f"(modules_to_save or bias), which no sum of LoRA factors can hold: {remedy}"
            )
        checkpoint.keep(checkpoint.factors, "cpu")
        self.checkpoint = checkpoint

    @property
    def base_model(self) -> str | None:
        """What the saved adapter belongs to."""
        return self.checkpoint.lora.base_model_name_or_path

    def write(self, own: Path, folder: Path) -> None:
        """Write the adapter that holds both.

        Args:
            own: folder with the run's own factors, as PEFT saves them.
            folder: an existing folder, which gets the two files of an adapter.
        """
        trained = AdapterCheckpoint(own, own, self.checkpoint.base)
        both = own / "both"
        both.mkdir()
        experts = Experts([self.checkpoint, trained], self.checkpoint.base)
        write_adapter(experts, [1, 1], both, torch.float32, like=trained)
        for name in _FILES:
            with replacing(folder / name) as temporary:
                shutil.copyfile(both / name, temporary)

    def attach(self, model: PeftModel) -> None:
        """Let `model.load_adapter`, by which transformers resumes and takes the best checkpoint, find the
        run's own factors in a folder that holds both."""

        def load_adapter(folder: str, adapter_name: str = "default", **_: Any) -> None:
            set_peft_model_state_dict(model, self._own_factors(folder, model, adapter_name), adapter_name)

        # What PEFT's own `save_pretrained` writes is an adapter of the student.
        source = self.checkpoint.source
        source = os.path.abspath(source) if os.path.isdir(source) else source
        for config in model.peft_config.values():
            config.base_model_name_or_path = source
        setattr(model, "load_adapter", load_adapter)  # noqa: B010 - of this instance alone

    def _own_factors(self, folder: str, model: PeftModel, adapter_name: str) -> dict[str, torch.Tensor]:
        path = Path(folder) / _FILES[0]
        saved = load_file(path)
        starts = {  # B of the start is stored in this run's scaling; A tells whose it is
            self.checkpoint.factor_key(name, "A"): self.checkpoint.lora_factors(name, torch.float32).lora_a
            for name in self.checkpoint.factors
        }
        own = {}
        for key, current in get_peft_model_state_dict(
            model, adapter_name=adapter_name, save_embedding_layers=False
        ).items():
            axis = 0 if key.endswith(("lora_A.weight", "lora_embedding_A")) else 1
            rank = current.shape[axis]
            found = saved.get(key)
            if found is None or found.shape[axis] < rank:
                raise ValueError(f"{path} has no {key} of rank {rank}: resume with the same peft_config")
            before, own[key] = found.split([found.shape[axis] - rank, rank], axis)
            start = starts.get(key)
            if axis == 0 and before.numel() and (start is None or not torch.equal(before, start)):
                raise ValueError(
                    f"{path} continues another adapter than {self.checkpoint.source}: resume with the model "
                    "that the run began with"
                )
        return own
