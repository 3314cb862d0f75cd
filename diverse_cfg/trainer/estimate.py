"""What a run will need, said before it begins: memory, and seconds per optimiser step.

Memory is counted from the shapes; its activations are those measured on MusicGen small, medium and large (10
and 30 s, batch 16): 40 bytes per token, layer and hidden unit in bfloat16, 3.5 with gradient checkpointing.
A rollout frees its caches when it ends (but small ones), and an update its activations: the larger of the two counts.
Time is measured: one teacher, student and backward pass over a few clips, and the first frames of a rollout.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diverse_cfg.config import CFGDiversityConfig, MusicSFTConfig
from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.policies.policy import Policy
from diverse_cfg.trainer.advantages import CALIBRATION_PROMPTS
from diverse_cfg.trainer.teacher import rollout_dtype, sampler_share, who_samples

ACTIVATION_BYTES = 40.0
CHECKPOINTED_BYTES = 3.5


@dataclass(frozen=True)
class Rollout:
    """Clips that one process samples in one go.

    Args:
        is_teacher: who plays them; teacher and student each have a fused copy.
        clips: how many.
        guided: whether every clip is decoded twice.
    """

    is_teacher: bool
    clips: int
    guided: bool = False


def training_rollouts(args: CFGDiversityConfig) -> list[Rollout]:
    """What one training rollout of a process samples from each sampler, at most."""
    group = args.num_generations
    prompts = args.per_device_train_batch_size * (args.steps_per_generation or 1) // group
    # The teacher plays its share of a rollout's prompts, rounded down or up.
    return [
        Rollout(
            is_teacher,
            math.ceil(prompts * sampler_share(args, is_teacher)) * group,
            guided=is_teacher and args.reference_guidance != 1,
        )
        for is_teacher in who_samples(args)
    ]


def all_rollouts(args: CFGDiversityConfig, evaluates: bool) -> list[Rollout]:
    """Every kind of rollout that a process makes in a run: training, evaluation, calibration of the guards."""
    found = training_rollouts(args)
    if evaluates:
        found.append(Rollout(False, args.per_device_eval_batch_size))
    if args.guards.calibrated:
        guided = args.guards.gate is not None and args.reference_guidance != 1
        found.append(Rollout(True, CALIBRATION_PROMPTS * args.num_generations, guided))
    return found


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
            f"{self.activations:.2g} and a rollout's caches {self.caches:.2g})"
        )


def memory(
    policy: Policy,
    args: CFGDiversityConfig | MusicSFTConfig,
    *,
    num_frames: int,
    rollouts: Sequence[Rollout],
    trained: int,
    separate_teacher: bool,
) -> Memory:
    """Estimate the memory of one process without sharding.

    Args:
        policy: the student.
        args: the run's settings.
        num_frames: T.
        rollouts: every kind of rollout that the run makes.
        trained: number of trained parameters.
        separate_teacher: whether a frozen copy of the decoder exists.
    """
    dtype = rollout_dtype(args) or policy.dtype
    sizes = {name: p.numel() * p.element_size() for name, p in policy.model.named_parameters()}
    own = sum(size for name, size in sizes.items() if name.startswith(policy.trained))
    num_steps = num_decoder_steps(num_frames, policy.delays)
    per_unit = CHECKPOINTED_BYTES if args.gradient_checkpointing else ACTIVATION_BYTES
    units = args.per_device_train_batch_size * num_steps * policy.hidden_units
    caches = [0]
    for rollout in rollouts:
        most = args.rollout_batch_size or policy.automatic_batch(num_frames, rollout.guided, dtype)
        clip = policy.cache_bytes(num_frames, rollout.guided, dtype)
        caches.append(min(rollout.clips, most) * clip)
    fused = args.rollout_backend == "fast"  # stock `generate` needs no copies
    copies = len({rollout.is_teacher for rollout in rollouts}) if fused else 0
    return Memory(
        weights=(sum(sizes.values()) + own * separate_teacher) / 1e9,
        optimizer=4 * trained * (3 + (args.ema_decay > 0)) / 1e9,
        copies=copies * policy.snapshot_bytes(dtype) / 1e9,
        activations=per_unit * units * (1 if args.bf16 or args.fp16 else 2) / 1e9,
        caches=max(caches) / 1e9,
    )


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time of a second call: the first one compiles, captures and allocates."""
    for _ in range(2):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - started
