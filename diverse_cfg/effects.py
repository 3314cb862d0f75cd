"""Which settings act here: the table of every setting of `CFGDiversityConfig`, TRL's and transformers' included.

One rule: a setting that differs from its default and cannot act is not taken in silence. What nothing here can
make act is refused; what waits for another setting is warned about. A test holds the table against all fields of
the installed TRL and transformers, so that a new one gets its place here first.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

# Settings that act alone, or by the machine that they meet: a recipe is to run on one process and on many.
ACTS = """
    output_dir seed full_determinism use_cpu resume_from_checkpoint local_rank
    per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps generation_batch_size
    steps_per_generation num_generations num_iterations max_steps
    learning_rate lr_scheduler_type optim weight_decay max_grad_norm reward_weights temperature
    bf16 fp16 tf32 gradient_checkpointing activation_checkpointing torch_empty_cache_steps
    logging_strategy logging_first_step logging_nan_inf_filter log_level log_level_replica log_on_each_node
    disable_tqdm report_to skip_memory_metrics
    eval_strategy eval_on_start
    save_strategy save_on_each_node enable_jit_checkpoint
    push_to_hub hub_private_repo
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
    remove_unused_columns shuffle_dataset accelerator_config parallelism_config ddp_backend fsdp deepspeed
    guidance_scale diversity_coef distillation_coef divergence rollout_source teacher_model clip_seconds
    ema_decay adaptive_clip loss_chunk_size rollout_batch_size rollout_backend
    model_name_or_path use_peft reward_funcs dataset_* eval_dataset_name
    silence_dbfs max_silence max_clipping max_flatness distance_quantile gate quality_product
""".split()  # noqa: SIM905 - one name a line would be a hundred lines


class Run(NamedTuple):
    """What only the trainer knows.

    Args:
        rewarded: some reward has a weight.
        held_out: there are prompts to evaluate on.
        guarded: the diversity reward has the guards of the settings.
        embeds: the default diversity reward is built, or rewards were given that may have read the settings.
    """

    rewarded: bool
    held_out: bool
    guarded: bool
    embeds: bool


@dataclass(frozen=True)
class _Idle:
    """Settings that do nothing, or nothing yet.

    Args:
        names: of the settings, as patterns with spaces between them.
        why: why not, and what to do.
        acts: whether they do with the other settings; None is never.
        off: values that ask for nothing, beside the default.
        acts_in: as `acts`, for what only the trainer knows.
    """

    names: str
    why: str
    acts: Callable[[Any], bool] | None = None
    off: tuple[Any, ...] = field(default=())
    acts_in: Callable[[Run], bool] | None = None

    @property
    def never(self) -> bool:
        """Whether no other setting makes these act."""
        return self.acts is None and self.acts_in is None


_TEXT = "it serves text models; leave it unset, the package has its own rollout of codes"
_SHARPER = "the loss assumes the distribution that was sampled; train without, set it at inference"
_NO_PREDICTIONS = "an evaluation keeps metrics, and no predictions or labels; leave it unset"
_TABLES = ("wandb", "trackio")

# Names of settings that nothing here can make act → why, and what to do.
_NEVER = {
    "use_vllm": "vLLM does not run MusicGen; leave it off, the package has its own fast rollout",
    "vllm_*": "vLLM does not run MusicGen; leave it unset",
    "use_transformers_* transformers_continuous_batching_config cache_implementation": _TEXT,
    "use_liger_kernel liger_kernel_config": "Liger has no MusicGen kernels; the loss is already chunked",
    "beta": "it would load a second reference model; the guided teacher is the anchor, leave it 0",
    "sync_ref_model ref_model_*": "the teacher is the frozen initial model; leave it unset",
    "max_completion_length": "it is a setting for text: set clip_seconds",
    "mask_truncated_completions": "clips have a fixed length and no end token; leave it off",
    "pad_to_multiple_of": "clips have a fixed length; leave it unset",
    "chat_template_kwargs": "prompts are plain captions; leave it unset",
    "log_multimodal": "prompts are plain captions; leave it unset",
    "normalize_advantages": "dividing advantages by their spread changes what diversity_coef means; leave it off",
    "reward_clip_range": "clipping rewards biases the diversity gradient; leave it unset",
    "repetition_penalty top_k top_p": _SHARPER,
    "min_p": _SHARPER,
    "generation_kwargs": "sampling is set by temperature and clip_seconds; leave it unset",
    "router_aux_loss_coef": "MusicGen is no mixture of experts; leave it unset",
    "torch_compile torch_compile_*": "the rollout and the loss replace the model's forward; leave it off",
    "model_init_kwargs": "the trainer loads in float32 by itself; pass a loaded model to decide otherwise",
    "trust_remote_code": "code from a repository is never run; leave it off",
    "disable_dropout": "there is no dropout: what is sampled is what is trained; leave it off",
    "ds3_gather_for_generation": "ZeRO-3 is not supported; leave it unset, and take ZeRO-2 or FSDP2",
    "label_smoothing_factor label_names": "there are no labels, the teacher is the target; leave it unset",
    "average_tokens_across_devices": "every clip has the same number of codes; leave it unset",
    "neftune_noise_alpha": "codes have several embeddings, which take no noise; leave it unset",
    "use_cache": "the loss needs no cache, and a rollout always has its own; leave it unset",
    "include_num_input_tokens_seen": "clips have a fixed length, so steps tell it; leave it unset",
    "auto_find_batch_size": "a smaller batch would split prompt groups: set rollout_batch_size, or lower "
    "per_device_train_batch_size",
    "bf16_full_eval fp16_full_eval": "evaluations during training ignore it, and others would round the student; "
    "set bf16 instead",
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object": _NO_PREDICTIONS,
    "eval_accumulation_steps include_for_metrics batch_eval_metrics": _NO_PREDICTIONS,
    "data_seed train_sampling_strategy length_column_name": "the sampler repeats prompts and is shuffled by seed "
    "alone; leave it unset",
    "debug": "its hooks fail on MusicGen's masks; leave it unset",
    "do_train": "this trainer always trains; leave it off",
    "do_predict": "an evaluation is all there is beside training; leave it off",
}
# Of these: values that ask for nothing, beside the default.
_OFF: dict[str, tuple[Any, ...]] = {
    "vllm_*": ("colocate", "server"),
    "pad_to_multiple_of": (None, "auto"),
    "chat_template_kwargs": ({},),
    "min_p": (0,),
    "generation_kwargs": ({},),
    "router_aux_loss_coef": (None, 0, 0.001),
    "disable_dropout": (True,),
    "average_tokens_across_devices": (False,),
    "include_num_input_tokens_seen": (False, "no"),
    "debug": (None, []),
    "do_train": (True,),
}

RULES = (
    *(_Idle(names, why, off=_OFF.get(names, ())) for names, why in _NEVER.items()),
    # ---- only with another setting
    _Idle("num_train_epochs", "max_steps decides the length: set one of the two", lambda a: a.max_steps <= 0),
    _Idle(
        "warmup_steps warmup_ratio",
        "this lr_scheduler_type has no warm-up: take constant_with_warmup, linear or cosine",
        lambda a: a.lr_scheduler_type not in ("constant", "reduce_lr_on_plateau", "greedy"),
    ),
    _Idle(
        "lr_scheduler_kwargs",
        "a constant learning rate takes none: choose another lr_scheduler_type",
        lambda a: not a.lr_scheduler_type.startswith("constant"),
        off=({},),
    ),
    _Idle(
        "adam_beta1 adam_beta2 adam_epsilon",
        "this optim does not read it: take adamw_torch",
        lambda a: bool(re.search("^(?!galore|grok).*(adamw|ademamix|radam|lion)", a.optim)),
    ),
    _Idle(
        "optim_args",
        "this optim takes none: adam_beta1, adam_beta2, adam_epsilon and weight_decay are settings themselves",
        lambda a: bool(
            re.search("sgd|adag|rmsp|galore|apollo|grok|torch_[48]|any|demamix|free|stable", a.optim)
        ),
    ),
    _Idle(
        "optim_target_modules",
        "it is for optim=galore_… and apollo_…: choose one of them",
        lambda a: bool(re.search("galore|apollo", a.optim)),
    ),
    _Idle(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        "set gradient_checkpointing",
        lambda a: bool(a.gradient_checkpointing),
    ),
    _Idle("logging_steps", "it needs logging_strategy=steps", lambda a: a.logging_strategy == "steps"),
    _Idle("eval_steps", "it needs eval_strategy=steps", lambda a: a.eval_strategy == "steps"),
    _Idle("eval_delay do_eval", "set eval_strategy", lambda a: a.eval_strategy != "no"),
    _Idle("save_steps", "it needs save_strategy=steps", lambda a: a.save_strategy == "steps"),
    _Idle("save_total_limit save_only_model", "set save_strategy", lambda a: a.save_strategy != "no"),
    _Idle(
        "load_best_model_at_end metric_for_best_model",
        "set eval_strategy, and save_strategy to the same",
        lambda a: a.eval_strategy != "no",
        off=("loss",),  # what transformers fills in
    ),
    _Idle("greater_is_better", "set metric_for_best_model", lambda a: a.metric_for_best_model is not None),
    _Idle(
        "hub_strategy hub_always_push hub_model_id hub_token hub_revision",
        "set push_to_hub",
        lambda a: a.push_to_hub,
    ),
    _Idle(
        "ignore_data_skip restore_callback_states_from_checkpoint",
        "it acts when a run is continued: set resume_from_checkpoint",
        lambda a: bool(a.resume_from_checkpoint),
    ),
    _Idle("fsdp_*", "set fsdp", lambda a: bool(a.fsdp)),
    _Idle(
        "ddp_[!b]* ddp_b[ru]*",  # all but ddp_backend, which fails without others
        "it is for several processes: start them with --num_processes",
        lambda a: a.world_size > 1,
    ),
    _Idle("run_name", "set report_to", lambda a: bool(a.report_to)),
    _Idle("project trackio_*", "it needs report_to=trackio", lambda a: "trackio" in a.report_to),
    _Idle(
        "log_completions",
        "it needs the package rich, or report_to=wandb or trackio",
        lambda a: bool(importlib.util.find_spec("rich")) or any(name in a.report_to for name in _TABLES),
    ),
    _Idle("num_completions_to_print", "set log_completions", lambda a: a.log_completions),
    _Idle(
        "log_unique_prompts",
        "it needs log_completions, and report_to=wandb or trackio",
        lambda a: a.log_completions and any(name in a.report_to for name in _TABLES),
    ),
    _Idle(
        "dataloader_persistent_workers dataloader_multiprocessing_context dataloader_in_order",
        "set dataloader_num_workers",
        lambda a: a.dataloader_num_workers > 0,
    ),
    _Idle(
        "epsilon epsilon_high",
        "every clip is trained on once, before the policy changes: raise num_iterations or steps_per_generation",
        lambda a: a.gradient_accumulation_steps % (a.steps_per_generation * a.num_iterations) != 0,
    ),
    # ---- this method's own
    _Idle(
        "negative_prompt guidance_schedule",
        "guidance_scale=1 guides away from nothing: raise it",
        lambda a: a.reference_guidance > 1,
    ),
    _Idle("jsd_alpha", "it needs divergence=generalized_jsd", lambda a: a.divergence == "generalized_jsd"),
    _Idle("teacher_fraction", "it needs rollout_source=mix", lambda a: a.rollout_source == "mix"),
    _Idle("sequence_score", "it needs distillation_coef above 0", lambda a: a.distillation_coef > 0),
    _Idle("diversity_codebooks prefix_baseline", "set diversity_coef", lambda a: a.diversity_coef > 0),
    _Idle(
        "guards",
        "set diversity_coef, and pass them to a DiversityReward of your own: DiversityReward(embedder, guards)",
        lambda a: a.diversity_coef > 0 or not a.guards.active,
        acts_in=lambda run: run.guarded,
    ),
    _Idle(
        "prefix_lambda",
        "it needs prefix_baseline=true and diversity_coef above 0",
        lambda a: a.prefix_baseline and a.diversity_coef > 0,
    ),
    _Idle("gate_quantile", "it needs guards.gate", lambda guards: guards.gate is not None),
    # ---- of `diverse-cfg train`
    _Idle("lora_*", "set use_peft", lambda a: a.use_peft),
    # ---- by what the trainer is given
    _Idle(
        "term_norm_steps",
        "no reward counts, so there is one term: set diversity_coef or pass rewards",
        acts_in=lambda run: run.rewarded,
    ),
    _Idle(
        "diversity_embedder",
        "there is no diversity reward: set diversity_coef",
        acts_in=lambda run: run.embeds,
    ),
    _Idle(
        "monitor_embedder audio_samples alarms num_generations_eval",
        "it acts at evaluations: give held-out prompts",
        acts_in=lambda run: run.held_out,
        off=(0,),
    ),
)


def _rule_of(name: str) -> _Idle | None:
    """The rule of a setting; None for one that acts, or that this table does not know.

    Raises:
        ValueError: several rules.
    """
    found = [rule for rule in RULES if any(fnmatchcase(name, pattern) for pattern in rule.names.split())]
    if len(found) > 1:
        raise ValueError(f"{name} has {len(found)} rules")
    return found[0] if found else None


def refused_settings(settings: Any) -> list[str]:
    """What to say of every setting that was changed and never acts."""
    return [f"{what} is not supported: {rule.why}" for rule, what in _changed(settings) if rule.never]


def idle_settings(settings: Any, run: Run | None = None) -> list[str]:
    """What to say of every setting that was changed and waits for another.

    Args:
        settings: a dataclass of settings.
        run: what the trainer knows; then only what depends on that is looked at.
    """
    said = []
    for rule, what in _changed(settings):
        acts, known = (rule.acts, settings) if run is None else (rule.acts_in, run)
        if acts is not None and not acts(known):
            said.append(f"{what} has no effect: {rule.why}")
    return said


def unfinished_warmup(settings: Any) -> list[str]:
    """What to say of a warm-up that takes the whole run: the student stays close to its start."""
    rule, steps = _rule_of("warmup_steps"), settings.max_steps
    if (
        rule is None
        or rule.acts is None
        or not rule.acts(settings)
        or not 1 <= steps <= settings.warmup_steps
    ):
        return []
    return [
        f"warmup_steps={settings.warmup_steps:g} is not over when max_steps={steps} ends the run: learning_rate is "
        "never reached, and the first step has 0; lower it, or raise max_steps"
    ]


def _shown(value: Any) -> Any:
    """A value as a person writes it: of a group of settings, those that were changed."""
    if is_dataclass(value):
        return {f.name: got for f in fields(value) if (got := getattr(value, f.name)) != f.default}
    return getattr(value, "value", value)


def _changed(settings: Any) -> Iterator[tuple[_Idle, str]]:
    for item in fields(settings):
        rule, value = _rule_of(item.name), getattr(settings, item.name)
        default = item.default if item.default_factory is MISSING else item.default_factory()
        if rule is not None and value != default and all(value != off for off in rule.off):
            secret = item.name.endswith("token")
            yield rule, item.name if secret else f"{item.name}={_shown(value)!r}"
