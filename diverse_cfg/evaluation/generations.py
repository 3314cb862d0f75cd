"""The clips of a system: the same held-out prompts and the same random numbers for every system.

Clip g of prompt p has sample id p·G + g under every system, so that two systems differ by their
distributions and not by their luck. Codes are kept, audio is decoded again when a metric needs it: it takes
80 times the space.
"""

import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diverse_cfg.evaluation.cache import Cache, mixture_digest
from diverse_cfg.evaluation.systems import Mixture, System
from diverse_cfg.merging import merge_checkpoints
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.policy import Policy, as_policy
from diverse_cfg.policies.sampler.extension import hybrid_generate
from diverse_cfg.policies.sampler.rollout import fast_generate
from diverse_cfg.types import Clips

_VERSION = 2  # of the description and of the sampler; raise it when either changes what is played
_BATCH = 64

Progress = Callable[[int], None]
"""Called with the number of clips that have just been finished."""


@dataclass(frozen=True)
class ClipSet:
    """What every system plays.

    Args:
        prompts: P held-out prompts, all different.
        num_generations: G clips per prompt and seed.
        num_frames: T, length of a clip.
        seeds: sampling seeds; each adds a group of G clips per prompt.
        rollout_backend: "fast", or "transformers" for stock `generate`: the same clips up to rounding, slowly.
    """

    prompts: tuple[str, ...]
    num_generations: int
    num_frames: int
    seeds: tuple[int, ...] = (0,)
    rollout_backend: str = "fast"

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds must be different numbers, got {list(self.seeds)}")

    @property
    def num_clips(self) -> int:
        """Clips of one replicate: prompts × seeds × generations."""
        return len(self.prompts) * len(self.seeds) * self.num_generations


class Player:
    """One replicate of a system, loaded when somebody needs it.

    Args:
        mixture: the model, or the merge that is made in a temporary folder.
        device: torch device.
        student_guidance: γ to fold into it, of a student of a range.
        first: a model that begins, if the system has one.
    """

    def __init__(
        self,
        mixture: Mixture,
        device: str = "cpu",
        student_guidance: float | None = None,
        first: str = "",
    ):
        self.mixture = mixture
        self.device = device
        self.student_guidance = student_guidance
        self.first = Player(((first, 1.0),), device) if first else None

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        if len(self.mixture) == 1:
            source = self.mixture[0][0]
            model = load_policy(source).to(self.device)
            if self.student_guidance is not None:
                as_policy(model).fold_guidance(self.student_guidance)
            return model, load_processor(source)
        with TemporaryDirectory(prefix="diverse-cfg-merge-") as folder, warnings.catch_warnings():
            # How the merge would play by default does not matter: a system says how it is sampled.
            warnings.simplefilter("ignore", UserWarning)
            checkpoints, weights = zip(*self.mixture, strict=True)
            merged = merge_checkpoints(
                checkpoints, weights, Path(folder) / "merged", bake_guidance=self.student_guidance
            )
            return load_policy(merged).to(self.device), load_processor(merged)

    @property
    def model(self):
        """The policy, in eval mode."""
        return self._loaded[0]

    @property
    def processor(self):
        """Its processor."""
        return self._loaded[1]

    @cached_property
    def policy(self) -> Policy:
        """Both."""
        return as_policy(*self._loaded)

    @cached_property
    def weights(self) -> Any:
        """What is sampled from, made once: the model does not change while it is evaluated."""
        return self.policy.snapshot()

    @property
    def sampling_rate(self) -> int:
        """Of the audio, in Hz."""
        return self.policy.sampling_rate

    def decode(self, codes: Tensor) -> Tensor:
        """Waveforms [B, L] or [B, 2, L], on the CPU."""
        return self.policy.decode(codes.to(self.device)).float().cpu()


def describe(system: System, mixture: Mixture, clips: ClipSet, seed: int) -> dict[str, Any]:
    """Everything that decides the codes of one replicate under one seed, and the time that they take.

    The reference backend has a key of its own: a cached clip brings its seconds along, and rounding may change a
    code. The fast one's is as it always was, so that what is cached stays valid.
    """
    backend = {} if clips.rollout_backend == "fast" else {"rollout_backend": clips.rollout_backend}
    schedule = system.guidance_schedule
    backend |= {} if schedule == "constant" else {"guidance_schedule": schedule}
    told = system.student_guidance
    backend |= {} if told is None else {"student_guidance": float(told)}
    if system.first:
        backend |= {
            "first": mixture_digest(((system.first, 1.0),)),
            "first_frames": system.first_frames,
            "first_guidance_scale": float(system.first_guidance_scale),
        }
    return backend | {
        "version": _VERSION,
        "model": mixture_digest(mixture),
        "guidance_scale": float(system.guidance_scale),
        "temperature": float(system.temperature),
        "top_k": system.top_k,
        "prompts": list(clips.prompts),
        "num_generations": clips.num_generations,
        "num_frames": clips.num_frames,
        "seed": seed,
    }


def _machine(device: str) -> str:
    """What times belong to: the GPU or the processor, and the number of threads."""
    name = platform.processor() or platform.machine()
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {device}, {torch.get_num_threads()} threads"


def generations(
    system: System, player: Player, clips: ClipSet, seed: int, cache: Cache, progress: Progress | None = None
) -> dict[str, np.ndarray]:
    """Codes of one replicate under one seed, from the cache or newly sampled.

    Returns:
        `codes` int32 [N, K, T], clips of a prompt adjacent; `seconds` per clip, of the sampling [N], on the
        `_machine` that the cache's facts name;
        `batch` of each clip [N], since clips of one batch share their time; `decoder_rows` per clip [N].
    """
    description = describe(system, player.mixture, clips, seed)
    kept = cache.load("generations", description)
    if kept is not None:
        if progress:
            progress(len(kept["codes"]))
        return kept
    sampling = system.sampling_of(clips.num_frames)

    def clock() -> float:
        if torch.device(player.device).type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    per_batch = max(1, _BATCH // clips.num_generations)
    # Made here, lest the first batch's time contain it.
    weights = player.weights if clips.rollout_backend == "fast" else None
    play: Callable[..., Clips] = fast_generate
    if player.first is not None:
        play = partial(
            hybrid_generate,
            player.first.model,
            first_frames=system.first_frames,
            first_guidance_scale=system.first_guidance_scale,
            first_weights=player.first.weights,
        )
    codes, seconds, batches, rows = [], [], [], []
    for start in range(0, len(clips.prompts), per_batch):
        prompts = list(clips.prompts[start : start + per_batch])
        first = start * clips.num_generations
        count = len(prompts) * clips.num_generations
        started = clock()
        rollout = play(
            player.model,
            prompts,
            processor=player.processor,
            num_frames=clips.num_frames,
            guidance_scale=sampling.guidance_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            adaptive_guidance=sampling.adaptive_guidance,
            seed=seed,
            num_generations=clips.num_generations,
            batch_size=count,
            rollout_backend=clips.rollout_backend,
            sample_ids=range(first, first + count),
            decode=False,
            weights=weights,
        )
        spent = clock() - started
        codes.append(rollout.codes.to("cpu", torch.int32))
        seconds += [spent / count] * count
        batches += [start // per_batch] * count
        rows.append(rollout.decoder_rows.to(torch.int32))
        if progress:
            progress(count)
    arrays = {
        "codes": torch.cat(codes).numpy(),
        "seconds": np.array(seconds),
        "batch": np.array(batches, dtype=np.int32),
        "decoder_rows": torch.cat(rows).numpy(),
    }
    cache.save("generations", description, arrays, {"machine": _machine(player.device)})
    return arrays
