"""Where TRL and transformers take a policy over codes for a text model, and what keeps them from it.

Each entry says what would go wrong without it, so that it can go when that does. All are needed from the lowest
versions that `pyproject.toml` allows (TRL 1.7, transformers 5.18) to the newest that were looked at (TRL 1.16,
transformers 5.23), unless they name others.
"""

import contextlib
import functools
import math
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from transformers import Trainer
from trl.trainer.utils import RepeatSampler

from diverse_cfg.types import Clips, TextCondition


def route_forward(model: nn.Module) -> None:
    """Let `model(run=f)` return `f()`, in place; every other call is as before TRL.

    TRL (after 1.7) puts a fused head in the place of `forward`, which reads one table of weights where a policy has
    one per codebook. And the loss starts from hidden states, but distributed wrappers want all work within `forward`.
    """
    model.__dict__.pop("forward", None)
    original = model.forward

    @functools.wraps(type(model).forward)
    def forward(self, *args, run: Callable | None = None, **kwargs):
        return original(*args, **kwargs) if run is None else run()

    model.forward = types.MethodType(forward, model)


@contextlib.contextmanager
def without_text(trainer: Trainer) -> Iterator[None]:
    """While a model is saved: no tokenizer, and PEFT may miss its base's vocabulary of text, which an adapter or
    AudioCraft's folder does not have."""
    with without_tokenizer(trainer), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Could not find a config file")
        yield


@contextlib.contextmanager
def without_tokenizer(trainer: Trainer, substitute: Any = None) -> Iterator[None]:
    """Hide the tokenizer: `train` would write its token ids over the policy's, `save_model` would write a
    tokenizer where the whole processor belongs."""
    tokenizer, trainer.processing_class = trainer.processing_class, substitute
    try:
        yield
    finally:
        trainer.processing_class = tokenizer


class NoText:
    """In the tokenizer's place while TRL handles a rollout, which it would decode to text for its log (TRL 1.7; the
    newest decodes in `_generate` only)."""

    def batch_decode(self, rows, **_: Any) -> list[str]:
        return [f"{len(row)} codes" for row in rows]


def as_completions(clips: Clips, first: int) -> tuple[list[list[int]], list[list[int]], list[str]]:
    """Clips as what TRL's `_generate` returns: token ids of prompts and completions, and text for its log.

    A clip's codes [K, T] become T·K ids, *time-major*. Nobody reads the prompts' ids: the condition travels apart.

    Args:
        clips: of this process.
        first: number of the first one among those of all processes.
    """
    labels = [f"clip {first + row}, seed {clips.seed}" for row in range(len(clips))]
    return [[0]] * len(clips), clips.codes.transpose(1, 2).flatten(1).tolist(), labels


def into_batch(clips: Clips, batch: dict[str, Any]) -> None:
    """Add to TRL's batch what it has no room for: the condition, and one advantage and log-prob per code."""
    assert clips.condition is not None and clips.advantages is not None
    batch["advantages"] = clips.advantages.flatten(1)
    batch["condition_hidden"] = clips.condition.hidden_states
    batch["condition_mask"] = clips.condition.attention_mask
    if clips.condition.guidance is not None:
        batch["condition_guidance"] = clips.condition.guidance
    if clips.old_logps is not None:
        batch["old_per_token_logps"] = clips.old_logps.flatten(1)


def from_batch(batch: dict[str, Tensor], num_codebooks: int, sampling_rate: int, rewarded: bool) -> Clips:
    """The clips of a micro-batch as TRL has padded, shuffled and split them.

    Args:
        batch: what `into_batch` completed.
        num_codebooks: K.
        sampling_rate: in Hz.
        rewarded: whether the advantages count.
    """
    codes = batch["completion_ids"].unflatten(1, (-1, num_codebooks)).transpose(1, 2).contiguous()
    old_logps = batch.get("old_per_token_logps")
    return Clips(
        codes,
        sampling_rate,
        condition=TextCondition(
            batch["condition_hidden"], batch["condition_mask"], batch.get("condition_guidance")
        ),
        advantages=batch["advantages"].view_as(codes) if rewarded else None,
        old_logps=None if old_logps is None else old_logps.view_as(codes),
    )


def show_advantages(logs: dict[str, Any], means: list[float]) -> None:
    """Put each clip's mean advantage into the table of completions, over those that TRL has just added."""
    kept = list(logs["advantages"])[: -len(means)]
    logs["advantages"].clear()
    logs["advantages"].extend(kept + means)


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch's number, not on how many were drawn before.

    A run that is resumed in its second epoch then sees the prompts that it would have seen.

    Args:
        sampler: TRL's.
        epoch: tells the epoch's number.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]):
        super().__init__(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
        )
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + 1_000_003 * self.epoch())
        return super().__iter__()


def has_ended(trainer: Trainer) -> bool:
    """Whether a run was resumed from its last step, after which transformers would make one more."""
    ended = trainer.state.global_step >= trainer.state.max_steps > 0
    trainer.control.should_training_stop |= ended
    return ended


def name_metrics(metrics: dict[str, float], logged: dict[str, list[float]], prefix: str) -> None:
    """Put what was logged in an evaluation under the evaluation set's own name, as means over all batches.

    transformers also counts a batch of several clips per prompt in part. TRL's own record is emptied.
    """
    for name, values in logged.items():
        there = [value for value in values if not math.isnan(value)]
        if there:
            metrics[f"{prefix}_{name}"] = sum(there) / len(there)
    logged.clear()
