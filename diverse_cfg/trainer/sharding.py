"""Weights that are spread over several processes: what is supported, and how a rollout reads them."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import FSDPModule

from diverse_cfg.config import CFGDiversityConfig


def check_sharding(accelerator: Accelerator, args: CFGDiversityConfig) -> None:
    """Refuse what cannot work with sharded weights.

    Raises:
        ValueError: naming the option and the remedy.
    """
    deepspeed = getattr(accelerator.state, "deepspeed_plugin", None)
    fsdp = getattr(accelerator.state, "fsdp_plugin", None)
    if deepspeed is not None and deepspeed.zero_stage == 3:
        raise ValueError(
            "zero_stage=3 shards the weights that a rollout samples from, which is not supported: use ZeRO-2 "
            "(recipes/accelerate/deepspeed_zero2.yaml) or FSDP2 (recipes/accelerate/fsdp.yaml)"
        )
    if deepspeed is not None and args.adaptive_clip is not None:
        raise ValueError("adaptive_clip: DeepSpeed clips gradients by itself; set max_grad_norm instead")
    if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
        raise ValueError(
            "fsdp_version=1 is not supported: set fsdp_version: 2 (recipes/accelerate/fsdp.yaml)"
        )
    if fsdp is not None and args.rollout_backend != "fast":
        raise ValueError(
            f"rollout_backend={args.rollout_backend!r} gathers FSDP's weights anew for every step of a clip, and "
            "processes with different batches would wait for each other for ever: use rollout_backend='fast'"
        )
    if fsdp is not None:
        for name in ("ema_decay", "term_norm_steps"):
            if getattr(args, name):
                raise ValueError(
                    f"{name}={getattr(args, name)} needs whole weights, FSDP shards them: set it to 0"
                )


@contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights of an FSDP2 model while the context lasts; others are whole already."""
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for module in sharded:
        module.unshard()
    try:
        yield
    finally:
        for module in sharded:
            module.reshard()
