"""The merge weight as a knob: experts loaded once, the model between them changed in place.

Setting the weight writes the same tensors that `merge_checkpoints` would write, computed by the same code,
into one plain MusicGen: nothing is reloaded, generation costs what a merged model costs (no adapter
branches in the forward pass), and everything that takes a model takes this one.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch

from diverse_cfg.merging.experts import Experts, open_experts
from diverse_cfg.merging.weights import resolve_weights
from diverse_cfg.policies.loading import load_policy


class MergeSlider:
    """A model whose merge weight can be set at run time; made by `load_slider`.

    Attributes:
        model: a plain model, without guidance; its weights follow `set_merge_weight`.
        merge_weight: the current weights, one per expert.
    """

    def __init__(self, model: Any, experts: Experts) -> None:
        self.model = model
        self._experts = experts
        self._names = [name for name in experts.names if experts.changes(name)]
        for checkpoint in {id(c): c for c in (experts.reference, *experts.checkpoints)}.values():
            checkpoint.keep(self._names, model.device)
        self.merge_weight: list[float] = []

    @property
    def names(self) -> list[str]:
        """The experts, in the order of their weights."""
        return [checkpoint.name for checkpoint in self._experts.checkpoints]

    @torch.no_grad()
    def set_merge_weight(
        self, weight: float | Sequence[float], *, extrapolate: bool = False, unnormalized: bool = False
    ) -> None:
        """Move the model between its experts, in place.

        Args:
            weight: a number is the weight λ of the second of two experts, a list one weight each.
            extrapolate: allow weights outside [0, 1].
            unnormalized: allow weights that do not sum to 1.

        Raises:
            ValueError: weights that were not asked for; the model is left as it was.
        """
        weights = resolve_weights(
            weight, len(self._experts.checkpoints), extrapolate=extrapolate, unnormalized=unnormalized
        )
        self._experts.require_base(weights)
        if weights == self.merge_weight:
            return
        self.merge_weight = []  # unknown, should the loop be interrupted half-way
        state = self.model.state_dict()  # asked for anew: the model may have been moved
        for name in self._names:
            target = state[name]
            target.copy_(self._experts.interpolate(name, weights, target.dtype))
        self.merge_weight = weights


def load_slider(
    base: str | os.PathLike | None,
    adapters: Sequence[str | os.PathLike],
    *,
    merge_weight: float | Sequence[float] | None = None,
    torch_dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> MergeSlider:
    """Load a base and its experts once, ready to move between them.

    Args:
        base: folder or Hub id of the base; None to take the one that the adapters name.
        adapters: LoRA adapters of the base; full checkpoints of the same architecture work too, at the
            memory of one checkpoint each.
        merge_weight: initial weights, by default the uniform average.
        torch_dtype: precision of the model.
        device: where the model and the experts live.

    Returns:
        A slider; `slider.model` generates with `slider.set_merge_weight(0.3)` in force.
    """
    if len(adapters) < 2:
        raise ValueError(f"a slider moves between at least two experts, got {len(adapters)}")
    resolved = resolve_weights(merge_weight, len(adapters))
    experts = open_experts(adapters, base=base)
    model = load_policy(experts.reference.folder, torch_dtype=torch_dtype).to(device)
    sampling = next((c.provenance.sampling for c in experts.checkpoints if c.provenance is not None), None)
    model.generation_config = experts.family.playing_config(model.config, sampling, model.generation_config)
    model.is_distilled = (
        bool(experts.adapters) or sampling is not None
    )  # as the loader says of one checkpoint
    slider = MergeSlider(model, experts)
    slider.set_merge_weight(resolved)
    return slider
