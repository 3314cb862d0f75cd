"""Several checkpoints that may be mixed: opened together, compared, and interpolated tensor by tensor.

    θ = θ_ref + Σ_i w_i · (θ_i − θ_ref)

which is Σ_i w_i · θ_i when the weights sum to 1, whatever the reference. Written this way, tensors that no
expert changed stay as they are to the bit, and a LoRA adapter contributes its product B·A without going
through a full model.
"""

import os
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig

from diverse_cfg.functional import interpolation
from diverse_cfg.functional.guidance import GuidanceRange
from diverse_cfg.policies.checkpoints import AdapterCheckpoint, base_name, open_base, open_checkpoint
from diverse_cfg.policies.families import tokenizer_vocabulary
from diverse_cfg.policies.shift import GuidanceShift
from diverse_cfg.policies.stored import Checkpoint, FullCheckpoint, is_adapter, locate, same_base, same_values

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class Experts:
    """Checkpoints of one architecture and the reference that their differences are taken from."""

    def __init__(
        self, checkpoints: Sequence[FullCheckpoint | AdapterCheckpoint], base: FullCheckpoint | None
    ) -> None:
        self.checkpoints = list(checkpoints)
        self.base = base
        self.reference = base or next(c for c in checkpoints if isinstance(c, FullCheckpoint))
        self.config, self.family = self.reference.config, self.reference.family
        self.adapters = [c for c in self.checkpoints if isinstance(c, AdapterCheckpoint)]

    @property
    def names(self) -> list[str]:
        """Every tensor of the merged model."""
        return list(self.reference.tensors)

    @property
    def distilled(self) -> bool:
        """Whether a teacher's guidance is in the weights of one of them."""
        return any(checkpoint.distilled for checkpoint in self.checkpoints)

    @property
    def settings(self) -> GenerationConfig | None:
        """How the first of them that says so is sampled, the reference last: its settings are for guided sampling."""
        found = (c.settings for c in self.checkpoints if c is not self.reference)
        return next((s for s in found if s is not None), self.reference.settings)

    @property
    def guidance_scale(self) -> float | None:
        """γ that what they make is played with: 1 where one of them was distilled, else the one of their settings."""
        return 1.0 if self.distilled or self.settings is None else self.settings.guidance_scale

    def default_dtype(self) -> torch.dtype:
        """The widest type that one of the experts is stored in: nothing that was trained is rounded away."""
        stored = {
            checkpoint.stored_dtype(name)
            for checkpoint in (self.reference, *self.checkpoints)
            for name in self.names
            if not name.startswith(self.family.codec_prefix)
        }
        return reduce(torch.promote_types, [d for d in stored if d is not None and d.is_floating_point])

    def output_dtype(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """The type in which a tensor of the merged model is stored when `dtype` was asked for."""
        return self.family.storage_dtype(name, self.reference.tensors[name].dtype, dtype)

    def require_base(self, weights: Sequence[float]) -> None:
        """Refuse weights whose meaning depends on a base that is not known."""
        if self.base is None and abs(sum(weights) - 1) > 1e-6:
            raise ValueError(
                f"merge weights {list(weights)} sum to {sum(weights):g}, which scales the differences from "
                "the base; full checkpoints do not name theirs: pass base=…"
            )

    def changes(self, name: str) -> bool:
        """Whether the merge weights, or γ, can make a difference to this tensor."""
        told = name == self.family.guidance_bias and any(c.shift for c in self.checkpoints)
        return told or any(c is not self.reference and c.changes(name) for c in self.checkpoints)

    def _shifts(self, weights: Sequence[float]) -> list[tuple[GuidanceShift, float]]:
        """The tables of γ that count, as the weights have it; an expert of one γ has none and pays no heed."""
        pairs = [(c.shift, w) for c, w in zip(self.checkpoints, weights, strict=True)]
        pairs += [(self.reference.shift, 1 - sum(weights))]
        return [(shift, w) for shift, w in pairs if shift is not None and abs(w) > 1e-9]

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """The γ that all experts know which can be told one; None where there are no such."""
        knots = [c.shift.guidance.knots for c in self.checkpoints if c.shift is not None]
        return (max(k[0] for k in knots), min(k[-1] for k in knots)) if knots else None

    def require_guidance(self, guidance_scale: float) -> None:
        """Refuse a γ that an expert was not trained for.

        Raises:
            ValueError: naming the range.
        """
        if self.guidance_range is None:
            raise ValueError(
                f"γ={guidance_scale} cannot be told to {', '.join(c.source for c in self.checkpoints)}: each was "
                "trained for one γ; leave it out, or train with a range, guidance_scale: {low: 1, high: 5}"
            )
        GuidanceRange(self.guidance_range).require(guidance_scale)

    def shift(self, weights: Sequence[float]) -> GuidanceShift | None:
        """The merged model's table of γ: Σ_i w_i · s_i, exact at all their knots within the common range.

        Raises:
            ValueError: the experts play different γ where they are told none, or have no γ in common.
        """
        shifts = self._shifts(weights)
        if not shifts:
            return None
        ranges = [shift.guidance for shift, _ in shifts]
        low, high = max(r.knots[0] for r in ranges), min(r.knots[-1] for r in ranges)
        if low >= high or len({r.reference for r in ranges}) > 1:
            raise ValueError(
                "the experts were trained for different ranges of γ, "
                f"{' and '.join(f'{r.knots[0]:g} to {r.knots[-1]:g}' for r in ranges)}: fold one γ into the merge "
                "(bake_guidance, --bake-guidance)"
            )
        knots = tuple(sorted({knot for r in ranges for knot in r.knots if low <= knot <= high}))
        places = torch.tensor(knots)
        rows = sum(weight * shift(places) for shift, weight in shifts)
        return GuidanceShift.of(GuidanceRange(knots, all(r.listed for r in ranges)), rows)

    def interpolate(
        self, name: str, weights: Sequence[float], dtype: torch.dtype, guidance: float | None = None
    ) -> Tensor:
        """One tensor of the merged model, accumulated in float32 (or in float64 when that is the output).

        Args:
            name: of the tensor.
            weights: one per expert.
            dtype: of the result.
            guidance: γ to fold into the model, if any.

        Raises:
            ValueError: the result is not finite; the message says whose fault it is.
        """
        terms = [(c, w) for c, w in zip(self.checkpoints, weights, strict=True) if w != 0]
        if len(terms) == 1 and terms[0][1] == 1:
            merged = terms[0][0].tensor(name, dtype)  # the parent itself, to the bit
        else:
            precise = torch.promote_types(dtype, torch.float32)
            reference = self.reference.tensor(name, precise)
            merged = reference
            differences = [(c.difference(name, reference), w) for c, w in terms if c is not self.reference]
            changed = [(difference, w) for difference, w in differences if difference is not None]
            if changed and reference.is_floating_point():
                merged = interpolation.weighted_sum(*zip(*changed, strict=True), precise).add_(reference)
            merged = merged.to(dtype)
        if guidance is not None and name == self.family.guidance_bias:
            shift = sum(w * s.at(guidance) for s, w in self._shifts(weights))
            merged = (merged.to(torch.promote_types(dtype, torch.float32)) + shift).to(dtype)
        self._require_finite(name, merged, [c for c, _ in terms])
        return merged

    def _require_finite(self, name: str, merged: Tensor, used: Sequence[Checkpoint]) -> None:
        if not merged.numel() or all(extreme.isfinite() for extreme in torch.aminmax(merged)):
            return  # both extremes are NaN where one value is
        for checkpoint in (*used, self.reference):
            if not torch.isfinite(checkpoint.tensor(name, torch.float64)).all():
                raise ValueError(
                    f"{checkpoint.source} has NaN or infinite values in {name}: its training broke"
                )
        raise ValueError(
            f"{name} overflows {merged.dtype} after merging: choose bfloat16 or float32, or smaller weights"
        )


def open_experts(sources: Sequence[str | os.PathLike], *, base: str | os.PathLike | None = None) -> Experts:
    """Open checkpoints and refuse any that cannot be mixed exactly.

    Args:
        sources: folders or Hub ids of full models, LoRA adapters, or the base itself.
        base: the base, where the adapters do not name it or name a place where it no longer is.

    Raises:
        ValueError, FileNotFoundError: which checkpoint cannot be used, and why.
    """
    common = FullCheckpoint(base, locate(base)) if base is not None else _common_base(sources)
    checkpoints = [
        # The base is an expert like any other.
        common
        if common is not None and locate(source).resolve() == common.folder.resolve()
        else open_checkpoint(source, base=common)
        for source in sources
    ]
    experts = Experts(checkpoints, common)
    for checkpoint in checkpoints:
        if isinstance(checkpoint, AdapterCheckpoint):
            for name in (*checkpoint.factors, *checkpoint.replaced):
                if name.startswith(checkpoint.family.codec_prefix):
                    raise ValueError(
                        f"{checkpoint.source} adapts the codec ({name}): codes would mean different sounds, not "
                        "supported"
                    )
            _require_same_tokenizer(experts.reference, checkpoint)
        elif checkpoint is not experts.reference:
            _require_same_model(experts.reference, checkpoint)
    return experts


def _common_base(sources: Sequence[str | os.PathLike]) -> FullCheckpoint | None:
    """The one base that all adapters among the sources name; None without adapters."""
    named: list[tuple[str, str, Path]] = []
    for source in sources:
        folder = locate(source)
        if is_adapter(folder):
            named.append((os.fspath(source), base_name(folder) or "", folder))
    for source, name, _ in named[1:]:
        if not same_base(name, named[0][1]):
            raise ValueError(
                f"{named[0][0]} was trained on the base {named[0][1]!r} and {source} on {name!r}: adapters "
                "of different bases cannot be mixed (if both names mean one model, pass base=…)"
            )
    return open_base(named[0][0], named[0][2]) if named else None


def _require_same_model(first: FullCheckpoint, second: FullCheckpoint) -> None:
    left, right = (c.family.architecture(c.config) for c in (first, second))
    for key in sorted(left.keys() | right.keys()):
        if left.get(key) != right.get(key):
            raise ValueError(
                f"{first.source} and {second.source} differ in {key} ({left.get(key)!r} and "
                f"{right.get(key)!r}): only checkpoints of one architecture can be mixed"
            )
    for name in first.tensors:
        if name.startswith(first.family.codec_prefix) and not same_values(
            first.stored(name), second.stored(name)
        ):
            raise ValueError(
                f"{first.source} and {second.source} have different codecs ({name} differs): their codes "
                "mean different sounds and cannot be mixed"
            )
    _require_same_tokenizer(first, second)


def _require_same_tokenizer(first: Checkpoint, second: Checkpoint) -> None:
    vocabularies = [tokenizer_vocabulary(c.folder) for c in (first, second)]
    if None not in vocabularies and vocabularies[0] != vocabularies[1]:
        raise ValueError(
            f"{first.source} and {second.source} have different tokenizers: they read prompts differently"
        )
