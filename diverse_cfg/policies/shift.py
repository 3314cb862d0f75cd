"""A student that is told γ: a learned shift of its text condition, a function of γ that folds into a bias.

    text = W·h + b + s(γ),   s(γ) = f(γ) − f(γ₀),   f linear between the knots of a table

(On Distillation of Guided Diffusion Models, arXiv 2210.03142, tells a network γ; here what it is told is a
constant of the layer, so that a model for one γ is an ordinary checkpoint with the bias b + s(γ).) A player that
knows nothing of it plays γ₀, since s(γ₀) = 0. Masked tokens get no shift: the condition is zero there, and the null
prompt, which is masked throughout, stays what it is.

The table lies beside the weights, in a file of its own, and is no part of a model's `state_dict`: what other
programs save and load is a plain model.
"""

import os
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diverse_cfg.atomic import replacing
from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.provenance import read_provenance
from diverse_cfg.reading import reading

SHIFT_FILE = "guidance_shift.safetensors"
SHIFT = "guidance_shift"
"""Name of the module in a model that has one."""

_GAIN = 16.0
"""What the stored table is divided by while it is trained: a vector moves the output less than a matrix at the same
step size. A power of two, so that nothing is rounded."""


class GuidanceShift(nn.Module):
    """s(γ).

    Args:
        guidance: the range of γ, whose knots are those of the table.
        width: D.
    """

    def __init__(self, guidance: GuidanceRange, width: int) -> None:
        super().__init__()
        self.guidance = guidance
        self.table = nn.Parameter(torch.zeros(len(guidance.knots), width))

    @classmethod
    @torch.no_grad()
    def of(cls, guidance: GuidanceRange, table: Tensor) -> Self:
        """With a table [M, D] of shifts at the knots, up to a constant."""
        shift = cls(guidance, table.shape[1]).to(table.dtype)
        shift.table.copy_(table / _GAIN)
        return shift

    def rows(self) -> Tensor:
        """The shift at every knot [M, D]; gradients flow."""
        table = self.table * _GAIN
        return table - table[self.guidance.knots.index(self.guidance.reference)]

    def forward(self, guidance: Tensor) -> Tensor:
        """Shift [B, D] of γ [B]."""
        return interpolate(self.rows(), self.guidance.knots, guidance)

    def at(self, guidance_scale: float) -> Tensor:
        """Shift [D] of one γ.

        Raises:
            ValueError: it is outside of the range.
        """
        scale = self.guidance.require(guidance_scale)
        return self(torch.tensor([scale], device=self.table.device))[0]

    # ---- no part of a plain model ------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        pass

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        pass

    # ---- files -------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike) -> None:
        """Write the table beside a model's weights."""
        tensors = {
            "table": (self.table.detach() * _GAIN).cpu().contiguous(),
            "knots": torch.tensor(self.guidance.knots, dtype=torch.float64),
        }
        metadata = {"listed": str(self.guidance.listed).lower()}
        with replacing(Path(folder) / SHIFT_FILE) as temporary:
            save_file(tensors, temporary, metadata=metadata)

    @torch.no_grad()
    def load(self, folder: str | os.PathLike) -> None:
        """Take the table of a folder, which must be one of the same knots.

        Raises:
            ValueError: there is none, or it is of another range.
        """
        found = read_shift(folder)
        if found is None:
            raise ValueError(f"{folder} has no {SHIFT_FILE}: it was trained for one γ; copy the file into it")
        if found.guidance != self.guidance or found.table.shape != self.table.shape:
            raise ValueError(
                f"{Path(folder) / SHIFT_FILE} is of γ {_listed(found.guidance)}, this model of {_listed(self.guidance)}"
            )
        self.table.copy_(found.table)


def interpolate(rows: Tensor, knots: tuple[float, ...], guidance: Tensor) -> Tensor:
    """Linear interpolation of rows [M, D] at rising knots [M], at γ [B]; [B, D]."""
    ends = torch.tensor(knots, dtype=guidance.dtype, device=guidance.device)
    left = torch.bucketize(guidance.contiguous(), ends[1:-1], right=True)
    share = (guidance - ends[left]) / (ends[left + 1] - ends[left])
    return rows[left].lerp(rows[left + 1], share[:, None].to(rows.dtype))


def read_shift(folder: str | os.PathLike) -> GuidanceShift | None:
    """The table of a model folder; None where its weights are for one γ.

    Raises:
        ValueError: the file is damaged, or `diverse_cfg.json` tells of one that is not there.
    """
    path = Path(folder) / SHIFT_FILE
    if not path.is_file():
        provenance = read_provenance(folder)
        if provenance is not None and provenance.guidance_range:
            low, high = provenance.guidance_range
            raise FileNotFoundError(
                f"{folder} is a student that is told γ from {low:g} to {high:g}, but has no {SHIFT_FILE}: copy or "
                "download it again"
            )
        return None
    with reading(path), safe_open(path, framework="pt") as file:
        knots, table = file.get_tensor("knots"), file.get_tensor("table")
        listed = (file.metadata() or {}).get("listed") == "true"
        guidance = GuidanceRange(GuidanceRange.of(knots.tolist()).knots, listed)
        if table.ndim != 2 or len(table) != len(guidance.knots) or not table.isfinite().all():
            raise ValueError(f"it holds no finite table with a row for each of {len(guidance.knots)} knots")
    return GuidanceShift.of(guidance, table)


def _listed(guidance: GuidanceRange) -> str:
    return ", ".join(f"{knot:g}" for knot in guidance.knots)
