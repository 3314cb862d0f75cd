"""The merge weight and γ as knobs: experts loaded once, the model between them changed in place.

Setting the weight writes the same tensors that `merge_checkpoints` would write, computed by the same code,
into one plain MusicGen: nothing is reloaded, generation costs what a merged model costs (no adapter
branches in the forward pass), and everything that takes a model takes this one.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from diverse_cfg.merging.experts import Experts, open_experts
from diverse_cfg.merging.weights import resolve_weights
from diverse_cfg.policies.loading import load_policy, torch_device
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.policies.tensors import require_float


class MergeSlider:
    """A model whose merge weight can be set at run time; made by `load_slider`.

    Attributes:
        model: a plain model, without guidance where an expert was distilled; its weights follow `set_merge_weight`
            and `set_guidance`.
        merge_weight: the current weights, one per expert.
        student_guidance: the current γ, of experts that were trained for a range of them; None plays what they play
            where they are told none.
    """

    def __init__(self, model: Any, experts: Experts) -> None:
        self.model = model
        self._experts = experts
        self._names = [name for name in experts.names if experts.changes(name)]
        for checkpoint in {id(c): c for c in (experts.reference, *experts.checkpoints)}.values():
            checkpoint.keep(self._names, model.device)
            _ = checkpoint.shift  # read once too
        self.merge_weight: list[float] = []
        self.student_guidance: float | None = None

    @property
    def names(self) -> list[str]:
        """The experts, in the order of their weights; two of one name have their folder's before it."""
        names = [checkpoint.name for checkpoint in self._experts.checkpoints]
        return [
            "/".join(checkpoint.folder.resolve().parts[-2:]) if names.count(name) > 1 else name
            for name, checkpoint in zip(names, self._experts.checkpoints, strict=True)
        ]

    @property
    def guidance_range(self) -> tuple[float, float] | None:
        """Lowest and highest γ that `set_guidance` takes; None where every expert was trained for one."""
        return self._experts.guidance_range

    def set_merge_weight(
        self,
        weight: float | Sequence[float] | Mapping[str, float],
        *,
        extrapolate: bool = False,
        unnormalized: bool = False,
    ) -> None:
        """Move the model between its experts, in place.

        Args:
            weight: a number is the weight λ of the second of two experts, a list one weight each; or weights by
                name, 0 for who is not named.
            extrapolate: allow weights outside [0, 1].
            unnormalized: allow weights that do not sum to 1.

        Raises:
            ValueError: weights that were not asked for; the model is left as it was.
        """
        if isinstance(weight, Mapping):
            if unknown := [name for name in weight if name not in self.names]:
                raise ValueError(f"there is no expert {unknown[0]!r}; known: {', '.join(self.names)}")
            weight = [weight.get(name, 0.0) for name in self.names]
        weights = resolve_weights(
            weight, len(self._experts.checkpoints), extrapolate=extrapolate, unnormalized=unnormalized
        )
        self._experts.require_base(weights)
        if weights != self.merge_weight:
            self._write(weights, self._names)

    def set_guidance(self, guidance_scale: float | None) -> None:
        """Tell the experts γ, in place: one bias of the model is written.

        Args:
            guidance_scale: γ; None for what they play where they are told none.

        Raises:
            ValueError: it is outside of the range, or no expert was trained for one; the model is left as it was.
        """
        if guidance_scale is not None:
            self._experts.require_guidance(guidance_scale)
        if guidance_scale != self.student_guidance:
            self.student_guidance = guidance_scale
            self._write(
                self.merge_weight,
                [name for name in self._names if name == self._experts.family.guidance_bias],
            )

    @torch.no_grad()
    def _write(self, weights: list[float], names: list[str]) -> None:
        self.merge_weight = []  # unknown, should the loop be interrupted half-way
        state = self.model.state_dict()  # asked for anew: the model may have been moved
        for name in names:
            target = state[name]
            target.copy_(self._experts.interpolate(name, weights, target.dtype, self.student_guidance))
        self.merge_weight = weights


def load_slider(
    base: str | os.PathLike | None,
    adapters: Sequence[str | os.PathLike],
    *,
    merge_weight: float | Sequence[float] | None = None,
    student_guidance: float | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MergeSlider:
    """Load a base and its experts once, ready to move between them.

    Args:
        base: folder or Hub id of the base; None to take the one that the adapters name.
        adapters: LoRA adapters of the base; full checkpoints of the same architecture work too, at the
            memory of one checkpoint each.
        merge_weight: initial weights, by default the uniform average.
        student_guidance: initial γ, of experts that were trained for a range of them.
        torch_dtype: precision of the model.
        device: where the model and the experts live.

    Returns:
        A slider; `slider.model` generates with `slider.set_merge_weight(0.3)` and `slider.set_guidance(2.5)` in force.
    """
    if len(adapters) < 2:
        raise ValueError(f"a slider moves between at least two experts, got {len(adapters)}")
    resolved = resolve_weights(merge_weight, len(adapters))
    require_float("torch_dtype", torch_dtype)
    torch_device(str(device))
    experts = open_experts(adapters, base=base)
    if student_guidance is not None:
        experts.require_guidance(student_guidance)
    model = load_policy(experts.reference.folder, torch_dtype=torch_dtype).to(device)
    sampling = next((c.provenance.sampling for c in experts.checkpoints if c.provenance is not None), None)
    model.is_distilled = experts.distilled  # as the loader says of one checkpoint
    like = model.generation_config if experts.distilled else experts.settings
    model.generation_config = experts.family.playing_config(
        model.config, sampling, like, experts.guidance_scale
    )
    as_policy(model).set_shift(None)  # of one expert
    slider = MergeSlider(model, experts)
    slider.set_merge_weight(resolved)
    slider.set_guidance(student_guidance)
    return slider
