"""Several LoRA adapters as one: their factors side by side, so that its product is the sum of their products.

    Σ_i w_i · s_i · B_i A_i = [w_1 s_1 B_1 … w_n s_n B_n] · [A_1; …; A_n]

PEFT calls it `cat`; its `linear` mixes the factors instead, which is another model (relative error near 1).
Each layer gets the sum of the ranks of the experts that adapt it, whatever their own ranks and targets are.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from diverse_cfg.atomic import replacing
from diverse_cfg.functional import interpolation
from diverse_cfg.merging.experts import Experts
from diverse_cfg.policies.checkpoints import AdapterCheckpoint, open_checkpoint
from diverse_cfg.policies.tensors import TensorSpec, write_safetensors

_FILES = ("adapter_model.safetensors", "adapter_config.json")


def write_adapter(
    experts: Experts,
    weights: Sequence[float],
    folder: Path,
    dtype: torch.dtype,
    like: AdapterCheckpoint | None = None,
) -> None:
    """Write adapter_config.json and adapter_model.safetensors of the interpolated adapter.

    Args:
        experts: adapters of one base.
        weights: one number per expert.
        folder: an existing folder without these files.
        dtype: of the factors, at least float32.
        like: an expert whose scaling its layers keep, so that its factors (with weight 1) are stored to the
            bit. By default every scaling is 1.

    Raises:
        ValueError: an expert is not an adapter (nor their base), or changes more than LoRA factors can
            express.
    """
    terms: list[tuple[AdapterCheckpoint, float]] = []
    for checkpoint, weight in zip(experts.checkpoints, weights, strict=True):
        if weight == 0 or checkpoint is experts.reference:
            continue  # the base's own difference from itself is nothing
        if not isinstance(checkpoint, AdapterCheckpoint):
            raise ValueError(
                f"{checkpoint.source} is a full model, which no adapter can hold: use format='full'"
            )
        if checkpoint.replaced:
            raise ValueError(
                f"{checkpoint.source} replaces whole tensors ({next(iter(checkpoint.replaced))}), which "
                "LoRA factors cannot express: use format='full'"
            )
        terms.append((checkpoint, weight))
    if not terms:
        raise ValueError("every adapter has weight 0, so the merge is the base itself: use format='full'")
    if dtype not in (torch.float32, torch.float64):
        dtype = torch.float32  # factors are small, and rounding them would be multiplied
    ranks = {
        name: sum(c.rank(name) for c, _ in terms if name in c.factors)
        for name in experts.names
        if any(name in c.factors for c, _ in terms)
    }
    scalings = {name: like.scaling(name) if like and name in like.factors else 1 for name in ranks}
    _write_factors(terms, ranks, scalings, folder / "adapter_model.safetensors", dtype)
    _write_config(terms, ranks, scalings, folder / "adapter_config.json")


def _write_factors(
    terms: list[tuple[AdapterCheckpoint, float]],
    ranks: dict[str, int],
    scalings: dict[str, float],
    path: Path,
    dtype: torch.dtype,
) -> None:
    specs, owners = [], {}
    for name, rank in ranks.items():
        checkpoint = next(c for c, _ in terms if name in c.factors)
        lora_a, lora_b = checkpoint.factors[name]
        for half, shape in (("A", (rank, lora_a.shape[1])), ("B", (lora_b.shape[0], rank))):
            key = checkpoint.factor_key(name, half)
            specs.append(TensorSpec(key, dtype, shape))
            owners[key] = (name, half)

    def produce(key: str) -> Tensor:
        name, half = owners[key]
        adapted = [(c, w) for c, w in terms if name in c.factors]
        factors = [c.lora_factors(name, dtype) for c, _ in adapted]
        merged = getattr(
            interpolation.concatenate_lora(factors, [w / scalings[name] for _, w in adapted]),
            f"lora_{half.lower()}",
        )
        for (checkpoint, _), factor in zip(adapted, factors, strict=True):
            if not (factor.lora_a.isfinite().all() and factor.lora_b.isfinite().all()):
                raise ValueError(
                    f"{checkpoint.source} has NaN or infinite values in {name}: its training broke"
                )
        return merged

    write_safetensors(path, specs, produce)


def _write_config(
    terms: list[tuple[AdapterCheckpoint, float]],
    ranks: dict[str, int],
    scalings: dict[str, float],
    path: Path,
) -> None:
    config = json.loads((terms[0][0].folder / "adapter_config.json").read_text(encoding="utf-8"))
    modules = {name.removesuffix(".weight"): rank for name, rank in ranks.items()}
    largest = max(modules.values())
    # α = r makes PEFT's scaling 1, where it is inside the factors. Modules are named in full, so that PEFT
    # adapts exactly those which have factors.
    alphas = {name.removesuffix(".weight"): rank * scalings[name] for name, rank in ranks.items()}
    config |= {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": {module: rank for module, rank in modules.items() if rank != largest},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != largest},
        "target_modules": sorted(modules),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
        "base_model_name_or_path": terms[0][0].lora.base_model_name_or_path,
    }
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class AdapterStart:
    """The adapter that a LoRA run starts from. What the run saves is one adapter on the student's own base:

        θ = θ_base + s₁·B₁A₁ + s·BA,   saved as   s · [(s₁/s)·B₁  B] · [A₁; A]

    The run trains B and A on the weights of its start, into which B₁A₁ is folded; an adapter with B and A alone
    would be one of a model that no folder holds. So every folder that the run writes, checkpoints too, has both
    side by side, at the exact sum of their ranks: `load_policy`, PEFT, merging and publishing read it like any
    adapter of the base. B and A are stored to the bit, so that a checkpoint resumes exactly. The start is read
    once, since its folder may go while the run lasts.

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
