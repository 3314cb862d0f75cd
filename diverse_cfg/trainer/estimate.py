"""What a run will need, said before it begins: memory, and seconds per optimiser step.

Memory is counted from the shapes; its activations are those measured on MusicGen small, medium and large (10
and 30 s, batch 16): 40 bytes per token, layer and hidden unit in bfloat16, 3.5 with gradient checkpointing.
A rollout frees its caches when it ends (but small ones), and an update its activations: the larger of the two counts.
Time is measured: one teacher, student and backward pass over a few clips, and the first frames of a rollout.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.policies.musicgen.model import delays
from diverse_cfg.policies.sampler.batches import automatic_batch, cache_bytes

ACTIVATION_BYTES = 40.0
CHECKPOINTED_BYTES = 3.5


@dataclass(frozen=True)
class Sampling:
    """Clips that one process samples in one go.

    Args:
        is_teacher: who plays them; teacher and student each have a fused copy.
        clips: how many.
        guided: whether every clip is decoded twice.
    """

    is_teacher: bool
    clips: int
    guided: bool = False


@dataclass(frozen=True)
class Memory:
    """Gigabytes of one process.

    Args:
        weights: policy, encoders and a separate teacher.
        optimizer: gradients, AdamW's two moments, averaged weights.
        copies: fused copies to sample from, which stay from one rollout to the next.
        activations: of one micro-batch, while it is trained on.
        caches: keys and values of the clips that are sampled at once, while they are.
    """

    weights: float
    optimizer: float
    copies: float
    activations: float
    caches: float

    @property
    def peak(self) -> float:
        """What is always held, and the larger of what an update and what a rollout adds."""
        return self.weights + self.optimizer + self.copies + max(self.activations, self.caches)

    def __str__(self) -> str:
        return (
            f"{self.peak:.2g} GB per process at the peak (weights {self.weights:.2g}, optimiser "
            f"{self.optimizer:.2g}, fused copies {self.copies:.2g}, and the larger of an update's activations "
            f"{self.activations:.2g} and a rollout's caches {self.caches:.2g}; reward models come on top)"
        )


def memory(
    policy: MusicgenForConditionalGeneration,
    *,
    micro_batch: int,
    num_frames: int,
    samplings: Sequence[Sampling],
    rollout_batch_size: int | None,
    rollout_dtype: torch.dtype,
    fused: bool,
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
        num_frames: T.
        samplings: every kind of rollout that the run makes.
        rollout_batch_size: most clips sampled at once; None for what the rollout chooses by itself.
        rollout_dtype: of the matrices that a rollout multiplies with.
        fused: whether it samples from fused copies; stock `generate` does not.
        trained: number of trained parameters.
        separate_teacher: whether a frozen copy of the decoder exists.
        averaged: whether an average of the weights is kept.
        half_precision: whether the passes run in bfloat16 or float16.
        checkpointing: whether activations are recomputed.
    """
    config = policy.decoder.config
    decoder = sum(p.numel() * p.element_size() for p in policy.decoder.parameters())
    everything = sum(p.numel() * p.element_size() for p in policy.parameters())
    num_steps = num_decoder_steps(num_frames, delays(policy))
    per_unit = CHECKPOINTED_BYTES if checkpointing else ACTIVATION_BYTES
    units = micro_batch * num_steps * config.num_hidden_layers * config.hidden_size
    caches = [0]
    for sampling in samplings:
        most = rollout_batch_size or automatic_batch(policy, num_frames, sampling.guided, rollout_dtype)
        clip = cache_bytes(config, num_frames, sampling.guided, rollout_dtype, policy.device)
        caches.append(min(sampling.clips, most) * clip)
    copies = len({sampling.is_teacher for sampling in samplings}) if fused else 0
    return Memory(
        weights=(everything + decoder * separate_teacher) / 1e9,
        optimizer=4 * trained * (3 + averaged) / 1e9,
        copies=copies * fused_bytes(policy, rollout_dtype) / 1e9,
        activations=per_unit * units * (1 if half_precision else 2) / 1e9,
        caches=max(caches) / 1e9,
    )


def fused_bytes(policy: MusicgenForConditionalGeneration, dtype: torch.dtype) -> int:
    """Bytes of a `RolloutWeights` of the policy.

    Its matrices have the rollout's dtype; embeddings, positions, norms and the text's projection are in float32
    at least. Adapters are added into the matrices.

    Args:
        policy: the model.
        dtype: of the matrices.
    """
    config = policy.decoder.config
    wide = torch.promote_types(dtype, torch.float32).itemsize
    total = config.max_position_embeddings * config.hidden_size * wide
    for name, parameter in policy.named_parameters():
        if name.startswith(("text_encoder.", "audio_encoder.")) or "lora_" in name:
            continue
        narrow = parameter.ndim == 2 and "embed" not in name and not name.startswith("enc_to_dec_proj.")
        total += parameter.numel() * (dtype.itemsize if narrow else wide)
    return total


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of a second call: the first one compiles, captures and allocates."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started
