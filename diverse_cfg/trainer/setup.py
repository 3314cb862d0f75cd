"""Before the first step: clip length and rewards, each checked where it enters (the model: `start`)."""

import logging
import os
import warnings
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.assets import nano_path
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.effects import Run, idle_settings
from diverse_cfg.embeddings.clap import ClapEmbedder
from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.policies.musicgen.model import delays, frame_rate, usual_seconds
from diverse_cfg.provenance import read_provenance
from diverse_cfg.rewards import DiversityReward, is_pairwise
from diverse_cfg.trainer.start import same_model

logger = logging.getLogger(__name__)

DEFAULT_CLAP = "laion/larger_clap_music"


def clip_frames(policy: MusicgenForConditionalGeneration, clip_seconds: float | None) -> int:
    """T of the training clips.

    Args:
        policy: the model, whose generation settings tell its own length.
        clip_seconds: what the user asked for; None takes the model's own length, at most 10 s.

    Raises:
        ValueError: shorter than a frame, or longer than the model's positions.
    """
    decoder = policy.config.decoder
    rate = frame_rate(policy)
    if clip_seconds is None:
        clip_seconds = usual_seconds(policy)
    frames = round(clip_seconds * rate)
    if frames < 1:
        raise ValueError(f"clip_seconds={clip_seconds} is shorter than one frame ({1 / rate:g} s)")
    steps = num_decoder_steps(frames, delays(policy))
    if steps > decoder.max_position_embeddings:
        longest = (decoder.max_position_embeddings - (steps - frames)) / rate
        raise ValueError(
            f"clip_seconds={clip_seconds} needs {steps} positions, the model has "
            f"{decoder.max_position_embeddings}: use at most {longest:g}"
        )
    return frames


def check_codebooks(policy: MusicgenForConditionalGeneration, diversity_codebooks: int | None) -> None:
    """Raise `ValueError` for more codebooks than a channel of the model has."""
    there = max(delays(policy)) + 1
    if diversity_codebooks is not None and diversity_codebooks > there:
        raise ValueError(
            f"diversity_codebooks={diversity_codebooks}, but the model has {there} codebooks per channel: leave "
            "it unset to reach all of them"
        )


def check_reward_funcs(reward_funcs: Any, args: CFGDiversityConfig, base_model: str | None) -> list[Callable]:
    """The reward functions as a list, the default one if there is none.

    Raises:
        ValueError: text reward models, an own weight for the diversity reward, diversity without its reward,
            or a pairwise reward that is not built like it.
    """
    if reward_funcs is None:
        reward_funcs = [default_reward(args, base_model)] if args.diversity_coef > 0 else []
    if not isinstance(reward_funcs, list | tuple):
        reward_funcs = [reward_funcs]
    for reward_func in reward_funcs:
        if isinstance(reward_func, str | nn.Module):
            name = reward_func if isinstance(reward_func, str) else type(reward_func).__name__
            raise ValueError(
                f"reward function {name!r} is a text reward model to TRL, and clips are audio: pass a function that "
                "takes waveforms (see diverse_cfg.rewards)"
            )
        if not callable(reward_func):
            raise ValueError(f"reward function {reward_func!r} is not callable")
    pairwise = [is_pairwise(reward_func) for reward_func in reward_funcs]
    if args.diversity_coef > 0 and not any(pairwise):
        raise ValueError(
            f"diversity_coef={args.diversity_coef} but no reward function measures diversity: add "
            "DiversityReward(...), or set diversity_coef=0"
        )
    for weight, is_diversity in zip(args.reward_weights or [], pairwise, strict=False):
        if is_diversity and weight != 1:
            raise ValueError(
                f"the diversity reward has reward_weights={weight}: its weight is diversity_coef, keep 1 here"
            )
    names = [getattr(reward_func, "__name__", type(reward_func).__name__) for reward_func in reward_funcs]
    for reward_func, name, is_diversity in zip(reward_funcs, names, pairwise, strict=True):
        embedder = getattr(reward_func, "embedder", None)
        whole = hasattr(embedder, "embed") and getattr(embedder, "reads", None) in ("codes", "waveforms")
        if is_diversity and not (
            whole and hasattr(reward_func, "embeddings") and hasattr(reward_func, "distances")
        ):
            raise ValueError(
                f"reward function {name!r} is pairwise, and so needs an embedder (with embed, reads and "
                "sampling_rate) and the attributes embeddings and distances: derive it from DiversityReward, or "
                "leave pairwise off"
            )
    if names and args.rollout_source == "teacher":
        logger.warning(
            "rollout_source='teacher': no clip is the student's own, so the rewards of %s are logged and train "
            "nothing; use 'student' or 'mix' to train on them",
            ", ".join(names),
        )
    return list(reward_funcs)


def check_run(
    args: CFGDiversityConfig, reward_funcs: list[Callable], given: bool, eval_dataset: Any = None
) -> None:
    """What the settings alone cannot tell: whether evaluations can run, and which settings are without effect.

    Args:
        args: the settings.
        reward_funcs: all of them.
        given: whether the user passed them.
        eval_dataset: the held-out prompts, if any.

    Raises:
        ValueError: an evaluation would fail when its turn comes.
    """
    pairwise = [is_pairwise(reward_func) for reward_func in reward_funcs]
    if eval_dataset is not None:
        args.check_evaluation(any(pairwise))
    elif args.eval_strategy != "no" or args.eval_on_start:
        raise ValueError(
            "evaluations are asked for, but there are no held-out prompts: pass eval_dataset "
            "(dataset_test_split or eval_dataset_name), or set eval_strategy='no' and eval_on_start=False"
        )
    weights = args.reward_weights or [1.0] * len(reward_funcs)
    counts = [
        args.diversity_coef if pair else weight for pair, weight in zip(pairwise, weights, strict=False)
    ]
    guards = [reward_func.guards for reward_func in reward_funcs if isinstance(reward_func, DiversityReward)]
    run = Run(
        rewarded=any(counts) and args.rollout_source != "teacher",
        held_out=eval_dataset is not None,
        guarded=not args.guards.listens or any(one.listens for one in guards) or not guards,
        embeds=given or args.diversity_coef > 0,
    )
    if args.process_index == 0 and (idle := idle_settings(args, run)):
        warnings.warn("; ".join(idle), UserWarning, stacklevel=3)


def check_embedders(reward_funcs: list[Callable], policy: MusicgenForConditionalGeneration) -> None:
    """Embedders of the diversity rewards against the codec of the policy.

    Raises:
        ValueError: no usable sampling rate, or an encoder of another codec's codes.
    """
    rate = policy.config.audio_encoder.sampling_rate
    for embedder in [function.embedder for function in reward_funcs if is_pairwise(function)]:
        name, found = (
            getattr(embedder, "name", type(embedder).__name__),
            getattr(embedder, "sampling_rate", None),
        )
        if not isinstance(found, int) or found <= 0:
            raise ValueError(
                f"embedder {name!r} has sampling_rate={found!r}; it must be a positive number of Hz"
            )
        if embedder.reads == "codes" and found != rate:
            raise ValueError(
                f"embedder {name!r} reads the codes of a codec at {found} Hz, the model's is at {rate} Hz: "
                "its codes mean something else; use an encoder of waveforms, or one of this codec"
            )


def default_reward(args: CFGDiversityConfig, base_model: str | None) -> DiversityReward:
    """DiversityReward with the configured encoder, the shipped one for the nano base, or CLAP.

    Raises:
        ValueError: CLAP is needed, is not in the cache, and cannot be downloaded.
    """
    name = args.diversity_embedder or default_embedder(base_model, args.teacher_model)
    if name != DEFAULT_CLAP:
        return DiversityReward(name, args.guards)
    try:
        return DiversityReward(ClapEmbedder(name), args.guards)
    except OSError as error:
        raise ValueError(
            f"the default diversity reward needs CLAP: {error} (setting diversity_embedder, or passing "
            "reward_funcs=DiversityReward(...))"
        ) from error


def default_embedder(base_model: str | None, teacher_model: str | None = None) -> str:
    """The shipped reward encoder if the run starts from the nano base or its student, CLAP otherwise."""
    origin = read_provenance(base_model) if base_model and os.path.isdir(base_model) else None
    candidates = (base_model, teacher_model, origin and origin.base_model)
    try:
        if any(same_model(candidate, str(nano_path())) for candidate in candidates):
            return str(nano_path("reward-encoder"))
    except FileNotFoundError:
        pass  # an installation without the nano world
    return DEFAULT_CLAP
