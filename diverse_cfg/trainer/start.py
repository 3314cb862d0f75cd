"""The model that a run starts from: what is trained of it, what must stay as it is, and whose teacher it is.

MusicGen looks to TRL and transformers like a text model with a strange configuration. `TrainerFacingConfig`
and `TokenIds` keep their text habits off it, without changing what is saved.
"""

import copy
import os
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import (
    EncodecFeatureExtractor,
    MusicgenConfig,
    MusicgenForConditionalGeneration,
    MusicgenProcessor,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.trainer_utils import HubStrategy

from diverse_cfg.cards import is_hub_id
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.policies.checkpoints import inexact_options
from diverse_cfg.policies.loading import is_distilled, load_policy, load_processor
from diverse_cfg.policies.musicgen.model import LORA_TARGET_MODULES, unwrap
from diverse_cfg.policies.policy import as_policy
from diverse_cfg.trainer.teacher import fingerprint

# What is trained: all else of a model is the teacher's too.
_TRAINED = ("decoder.", "enc_to_dec_proj.")


class TrainerFacingConfig(MusicgenConfig):
    """A MusicGen configuration that can be asked for "the" text configuration.

    MusicGen has two candidates and refuses to choose, while TRL and transformers read it and write T5's token
    ids into it. They get a throw-away copy of the decoder's. Saved, this is an ordinary MusicGen
    configuration.
    """

    def get_text_config(self, *_: Any, **__: Any):
        return copy.deepcopy(self.decoder)


def prepare_policy(
    model: str | os.PathLike | nn.Module, args: CFGDiversityConfig, lora: bool
) -> MusicgenForConditionalGeneration:
    """Load or take the policy: float32, no dropout, encoders frozen, generation settings of a distilled
    model.

    Raises:
        ValueError: a `PeftModel`, the command line's `nano`, or whatever `load_policy` refuses.
    """
    _check_output(model, args)
    if isinstance(model, PeftModel):
        raise ValueError(
            "model is a ready-made PeftModel, of which TRL would add a second adapter as reference: pass the "
            "base model and peft_config=LoraConfig(...) (merge an adapter that you want to continue from "
            "first)"
        )
    if isinstance(model, nn.Module):
        policy = unwrap(model)
        if any(isinstance(module, BaseTunerLayer) for module in policy.modules()):
            raise ValueError(
                "the model still has adapters inside, which would be saved as weights of its own: pass what "
                "PeftModel.merge_and_unload() returns"
            )
        policy.name_or_path = policy.config._name_or_path or ""  # by which an adapter names its base
        if lora:
            _check_named_base(policy)
    elif os.fspath(model) == "nano" and not os.path.isdir(model):
        raise ValueError("there is no folder nano; in Python use diverse_cfg.nano_path()")
    # Half precision is widened, since steps of the usual size vanish in it.
    own = unwrap(model).decoder.dtype if isinstance(model, nn.Module) else torch.float32
    policy = load_policy(model, torch_dtype=torch.promote_types(own, torch.float32))
    as_policy(policy).freeze()
    _unfreeze_decoder(policy, warn=isinstance(model, nn.Module) and not lora)
    policy.config.__class__ = TrainerFacingConfig
    if args.device.type == "cpu":
        # At clip lengths of a CPU run, fused attention's backward pass is twice as slow as plain matrix
        # products.
        policy.decoder.set_attn_implementation("eager")
    return policy


def _check_output(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig) -> None:
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


def _check_named_base(policy: MusicgenForConditionalGeneration) -> None:
    """Refuse a live model that differs from the checkpoint that it names: an adapter is saved for that name."""
    name = base_model_name(policy)
    if name is None:
        return
    try:
        named = load_policy(name, torch_dtype=policy.decoder.dtype)
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


def _unfreeze_decoder(policy: MusicgenForConditionalGeneration, warn: bool) -> None:
    """Train all of the decoder, also where PEFT's `merge_and_unload` or another program froze it.

    A live model that is frozen in part is left so, with a warning if `warn`.
    """
    trained = {name: p for name, p in policy.named_parameters() if name.startswith(_TRAINED)}
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


def check_trained(policy: MusicgenForConditionalGeneration) -> None:
    """Refuse to train what the teacher reads too.

    Raises:
        ValueError: an adapter, or a layer that the text encoder shares with the decoder, outside the decoder.
    """
    encoders = {id(p) for part in (policy.text_encoder, policy.audio_encoder) for p in part.parameters()}
    for name, parameter in policy.named_parameters(remove_duplicate=False):
        decoders = name.startswith(_TRAINED)
        if (parameter.requires_grad and not decoders) or (decoders and id(parameter) in encoders):
            raise ValueError(
                f"{name} would be trained, but the teacher reads it too: only the decoder may be (target_modules "
                f"such as {', '.join(LORA_TARGET_MODULES)}; modules_to_save in the decoder)"
            )


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


def has_own_teacher(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig) -> bool:
    """Whether the teacher is another model than the student's start.

    A live model may have other weights than the folder that it names.
    """
    if args.teacher_model is None:
        return False
    return isinstance(model, nn.Module) or not same_model(args.teacher_model, os.fspath(model))


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
    as_policy(policy).set_sampling(sampling)


def lora_config(peft_config: PeftConfig | None) -> PeftConfig | None:
    """The user's adapter with the decoder's own projections as default targets.

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
    if peft_config.bias != "none":
        raise ValueError(
            f"bias={peft_config.bias!r} trains biases of the base itself, which is the teacher: use bias='none'"
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


def processor_of(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin | None,
    policy: MusicgenForConditionalGeneration,
    base_model: str | None,
) -> ProcessorMixin:
    """What is saved with the student: what was given, a tokenizer with the feature extractor of the policy's codec
    beside it, or the processor of the base."""
    if processing_class is None:
        return load_processor(base_model)
    if isinstance(processing_class, ProcessorMixin):
        return processing_class
    channels, rate = policy.config.decoder.audio_channels, policy.config.audio_encoder.sampling_rate
    features = EncodecFeatureExtractor(feature_size=channels, sampling_rate=rate)
    return MusicgenProcessor(features, processing_class)


def same_model(first: str | None, second: str | None) -> bool:
    """Whether two ids or folders name one checkpoint."""
    if first is None or second is None:
        return False
    if os.path.isdir(first) and os.path.isdir(second):
        return os.path.samefile(first, second)
    return first == second
