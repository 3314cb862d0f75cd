"""Linear layers and embedding tables as PEFT may have changed them: their weights, adapters added."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners import lora
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn

_PEFT_LAYERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)

_ADAPTED_FORWARDS = (
    lora.Linear.forward,
    lora.Embedding.forward,
    lora.ParamWrapper.forward,
    TrainableTokensLayer.forward,
)
"""Of the layers with adapters that `effective_weight` knows."""


def effective_weight(module: Any, wide: bool = False) -> Tensor:
    """Weight of a linear layer or an embedding table plus its active LoRA adapters; gradients flow.

    Args:
        module: the layer, which is only read; it may be inside PEFT's `modules_to_save`, whose active copy
            counts, or have trainable tokens.
        wide: leave the sum in the wider dtype of weight and adapters, so that float32 adapters of a bfloat16
            base lose nothing. By default it is rounded to the base's dtype.

    Returns:
        Weight [out, in], of a table [entries, width].

    Raises:
        ValueError: see `base_layer`.
    """
    layer: Any = _layer_in_use(module)
    if not isinstance(layer, _PEFT_LAYERS):
        return layer.weight
    weight = base_layer(layer).weight
    if layer.disable_adapters or layer.merged:
        return weight
    if isinstance(layer, TrainableTokensLayer):
        return layer.get_merged_weights(layer.active_adapters)
    lora_layer: Any = layer
    total = weight
    for name in lora_layer.active_adapters:
        if name in lora_layer.lora_A or name in lora_layer.lora_embedding_A:
            total = total + lora_layer.get_delta_weight(name)
    return total if wide else total.to(weight.dtype)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as it would be without LoRA layers, whose effect is added to the weights below.

    Raises:
        ValueError: adapters that are not plain LoRA; see `base_layer`.
    """
    state = {}
    for name, tensor in model.state_dict().items():
        owner, _, leaf = name.rpartition(".")
        if owner.endswith(".base_layer"):
            owner = owner.removesuffix(".base_layer")
            tensor = effective_weight(model.get_submodule(owner)).detach() if leaf == "weight" else tensor
        elif ".lora_" in name:
            continue
        state[f"{owner}.{leaf}"] = tensor
    return state


def base_layer(module: Any) -> Any:
    """The layer below a module's adapters, which `effective_weight` can add to its weight.

    Args:
        module: any layer, with adapters or without.

    Raises:
        ValueError: a kind of adapter whose effect is not `weight + delta`.
    """
    layer = _layer_in_use(module)
    if not isinstance(layer, _PEFT_LAYERS):
        return layer
    inner: Any = getattr(layer, "base_layer", None)
    # A layer that inherits its `forward` computes the same; a subclass for quantised weights has its own.
    if type(layer).forward not in _ADAPTED_FORWARDS or isinstance(inner, _PEFT_LAYERS):
        kind = f"{type(layer).__module__}.{type(layer).__name__}"
        raise ValueError(f"adapters of type {kind} are not supported: use LoRA")
    adapted: Any = layer
    if adapted.disable_adapters and adapted.merged:
        raise ValueError(
            "adapters are merged into the weights and disabled at once: call unmerge_adapter() first"
        )
    if isinstance(layer, LoraLayer):
        for name in layer.active_adapters:
            if name in layer.lora_variant or layer.lora_bias.get(name, False):
                raise ValueError(
                    f"adapter {name!r} is a variant of LoRA (DoRA, a bias, …) that cannot be merged: use LoRA"
                )
    return inner


def _layer_in_use(module: Any) -> Any:
    """The copy of a layer that its forward pass runs, where PEFT keeps several."""
    if isinstance(module, ModulesToSaveWrapper):
        names = [] if module.disable_adapters else module.active_adapters
        return module.modules_to_save[names[0]] if names else module.original_module
    return module.token_adapter if isinstance(module, TrainableTokensWrapper) else module


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule gets its own mode back."""
    training = [child for child in module.modules() if child.training]
    module.eval()
    try:
        yield
    finally:
        for child in training:
            child.training = True
