"""Before the first step: the policy, its configuration and the rewards, each checked where it enters.

MusicGen looks to TRL and transformers like a text model with a strange configuration. `TrainerFacingConfig`
and `TokenIds` keep their text habits off it, without changing what is saved.
"""

import copy
import logging
import os
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from transformers import (
    MusicgenConfig,
    MusicgenForConditionalGeneration,
)

from diverse_cfg.assets import nano_path
from diverse_cfg.cards import is_hub_id
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.embeddings.clap import ClapEmbedder
from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.musicgen.layout import num_frames_to_tokens, playing_config, repair_token_ids
from diverse_cfg.musicgen.policy import (
    LORA_TARGET_MODULES,
    delays,
    frame_rate,
    freeze_encoders,
    is_distilled,
    load_policy,
    unwrap,
    zero_dropout,
)
from diverse_cfg.provenance import read_provenance
from diverse_cfg.rewards import DiversityReward, is_pairwise

logger = logging.getLogger(__name__)

DEFAULT_CLAP = "laion/larger_clap_music"
LONGEST_DEFAULT_CLIP = 10.0


class TrainerFacingConfig(MusicgenConfig):
    """A MusicGen configuration that can be asked for "the" text configuration.

    MusicGen has two candidates and refuses to choose, while TRL and transformers read it and write T5's token
    ids into it. They get a throw-away copy of the decoder's. Saved, this is an ordinary MusicGen
    configuration.
    """

    def get_text_config(self, *_: Any, **__: Any):
        return copy.deepcopy(self.decoder)


def prepare_policy(
    model: str | os.PathLike | nn.Module, args: CFGDiversityConfig
) -> MusicgenForConditionalGeneration:
    """Load or take the policy: float32, no dropout, encoders frozen, generation settings of a distilled
    model.

    Raises:
        ValueError: a `PeftModel`, the command line's `nano`, or whatever `load_policy` refuses.
    """
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a ready-made PeftModel, of which TRL would add a second adapter as reference: pass the "
            "base model and peft_config=LoraConfig(...) (merge an adapter that you want to continue from "
            "first)"
        )
    if isinstance(model, nn.Module):
        policy = unwrap(model)
        zero_dropout(policy)
    else:
        if os.fspath(model) == "nano" and not os.path.isdir(model):
            raise ValueError("there is no folder nano; in Python use diverse_cfg.nano_path()")
        policy = load_policy(os.fspath(model))
    freeze_encoders(policy)
    policy.audio_encoder.float()
    policy.config.__class__ = TrainerFacingConfig
    if args.device.type == "cpu":
        # At clip lengths of a CPU run, fused attention's backward pass is twice as slow as plain matrix
        # products.
        policy.decoder.set_attn_implementation("eager")
    return policy


def check_teacher(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig) -> None:
    """Refuse to guide a teacher that has its guidance inside.

    Raises:
        ValueError: the teacher is a student, a merge or an adapter of one, and γ > 1.
    """
    if args.guidance_scale == 1:
        return
    if args.teacher_model is not None:
        if is_distilled(args.teacher_model):
            raise ValueError(
                f"teacher_model={args.teacher_model} is distilled already, and guidance_scale="
                f"{args.guidance_scale:g} would guide it twice: name its base, or set guidance_scale to 1"
            )
        return
    if isinstance(model, nn.Module):
        name, distilled = "the model", getattr(unwrap(model), "is_distilled", False)
    else:
        name, distilled = os.fspath(model), is_distilled(model)
    if distilled:
        raise ValueError(
            f"{name} is distilled already, and as its own teacher would be guided twice: set teacher_model "
            "(--teacher_model) to the base that it was distilled from, or guidance_scale to 1"
        )


def has_own_teacher(base_model: str | None, args: CFGDiversityConfig) -> bool:
    """Whether the teacher is another model than the student's start."""
    return args.teacher_model is not None and not same_model(args.teacher_model, base_model)


def base_model_name(model: str | os.PathLike | nn.Module) -> str | None:
    """Id or folder that the model came from; None for a model built in memory."""
    if isinstance(model, nn.Module):
        return getattr(model.config, "_name_or_path", None) or None
    return os.fspath(model)


def restore_token_ids(
    policy: MusicgenForConditionalGeneration, sampling: dict[str, Any] | None = None
) -> None:
    """Write MusicGen's special token wherever a text trainer put T5's; guidance is 1.0, since the student has
    it inside.

    With T5's ids `generate` would take code 0 for padding, and the saved model would carry the fault.
    """
    repair_token_ids(policy.config)
    policy.generation_config = playing_config(policy.config, sampling, like=policy.generation_config)


def lora_config(peft_config: PeftConfig | None) -> PeftConfig | None:
    """The user's adapter with the decoder's own projections as default targets.

    Raises:
        ValueError: an adapter that cannot be merged exactly afterwards.
    """
    if peft_config is None:
        return None
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; only LoraConfig is supported")
    for flag, name in (("use_rslora", "rsLoRA"), ("use_dora", "DoRA")):
        if getattr(peft_config, flag, False):
            raise ValueError(
                f"{flag}=True: merging is silently wrong with {name} adapters, so they are refused; use "
                "plain LoRA"
            )
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules is None:
        peft_config.target_modules = list(LORA_TARGET_MODULES)
    if peft_config.target_modules == "all-linear":
        raise ValueError(
            "target_modules='all-linear' would also adapt the frozen text encoder and the heads; leave it "
            f"unset, or name modules of the decoder: {', '.join(LORA_TARGET_MODULES)}"
        )
    if peft_config.lora_dropout:
        raise ValueError(
            f"lora_dropout={peft_config.lora_dropout}: the policy that is sampled must be the one that is "
            "trained; set 0"
        )
    return peft_config


def check_pushing(args: CFGDiversityConfig, peft_config: PeftConfig | None, base_model: str | None) -> None:
    """Refuse to push an adapter that nobody else could load.

    Raises:
        ValueError: its base is a folder of this machine.
    """
    if args.push_to_hub and peft_config is not None and not is_hub_id(base_model):
        raise ValueError(
            f"push_to_hub=True with a LoRA adapter of {base_model!r}, which others cannot load: train without "
            "it, and publish the full model afterwards (diverse-cfg publish --merged)"
        )


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
        settings = policy.generation_config
        tokens = settings.max_new_tokens or settings.max_length or 0
        own = (tokens - num_frames_to_tokens(0, policy.config)) / rate
        clip_seconds = min(own, LONGEST_DEFAULT_CLIP) if own > 0 else LONGEST_DEFAULT_CLIP
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


def same_model(first: str | None, second: str | None) -> bool:
    """Whether two ids or folders name one checkpoint."""
    if first is None or second is None:
        return False
    if os.path.isdir(first) and os.path.isdir(second):
        return os.path.samefile(first, second)
    return first == second
