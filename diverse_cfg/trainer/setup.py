"""Before the first step: the model, its adapter and its teacher, clips, prompts and rewards, each checked where it
enters.

Whatever cannot work raises a `ValueError` here that names the option and the remedy.
"""

import copy
import hashlib
import inspect
import itertools
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from datasets import IterableDataset
from datasets.features.features import require_decoding
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import HubStrategy

from diverse_cfg.assets import nano_path, shipped
from diverse_cfg.cards import is_hub_id, public_name
from diverse_cfg.config import CFGDiversityConfig, MusicSFTConfig
from diverse_cfg.effects import Run, idle_settings
from diverse_cfg.embeddings.clap import ClapEmbedder
from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.functional.guidance import GuidanceRange, guidance_schedule
from diverse_cfg.policies.audiocraft import from_audiocraft, is_live_audiocraft
from diverse_cfg.policies.checkpoints import inexact_options, open_checkpoint
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.policy import Policy, as_policy, plain, require_prompts
from diverse_cfg.policies.stored import FullCheckpoint, is_adapter, locate, same_base
from diverse_cfg.prompts import check_column, check_prompts, load_prompts
from diverse_cfg.provenance import read_provenance
from diverse_cfg.rewards import DiversityReward, is_pairwise, keywords
from diverse_cfg.trainer.teacher import fingerprint
from diverse_cfg.types import Clips

logger = logging.getLogger(__name__)

DEFAULT_CLAP = "laion/larger_clap_music"
GIVEN = {
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"),  # by TRL
    *("num_generations", "sampling_rate", "codes", "waveforms"),  # by this package
}
"""What every reward function is called with, besides the columns of the dataset."""


# ---- the model ---------------------------------------------------------------------------------------------


def open_model(model: Any, processing_class: Any) -> tuple[Any, Any]:
    """What a trainer was given as model and processor, `nano`, AudioCraft's live models and policies as plain ones."""
    model = shipped(model)
    if is_live_audiocraft(model):
        model, processor = from_audiocraft(model)
        processing_class = processor if processing_class is None else processing_class
    if isinstance(model, Policy):
        processing_class = model.processor if processing_class is None else processing_class
        model = model.model
    return model, processing_class


def base_model_name(model: str | os.PathLike | nn.Module) -> str | None:
    """Id or folder that the model came from; None for a model built in memory."""
    if isinstance(model, nn.Module):
        return getattr(model.config, "_name_or_path", None) or None
    return os.fspath(model)


def base_fingerprint(base: str | None) -> str | None:
    """Of the folder that an adapter will name as its base; None of a Hub id, whose weights stay."""
    return FullCheckpoint(base, locate(base)).fingerprint() if base and os.path.isdir(base) else None


def initial_weights(
    model: str | os.PathLike | nn.Module, policy: Policy
) -> tuple[str | None, int | str | None]:
    """What a resumed run compares of its start: its name, and a sum of the weights or, since merging an adapter rounds
    otherwise on other machines, of the adapter's files; None of a live model, into which one may be merged."""
    if isinstance(model, nn.Module):
        return None, None
    if is_adapter(model):
        return public_name(os.fspath(model)), open_checkpoint(model).fingerprint()
    return public_name(os.fspath(model)), sum(fingerprint(policy).values())


def prepare_policy(
    model: str | os.PathLike | nn.Module, args: CFGDiversityConfig | MusicSFTConfig, lora: bool
) -> Policy:
    """Load or take the policy: float32, no dropout, encoders frozen, generation settings of a distilled
    model.

    Raises:
        ValueError: a `PeftModel`, or whatever `load_policy` refuses.
    """
    _check_output(model, args)
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a ready-made PeftModel, of which TRL would add a second adapter as reference: pass the "
            "base model and peft_config=LoraConfig(...) (merge an adapter that you want to continue from "
            "first)"
        )
    if isinstance(model, nn.Module):
        inner = plain(model)
        if any(isinstance(module, BaseTunerLayer) for module in inner.modules()):
            raise ValueError(
                "the model still has adapters inside, which would be saved as weights of its own: pass what "
                "PeftModel.merge_and_unload() returns"
            )
        inner.name_or_path = inner.config._name_or_path or ""  # by which an adapter names its base
        if lora:
            _check_named_base(as_policy(inner))
    # Half precision is widened, since steps of the usual size vanish in it.
    own = as_policy(model).dtype if isinstance(model, nn.Module) else torch.float32
    policy = as_policy(load_policy(model, torch_dtype=torch.promote_types(own, torch.float32)))
    policy.freeze()
    _unfreeze_trained(policy, warn=isinstance(model, nn.Module) and not lora)
    policy.prepare_training(args.device)
    return policy


def _check_output(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig | MusicSFTConfig) -> None:
    """Refuse to write over what the run reads: resumed, it would begin elsewhere."""
    output = os.path.realpath(args.output_dir or ".")
    for name in (base_model_name(model), args.teacher_model):
        folder = os.path.realpath(name or "")
        own_checkpoint = (
            os.path.basename(folder).startswith("checkpoint-") and os.path.dirname(folder) == output
        )
        if name and os.path.isdir(name) and (folder == output or own_checkpoint):
            raise ValueError(
                f"output_dir={args.output_dir} would write over the model {name} that the run starts from: "
                "choose another output_dir (to continue an interrupted run, use resume_from_checkpoint)"
            )


def _check_named_base(policy: Policy) -> None:
    """Refuse a live model that differs from the checkpoint that it names: an adapter is saved for that name."""
    name = base_model_name(policy.model)
    if name is None:
        return
    try:
        named = as_policy(load_policy(name, torch_dtype=policy.dtype))
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the adapter will name {name} as its base, which could not be compared with the model: {error}",
            stacklevel=2,
        )
        return
    if fingerprint(named) != fingerprint(policy):
        raise ValueError(
            f"the model names {name} (config._name_or_path) but has other weights, and the adapter would be "
            "saved for the wrong base: pass the folder that it was loaded from, or save it with "
            "save_pretrained and pass that folder"
        )


def _unfreeze_trained(policy: Policy, warn: bool) -> None:
    """Train all that a policy trains, also where PEFT's `merge_and_unload` or another program froze it.

    A live model that is frozen in part is left so, with a warning if `warn`.
    """
    trained = {name: p for name, p in policy.model.named_parameters() if name.startswith(policy.trained)}
    frozen = [name for name, p in trained.items() if not p.requires_grad]
    if warn and 0 < len(frozen) < len(trained):
        warnings.warn(
            f"{len(frozen)} of {len(trained)} weights of the decoder are frozen and stay so, such as "
            f"{frozen[0]}: to train all, call model.decoder.requires_grad_(True)",
            stacklevel=2,
        )
        return
    for parameter in trained.values():
        parameter.requires_grad_(True)


def check_trained(policy: Policy) -> None:
    """Refuse to train what the teacher reads too.

    Raises:
        ValueError: an adapter, or a layer that the text encoder shares with the decoder, outside the decoder.
    """
    named = list(policy.model.named_parameters(remove_duplicate=False))
    encoders = {id(parameter) for name, parameter in named if not name.startswith(policy.trained)}
    for name, parameter in named:
        decoders = name.startswith(policy.trained)
        if (parameter.requires_grad and not decoders) or (decoders and id(parameter) in encoders):
            raise ValueError(
                f"{name} would be trained, but the teacher reads it too: only the decoder may be (target_modules "
                f"such as {', '.join(policy.lora_targets)}; modules_to_save in the decoder)"
            )


def processor_of(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    policy: Policy,
    base_model: str | None,
) -> Any:
    """What is saved with the student: what was given, a tokenizer with the feature extractor of the policy's codec
    beside it, or the processor of the base."""
    if processing_class is None:
        return load_processor(base_model)
    if isinstance(processing_class, ProcessorMixin):
        return processing_class
    return policy.processor_of(processing_class)


def clip_frames(policy: Policy, clip_seconds: float | None) -> int:
    """T of the training clips.

    Args:
        policy: the model, whose generation settings tell its own length.
        clip_seconds: what the user asked for; None takes the model's own length, at most 10 s.

    Raises:
        ValueError: shorter than a frame, or longer than the model's positions.
    """
    rate = policy.frame_rate
    if clip_seconds is None:
        clip_seconds = policy.usual_seconds
    frames = round(clip_seconds * rate)
    if frames < 1:
        raise ValueError(f"clip_seconds={clip_seconds} is shorter than one frame ({1 / rate:g} s)")
    steps = num_decoder_steps(frames, policy.delays)
    if steps > policy.max_steps:
        longest = (policy.max_steps - (steps - frames)) / rate
        raise ValueError(
            f"clip_seconds={clip_seconds} needs {steps} positions, the model has "
            f"{policy.max_steps}: use at most {longest:g}"
        )
    return frames


def check_clips(policy: Policy, args: CFGDiversityConfig) -> int:
    """T of the training clips.

    Raises:
        ValueError: a length that the model cannot play, or more codebooks than a channel of the model has.
    """
    frames = clip_frames(policy, args.clip_seconds)
    there, wanted = max(policy.delays) + 1, args.diversity_codebooks
    if wanted is not None and wanted > there:
        raise ValueError(
            f"diversity_codebooks={wanted}, but the model has {there} codebooks per channel: leave it unset to "
            "reach all of them"
        )
    return frames


def guidance(args: CFGDiversityConfig, num_frames: int) -> float | tuple[float, ...]:
    """γ of the teacher, or of each of T frames; of a range, its reference."""
    scale = args.reference_guidance
    if args.guidance_schedule == "constant" or scale == 1:
        return scale
    return guidance_schedule(args.guidance_schedule, scale, num_frames)


def draw_guidance(guidance: GuidanceRange, seed: int, first: int, num_rows: int, group: int) -> list[float]:
    """γ of every row; the clips of a prompt share it.

    Each is uniform, and those of one rollout are spread evenly: prompt p has the place u + p·0.618… (mod 1) in the
    range, u drawn for the rollout.

    Args:
        guidance: the range.
        seed: of the rollout.
        first: number of the first row among those of all processes.
        num_rows: of this process.
        group: G.
    """
    digest = hashlib.blake2b(f"{seed}/guidance".encode(), digest_size=6).digest()
    start, golden = int.from_bytes(digest, "big") / 2**48, (5**0.5 - 1) / 2
    return [guidance.draw((start + row // group * golden) % 1) for row in range(first, first + num_rows)]


def teach_guidance(policy: Policy, args: CFGDiversityConfig) -> None:
    """Let the student be told γ where the run has a range of it, in place.

    Raises:
        ValueError: the model has nowhere to fold it, or the run and a student that is told γ do not fit.
    """
    if args.guidance_range is not None:
        policy.learn_guidance(args.guidance_range)
    elif policy.shift is not None:
        knots = policy.shift.guidance.knots
        raise ValueError(
            f"the model is a student that is told γ from {knots[0]:g} to {knots[-1]:g}, and guidance_scale="
            f"{args.guidance_scale} is one number: set it to that range, or fold one γ into the model first "
            "(diverse-cfg merge --bake-guidance)"
        )


# ---- the adapter, and what is pushed or sharded ------------------------------------------------------------


def lora_config(peft_config: PeftConfig | None) -> PeftConfig | None:
    """The user's adapter; without targets, it gets a policy's own from `give_targets`.

    Raises:
        ValueError: an adapter that changes the base, or that cannot be merged exactly afterwards.
    """
    if peft_config is None:
        return None
    if not isinstance(peft_config, LoraConfig):
        raise ValueError(f"peft_config is a {type(peft_config).__name__}; only LoraConfig is supported")
    if refused := inexact_options(peft_config):
        raise ValueError(
            f"{', '.join(refused)}: the base below the adapter would no longer be the teacher, or merging would "
            "be silently wrong; use plain LoRA (init_lora_weights=True)"
        )
    for name, value in (("r (lora_r)", peft_config.r), ("lora_alpha", peft_config.lora_alpha)):
        if value <= 0:
            raise ValueError(f"{name}={value}: the adapter would change nothing; it must be above 0")
    if peft_config.bias != "none":
        raise ValueError(
            f"bias={peft_config.bias!r} trains biases of the base itself, which is the teacher: use bias='none'"
        )
    peft_config = copy.deepcopy(peft_config)
    if peft_config.target_modules == "all-linear":
        raise ValueError(
            "target_modules='all-linear' would also adapt the frozen text encoder and the heads; leave it "
            "unset, or name modules of the decoder, such as q_proj, v_proj, fc1"
        )
    if peft_config.lora_dropout:
        raise ValueError(
            f"lora_dropout={peft_config.lora_dropout}: the policy that is sampled must be the one that is "
            "trained; set 0"
        )
    return peft_config


def give_targets(peft_config: PeftConfig | None, policy: Policy) -> None:
    """Give an adapter without targets those of the policy, in place.

    Raises:
        ValueError: a target that is no layer of the model, which PEFT answers with the whole module.
    """
    if not isinstance(peft_config, LoraConfig):
        return
    if peft_config.target_modules is None:
        peft_config.target_modules = list(policy.lora_targets)
    wanted = peft_config.target_modules
    for target in [] if isinstance(wanted, str) else sorted(wanted):  # text is a pattern
        found = [m for name, m in policy.model.named_modules() if f".{name}".endswith(f".{target}")]
        if not found or not all(isinstance(module, nn.Linear | nn.Embedding) for module in found):
            raise ValueError(
                f"target_modules (lora_target_modules) names {target!r}, which is not a linear layer of the model: "
                f"leave it unset, or take some of {', '.join(policy.lora_targets)}"
            )


def check_pushing(args: CFGDiversityConfig, peft_config: PeftConfig | None, base_model: str | None) -> None:
    """Refuse to push an adapter that nobody else could load, and weights that are not the student's.

    Raises:
        ValueError: the adapter's base is a folder of this machine, or checkpoints would be pushed that hold the raw
            weights while the averaged ones are evaluated.
    """
    if args.push_to_hub and args.ema_decay and args.hub_strategy != HubStrategy.END:
        raise ValueError(
            f"hub_strategy={HubStrategy(args.hub_strategy).value!r} pushes the raw weights of checkpoints, and with "
            f"ema_decay={args.ema_decay} the student has the averaged ones: use hub_strategy='end'"
        )
    if args.push_to_hub and peft_config is not None and not is_hub_id(base_model):
        raise ValueError(
            f"push_to_hub=True with a LoRA adapter of {base_model!r}, which others cannot load: train without "
            "it, and publish the full model afterwards (diverse-cfg publish --merged)"
        )


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
    if args.guidance_range is not None and (fsdp is not None or deepspeed is not None):
        raise ValueError(
            f"guidance_scale={args.guidance_scale} with FSDP or DeepSpeed, which save weights without the table of γ: "
            "train on one process or with DDP, or set one number"
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


# ---- the prompts -------------------------------------------------------------------------------------------


def prompt_dataset(
    data: Any, tokenizer: PreTrainedTokenizerBase, name: str, reward_funcs: list[Callable]
) -> Any:
    """A dataset with a checked `prompt` column, from a stream or whatever `load_prompts` takes.

    Args:
        data: the prompts, a dict of several sets of them, or None.
        tokenizer: of the text encoder.
        name: of the argument, for messages.
        reward_funcs: may read the other columns. One with audio or pictures is decoded if a function names it
            as a parameter, and left out if none does.

    Raises:
        ValueError: no rows, no prompts, a prompt that is longer than the text encoder takes, or a column that
            a reward function wants and cannot get. In a stream a row raises when it is reached, the first now.
    """
    if data is None:
        return None
    if isinstance(data, Mapping) and "prompt" not in data:
        return {
            key: prompt_dataset(value, tokenizer, f"{name}[{key!r}]", reward_funcs)
            for key, value in data.items()
        }
    if not isinstance(data, IterableDataset):
        dataset = load_prompts(data)
        require_prompts(list(dataset["prompt"]), tokenizer, f"{name}: ")
        return _readable(dataset, dataset.column_names, name, reward_funcs)

    names = data.column_names or list(next(iter(data), {"prompt": None}))
    check_column(names, None, name)

    def check(row: dict[str, Any], index: int) -> bool:
        check_prompts([row.get("prompt")], name, first=index + 1)
        require_prompts([row["prompt"]], tokenizer, f"{name}, row {index + 1}: ")
        return True

    stream = _readable(data, names, name, reward_funcs).filter(check, with_indices=True)
    if next(iter(stream), None) is None:
        raise ValueError(f"{name} is empty: it holds no prompt")
    return stream


def train_prompts(
    data: Any, tokenizer: PreTrainedTokenizerBase, args: CFGDiversityConfig, reward_funcs: list[Callable]
) -> Any:
    """The training prompts, enough of them to fill a generation batch.

    Raises:
        ValueError: none, or fewer than one rollout needs: TRL would drop them all and train nothing.
    """
    if data is None:
        raise ValueError("train_dataset is required: a dataset, a file, or a list of prompts")
    if isinstance(data, Mapping):  # of splits, or of columns
        stream = data.get("train")
        data = stream if isinstance(stream, IterableDataset) else load_prompts(data)
    dataset = prompt_dataset(data, tokenizer, "train_dataset", reward_funcs)
    needed = args.generation_batch_size // args.num_generations
    found = len(list(itertools.islice(dataset, needed)))
    if found < needed:
        raise ValueError(
            f"train_dataset has {found} prompts, but one rollout takes {needed} (generation_batch_size "
            f"{args.generation_batch_size} / num_generations {args.num_generations}): add prompts or lower "
            "the batch"
        )
    return dataset


def _readable(dataset: Any, names: list[str], name: str, reward_funcs: list[Callable]) -> Any:
    """The dataset without the audio and pictures that no reward function reads."""
    there = set(names) - {"prompt"}
    wanted, open_functions = set(), []
    for function in reward_funcs:
        if _is_ours(function):
            continue  # reads the prompt and the audio
        label = getattr(function, "__name__", type(function).__name__)
        named, is_open = keywords(function)
        wanted |= named.keys()
        open_functions += [label] * is_open
        for parameter in named.values():
            if parameter.name in GIVEN & there:
                raise ValueError(
                    f"{name} has a column {parameter.name!r}, and reward function {label!r} asks for "
                    f"{parameter.name}, which the trainer gives: rename or remove the column"
                )
            elif parameter.name not in GIVEN | there and parameter.default is parameter.empty:
                raise ValueError(
                    f"reward function {label!r} asks for {parameter.name}, which is no column of {name} "
                    f"({', '.join(sorted(there)) or 'it has only prompts'}): add the column, or give the "
                    "parameter a default"
                )
    media = [
        column
        for column, feature in (dataset.features or {}).items()
        if require_decoding(feature) and column not in wanted
    ]
    if media and open_functions:
        logger.warning(
            "%s: the columns %s hold audio or pictures and are left out; a reward function that reads one names "
            "it as a parameter",
            name,
            ", ".join(media),
        )
    # A stream decodes what `remove_columns` takes away.
    return dataset.select_columns([column for column in names if column not in media]) if media else dataset


def _is_ours(function: Callable) -> bool:
    code = function if inspect.isroutine(function) else type(function).__call__
    return (getattr(code, "__module__", None) or "").startswith("diverse_cfg.")


def columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What a reward function gets of the dataset: every column but the prompt."""
    return {name: [row.get(name) for row in rows] for name in rows[0] if name != "prompt"}


def reward_context(clips: Clips, num_generations: int) -> dict[str, Any]:
    """What a reward function gets besides TRL's arguments."""
    return clips.columns | {
        "num_generations": num_generations,
        "sampling_rate": clips.sampling_rate,
        "codes": clips.codes,
        "waveforms": clips.waveforms,
    }


# ---- the rewards -------------------------------------------------------------------------------------------


def check_reward_funcs(reward_funcs: Any, args: CFGDiversityConfig, base_model: str | None) -> list[Callable]:
    """The reward functions as a list, the default one if there is none.

    Raises:
        ValueError: text reward models, an own weight for the diversity reward, diversity without its reward,
            or a pairwise reward that is not built like it.
    """
    if reward_funcs is None:
        reward_funcs = [default_reward(args, base_model)] if args.diversity_coef > 0 else []
    reward_funcs = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    names = [getattr(reward_func, "__name__", type(reward_func).__name__) for reward_func in reward_funcs]
    for reward_func, name in zip(reward_funcs, names, strict=True):
        _check_reward_func(reward_func, name)
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
    encoders = [
        getattr(reward_func, "embedder", None) for reward_func in reward_funcs if is_pairwise(reward_func)
    ]
    if args.prefix_baseline and args.diversity_coef > 0 and hasattr(encoders[0], "distances"):
        raise ValueError(
            f"prefix_baseline compares embeddings of the beginnings of clips, and the first diversity reward is "
            f"{encoders[0].name!r}, which has none: put one with an encoder first, or leave prefix_baseline off"
        )
    if names and args.rollout_source == "teacher":
        logger.warning(
            "rollout_source='teacher': no clip is the student's own, so the rewards of %s are logged and train "
            "nothing; use 'student' or 'mix' to train on them",
            ", ".join(names),
        )
    return reward_funcs


def _check_reward_func(reward_func: Any, name: str) -> None:
    if isinstance(reward_func, str | nn.Module):
        name = reward_func if isinstance(reward_func, str) else name
        raise ValueError(
            f"reward function {name!r} is a text reward model to TRL, and clips are audio: pass a function that "
            "takes waveforms (see diverse_cfg.rewards)"
        )
    if not callable(reward_func):
        raise ValueError(f"reward function {reward_func!r} is not callable")
    embedder = getattr(reward_func, "embedder", None)
    whole = hasattr(embedder, "embed") and getattr(embedder, "reads", None) in ("codes", "waveforms")
    whole = whole and hasattr(reward_func, "embeddings") and hasattr(reward_func, "distances")
    if is_pairwise(reward_func) and not whole:
        raise ValueError(
            f"reward function {name!r} is pairwise, and so needs an embedder (with embed, reads and "
            "sampling_rate) and the attributes embeddings and distances: derive it from DiversityReward, or "
            "leave pairwise off"
        )


def check_run(
    args: CFGDiversityConfig,
    reward_funcs: list[Callable],
    given: bool,
    eval_dataset: Any = None,
    own_teacher: bool = True,
) -> None:
    """What the settings alone cannot tell: whether evaluations can run, and which settings are without effect.

    Args:
        args: the settings.
        reward_funcs: all of them.
        given: whether the user passed them.
        eval_dataset: the held-out prompts, if any.
        own_teacher: whether the teacher is another model than the student's start.

    Raises:
        ValueError: an evaluation would fail when its turn comes, or the loss is 0 from the start.
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
    if not (own_teacher or run.rewarded or args.guidance_range) and args.guidance_scale == 1:
        raise ValueError(
            "guidance_scale=1 without teacher_model and without a reward that counts: the student is its own teacher "
            "and there is nothing to train; raise guidance_scale or diversity_coef, or set teacher_model"
        )
    if args.process_index == 0 and (idle := idle_settings(args, run)):
        warnings.warn("; ".join(idle), UserWarning, stacklevel=3)


def check_embedders(reward_funcs: list[Callable], rate: int) -> None:
    """Embedders of the diversity rewards against the codec of the policy, which plays at `rate` Hz.

    Raises:
        ValueError: no usable sampling rate, or an encoder of another codec's codes.
    """
    for embedder in [function.embedder for function in reward_funcs if is_pairwise(function)]:
        name = getattr(embedder, "name", type(embedder).__name__)
        found = getattr(embedder, "sampling_rate", None)
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
        if any(candidate and same_base(candidate, str(nano_path())) for candidate in candidates):
            return str(nano_path("reward-encoder"))
    except FileNotFoundError:
        pass  # an installation without the nano world
    return DEFAULT_CLAP
