"""What a run will need, said before it begins: memory, and seconds per optimiser step.

Memory is counted from the shapes; its activations are those measured on MusicGen small, medium and large (10
and 30 s, batch 16): 40 bytes per token, layer and hidden unit in bfloat16, 3.5 with gradient checkpointing.
Time is measured: one teacher, student and backward pass over a few clips, and the first frames of a rollout.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import MusicgenForConditionalGeneration

ACTIVATION_BYTES = 40.0
CHECKPOINTED_BYTES = 3.5


@dataclass(frozen=True)
class Memory:
    """Gigabytes of one process.

    Args:
        weights: policy, encoders and a separate teacher.
        optimizer: gradients, AdamW's two moments, averaged weights.
        activations: of one micro-batch.
        rollout: fused weights and the cache of keys and values.
    """

    weights: float
    optimizer: float
    activations: float
    rollout: float

    def __str__(self) -> str:
        total = self.weights + self.optimizer + self.activations + self.rollout
        return (
            f"{total:.2g} GB per process (weights {self.weights:.2g}, optimiser {self.optimizer:.2g}, "
            f"activations {self.activations:.2g}, rollout {self.rollout:.2g}; reward models come on top)"
        )


def memory(
    policy: MusicgenForConditionalGeneration,
    *,
    micro_batch: int,
    rollout_batch: int,
    num_steps: int,
    trained: int,
    separate_teacher: bool,
    averaged: bool,
    half_precision: bool,
    checkpointing: bool,
) -> Memory:
    """Estimate the memory of one process without sharding.

    Args:
        policy: the student.
        micro_batch: clips of one forward pass.
        rollout_batch: clips sampled at once.
        num_steps: S, decoder steps of a clip.
        trained: number of trained parameters.
        separate_teacher: whether a frozen copy of the decoder exists.
        averaged: whether an average of the weights is kept.
        half_precision: whether the passes run in bfloat16 or float16.
        checkpointing: whether activations are recomputed.
    """
    config = policy.decoder.config
    decoder = sum(p.numel() * p.element_size() for p in policy.decoder.parameters())
    everything = sum(p.numel() * p.element_size() for p in policy.parameters())
    width = 2 if half_precision else 4
    cache = 2 * width * rollout_batch * num_steps * config.num_hidden_layers * config.hidden_size
    per_unit = CHECKPOINTED_BYTES if checkpointing else ACTIVATION_BYTES
    units = micro_batch * num_steps * config.num_hidden_layers * config.hidden_size
    return Memory(
        weights=(everything + decoder * separate_teacher) / 1e9,
        optimizer=4 * trained * (3 + averaged) / 1e9,
        activations=per_unit * units * (1 if half_precision else 2) / 1e9,
        rollout=(decoder * width / 4 + cache) / 1e9,
    )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of a second call: the first one compiles, captures and allocates."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started
