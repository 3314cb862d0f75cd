"""Callbacks of the trainer: adaptive gradient clipping, audio of every evaluation, and alarms against
hacking."""

import importlib
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from diverse_cfg.policies.files import write_wav
from diverse_cfg.untrusted import slug

logger = logging.getLogger(__name__)

# Relative rise of the reward from which the second encoder is expected to move, and the share of it that it must show.
_MIN_RISE, _FOLLOW = 0.1, 0.25


class AdaptiveClipCallback(TrainerCallback):
    """Clip the gradient at a multiple of its own running mean norm.

    The policy gradient is mostly noise, and now and then a batch of it is several times larger than usual.
    A fixed threshold is either never reached or always: this one follows the run.

    Args:
        ratio: of the running mean, at which a gradient is cut.
        clip: clips to a norm and returns the norm before, e.g. of accelerate for any kind of parallelism.
        decay: of the running mean.
    """

    def __init__(self, ratio: float, clip: Callable[[float], Tensor | float], decay: float = 0.95):
        self.ratio = ratio
        self.clip = clip
        self.decay = decay
        self.mean: float | None = None

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        limit = math.inf if self.mean is None else self.ratio * self.mean
        norm = float(self.clip(limit))
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"the gradient's norm is {norm} at step {state.global_step + 1}: lower learning_rate, or "
                "train in float32 (bf16=False)"
            )
        # The mean takes in what was applied, not the outlier.
        applied = min(norm, limit)
        self.mean = applied if self.mean is None else self.decay * self.mean + (1 - self.decay) * applied


@dataclass(frozen=True)
class EvaluationClip:
    """One clip of an evaluation.

    Args:
        prompt: its text.
        waveform: mono [L] or stereo [2, L].
        sampling_rate: in Hz.
    """

    prompt: str
    waveform: Tensor
    sampling_rate: int


class AudioSamplesCallback(TrainerCallback):
    """Write a few clips of every evaluation to `output_dir/audio/step-N` and to the trackers that run.

    Args:
        clips: returns the clips of the evaluation that just ended, and may forget them.
    """

    def __init__(self, clips: Callable[[], list[EvaluationClip]]):
        self.clips = clips

    def on_evaluate(self, args, state, control, **kwargs):
        clips = self.clips()
        if not clips or not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / "audio" / f"step-{state.global_step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for index, clip in enumerate(clips):
            write_wav(folder / f"{index:02d}-{slug(clip.prompt, 48)}.wav", clip.waveform, clip.sampling_rate)
        trackers = args.report_to or []
        if "tensorboard" in trackers:
            _to_tensorboard(args, state, clips)
        for name in ("wandb", "trackio"):
            if name in trackers:
                _to_tracker(name, state, clips)


def _to_tensorboard(args, state, clips: list[EvaluationClip]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(args.logging_dir) as writer:
        for index, clip in enumerate(clips):
            mono = torch.atleast_2d(clip.waveform.float().cpu()).mean(dim=0, keepdim=True)
            name = f"audio/{index:02d} {clip.prompt}"
            writer.add_audio(name, mono, state.global_step, sample_rate=clip.sampling_rate)


def _to_tracker(name: str, state, clips: list[EvaluationClip]) -> None:
    tracker = importlib.import_module(name)
    audio = {
        f"audio/{index:02d}": tracker.Audio(
            clip.waveform.float().cpu().T.numpy(), sample_rate=clip.sampling_rate, caption=clip.prompt
        )
        for index, clip in enumerate(clips)
    }
    tracker.log(audio | {"step": state.global_step})


class RewardHackingAlarm(TrainerCallback):
    """Warn at an evaluation when what is optimised and what is wanted part ways.

    Every alarm compares with the first evaluation of the run on the same set of prompts, so an `eval_on_start`
    is worth its time:

    * reward hacking: the rewarded diversity rose, the distance under the second encoder did not follow;
    * quality: a reward that is not diversity fell below its best by more than two standard errors;
    * teacher hacking: the divergence to the teacher falls while such a quality falls too (arXiv 2502.02671);
    * KL budget: the student is `kl_limit` times farther from the guided teacher than where it started.

    Args:
        quality: names of the reward functions that judge quality.
        kl_limit: multiple of the first divergence. 1 fits a run from the unguided base, which must not get
            farther from the teacher; one that buys diversity from a β = 0 student moves away on purpose.
    """

    def __init__(self, quality: list[str], kl_limit: float = 1.0):
        self.quality = quality
        self.kl_limit = kl_limit
        # By evaluation set: the first evaluation, and the best mean of every quality.
        self.first: dict[str, dict[str, float]] = {}
        self.best: dict[str, dict[str, float]] = {}
        self.raised: list[tuple[int, str]] = []  # step and message

    def on_evaluate(self, args, state, control, metrics: dict[str, Any] | None = None, **kwargs):
        if not state.is_world_process_zero:
            return
        # Of several evaluation sets, transformers puts the name before every metric.
        keys = [key for key in metrics or {} if key.endswith("_runtime")]
        prefix = keys[0].removesuffix("runtime") if keys else "eval_"
        name = prefix.removeprefix("eval_").rstrip("_")
        now = {key.removeprefix(prefix): value for key, value in (metrics or {}).items()}
        for message in self.check(now, name):
            self.raised.append((state.global_step, message))
            where = f" on {name}" if name else ""
            logger.warning("alarm at step %d%s: %s", state.global_step, where, message)

    def check(self, now: dict[str, float], name: str = "") -> list[str]:
        """The alarms that these metrics of an evaluation set raise; also remembers the first and the best."""
        alarms = []
        first, best = self.first.setdefault(name, now), self.best.setdefault(name, {})
        rise = _relative_rise(now, first, "reward/diversity")
        follows = _relative_rise(now, first, "reward/monitor_diversity")
        if rise is not None and follows is not None and rise > _MIN_RISE and follows < _FOLLOW * rise:
            alarms.append(
                f"reward hacking: the rewarded diversity rose by {rise:.0%}, under the second encoder by "
                f"{follows:.0%}; use a guard, another diversity_embedder, or a smaller diversity_coef"
            )
        falling = [name for name in self.quality if _fell(now, best, name)]
        alarms += [
            f"quality: {name} fell from {best[name]:.3f} to {now[f'rewards/{name}/mean']:.3f}, more "
            "than two standard errors; lower diversity_coef or learning_rate"
            for name in falling
        ]
        closer = _relative_rise(now, first, "kl/clip")
        if falling and closer is not None and closer < 0:
            alarms.append(
                f"teacher hacking: the divergence to the teacher fell by {-closer:.0%} while "
                f"{', '.join(falling)} fell too; stop earlier, or use more prompts"
            )
        if closer is not None and now["kl/clip"] > self.kl_limit * first["kl/clip"]:
            times = "" if self.kl_limit == 1 else f"{self.kl_limit:g} × "
            alarms.append(
                f"KL budget: {now['kl/clip']:.1f} nats per clip from the guided teacher, more than "
                f"{times}the {first['kl/clip']:.1f} of the start; lower diversity_coef or learning_rate"
            )
        return alarms


def _fell(now: dict[str, float], best: dict[str, float], name: str) -> bool:
    mean, std = now.get(f"rewards/{name}/mean"), now.get(f"rewards/{name}/std")
    if mean is None or std is None:
        return False
    before = best.setdefault(name, mean)
    best[name] = max(before, mean)
    return mean < before - 2 * std / math.sqrt(max(now.get("clips", 1), 1))


def _relative_rise(now: dict[str, float], first: dict[str, float], key: str) -> float | None:
    old, new = first.get(key), now.get(key)
    if old is None or new is None or not old > 0:
        return None
    return new / old - 1


def peak_memory_gb(device: torch.device) -> float | None:
    """Highest memory use of this process on a GPU so far; None elsewhere."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
