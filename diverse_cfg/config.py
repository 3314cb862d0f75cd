"""`CFGDiversityConfig`: what the paper names, on top of TRL's `RLOOConfig`.

Everything that is not listed here (learning rate, batch size, steps, logging, saving) keeps TRL's or
transformers' name. The paper's symbols: γ is `guidance_scale`, β is `diversity_coef`, G is `num_generations`;
λ belongs to merging and is not a training setting.
"""

import functools
import inspect
import json
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments
from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy
from trl import RLOOConfig

from diverse_cfg.effects import idle_settings, refused_settings, unfinished_warmup
from diverse_cfg.functional.divergence import DIVERGENCES
from diverse_cfg.functional.guidance import GuidanceRange, guidance_schedule
from diverse_cfg.settings import field_types, parse_settings, require_settings, require_type
from diverse_cfg.types import ROLLOUT_BACKENDS

# Of these transformers passes over an argument that it does not know.
_OPTIMIZERS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}
# What torchrun, accelerate and MPI tell the processes that they start.
_LAUNCHED = ("LOCAL_RANK", "WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
ROLLOUT_SOURCES = ("student", "teacher", "mix")


@dataclass
class GuardConfig:
    """Guards against reward hacking. All off: the paper has none.

    Each limits what the diversity reward may pay for, and keeps it a function of pairs of clips, so that its
    gradient stays unbiased.

    Args:
        silence_dbfs: clips quieter than this RMS level (dB of full scale, −50 say) earn no diversity.
        max_silence: clips with a larger share of silent frames (20 ms below −60 dBFS; 0.3, say) earn none: a
            tail of silence sets clips apart as well as music does.
        max_clipping: clips with a larger share of samples at full scale (0.01, say) earn none.
        max_flatness: clips with a larger spectral flatness (white noise has 1, tones 0; 0.5, say) earn none.
        distance_quantile: distances count up to this quantile (0.95, say) of those of the unguided base,
            measured before training.
        gate: name of a reward function (text_adherence, say); clips that it rates below what `gate_quantile`
            of the teacher's clips reach, measured before training, earn none.
        gate_quantile: see `gate`.
        quality_product: name of a reward function, with values ≥ 0; distances are multiplied by those of both
            clips, after DARLING (arXiv 2509.02534), instead of adding the two.
    """

    silence_dbfs: float | None = None
    max_silence: float | None = None
    max_clipping: float | None = None
    max_flatness: float | None = None
    distance_quantile: float | None = None
    gate: str | None = None
    gate_quantile: float = 0.05
    quality_product: str | None = None

    def __post_init__(self):
        for name, annotation in field_types(GuardConfig).items():
            require_type(f"guards.{name}", getattr(self, name), annotation)
        for name in ("distance_quantile", "gate_quantile", "max_silence", "max_clipping", "max_flatness"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"guards.{name}={value!r} must lie between 0 and 1")

    @classmethod
    def from_dict(cls, values: "dict[str, Any] | GuardConfig | None") -> "GuardConfig":
        """Build from the nested YAML group, refusing names that do not exist."""
        if isinstance(values, cls):
            return values
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values or {}) - known)
        if unknown:
            raise ValueError(f"guards has no field {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**(values or {}))

    @property
    def listens(self) -> bool:
        """Whether a guard needs the audio."""
        limits = (self.silence_dbfs, self.max_silence, self.max_clipping, self.max_flatness)
        return any(limit is not None for limit in limits)

    @property
    def calibrated(self) -> bool:
        """Whether a limit is measured on clips of the base or the teacher before training."""
        return self.distance_quantile is not None or self.gate is not None

    @property
    def active(self) -> bool:
        """Whether any guard is on."""
        return self.listens or self.calibrated or self.quality_product is not None


@dataclass
class CFGDiversityConfig(RLOOConfig):
    r"""Settings of `CFGDiversityTrainer`: maximise Q(θ) + β·D(θ) (arXiv 2410.06084).

    Q is minus the divergence to the guided teacher, summed over the codes of a clip; D is the mean
    embedding distance between two clips of one prompt. The loss divides *both* by the number of codes in
    a clip, so that `diversity_coef` keeps the paper's meaning. Since the divergence grows with the clip
    and the distance does not, a value of `diversity_coef` belongs to a clip length.

    Args:
        num_generations: G, clips per prompt; at least 3 when diversity is on.
        gradient_checkpointing: trade compute for memory: recompute activations in the backward pass.
        beta: not used, the teacher is the anchor; must stay 0.
        learning_rate: the initial learning rate for AdamW.
        adam_beta2: AdamW's second momentum.
        max_completion_length: not used, set clip_seconds; must stay unset.
        hub_private_repo: create the repository private. An existing one stays as it is.
        hub_strategy: what is pushed and when; at the end, the finished student with its card.
        guidance_scale: γ of the teacher, `l_null + γ·(l_cond − l_null)`; the paper uses 3. `{low: 1, high: 5}`, or a
            list: each prompt draws its own, the student is told it, and plays any of them afterwards.
        guidance_schedule: γ over the frames of a clip: "constant" (the paper), "linear" or "cosine" down to 1, or
            "interval A B" of places in [0, 1].
        diversity_coef: β, weight of the diversity reward in units of the KL summed over positions; the
            paper trains {0, 5, 10, 15}. 0 is pure distillation.
        distillation_coef: weight of Q; 1 in the paper, 0 leaves pure diversity.
        negative_prompt: text whose logits take the place of the null prompt's in the teacher ("bad audio
            quality").
        divergence: "reverse_kl" (the paper), "forward_kl" or "generalized_jsd".
        jsd_alpha: α of the generalised JSD, mixture α·student + (1 − α)·teacher.
        rollout_source: who samples the clips: "student" (the paper), "teacher" (guided), or "mix".
        teacher_fraction: share of the prompts whose clips come from the teacher when `rollout_source="mix"`.
        teacher_model: θ0, id or folder, when the run does not start from it (a β > 0 run that continues a
            β = 0 student, say). None: the initial model.
        clip_seconds: length of the training clips. None: the model's own length, at most 10 s.
        diversity_embedder: id or folder of the encoder E of the default diversity reward. None: the
            encoder that is shipped for the nano base, else CLAP.
        monitor_embedder: second encoder, never rewarded: its distance is logged and feeds the alarms.
        diversity_codebooks: how many leading codebooks the diversity's policy gradient reaches; the others
            follow the teacher alone. None: all, as in the paper. The first codebooks decide the music, the
            later ones add mostly noise to the gradient (of both channels of a stereo model alike).
        prefix_baseline: subtract what the clip's first 13/27/40/60/80 % already tell about its reward. A
            variance reducer that is not in the paper.
        prefix_lambda: λ of its segment-wise generalised advantage estimate; 1 is unbiased, less is calmer.
        ema_decay: decay d of an average of the weights, min(d, (1 + t)/(10 + t)) at step t. It is what is
            evaluated and saved, and the model has it after training; checkpoints hold the raw weights too, to
            resume from. 0 is off.
        adaptive_clip: clip the gradient at this multiple of its running mean norm. None: `max_grad_norm`
            alone.
        sequence_score: also differentiate through the sampling (the future divergence as a return, as in
            MiniLLM, arXiv 2306.08543). An ablation: the paper and GKD stop that gradient.
        term_norm_steps: every so many steps, log the gradient norms of both terms; costs two more
            backward passes then. 0 is off.
        loss_chunk_size: decoder steps whose distributions are held at once.
        rollout_batch_size: clips sampled at once. None: up to 64 on a CPU and 256 on a GPU, fewer when their
            caches would take too much memory.
        rollout_backend: "fast", the package's own loop, or "transformers", stock `generate`: the same clips up
            to rounding, slowly, and also from a model that the loop refuses. Not with FSDP.
        audio_samples: clips written to disk and to the trackers at every evaluation.
        alarms: warn at evaluation when the reward is being hacked (see `callbacks.RewardHackingAlarm`).
        guards: against reward hacking, a nested group, all off by default: see `GuardConfig`.

    `eval_loss`, by which `load_best_model_at_end` chooses unless `metric_for_best_model` is set, is the objective
    per code: `distillation_coef`·(divergence per code) − (β·diversity + Σ weight·reward) / (codes of a clip).

    A setting that cannot act, of TRL's and transformers' too, is refused, or warned about where another setting
    would make it act: `diverse_cfg.effects` is the table.

    With `push_to_hub=True` the repository is created private (transformers' own default is the account's,
    mostly public) and receives the finished student, not every checkpoint: set `hub_private_repo` and
    `hub_strategy` to change it.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [*RLOOConfig._VALID_DICT_FIELDS, "guards"]

    # TRL's and transformers' own, with defaults that fit this method.
    num_generations: int | None = 4
    gradient_checkpointing: bool | None = None
    beta: float = 0.0
    learning_rate: float = 3e-6
    adam_beta2: float = 0.95
    max_completion_length: int | None = None
    hub_private_repo: bool | None = True
    hub_strategy: HubStrategy | str = "end"

    guidance_scale: float | str | list[float] | dict[str, float] = 3.0
    guidance_schedule: str = "constant"
    diversity_coef: float = 5.0
    distillation_coef: float = 1.0
    negative_prompt: str | None = None
    divergence: str = "reverse_kl"
    jsd_alpha: float = 0.5
    rollout_source: str = "student"
    teacher_fraction: float = 0.5
    teacher_model: str | None = None
    clip_seconds: float | None = None
    diversity_embedder: str | None = None
    monitor_embedder: str | None = None
    diversity_codebooks: int | None = None
    prefix_baseline: bool = False
    prefix_lambda: float = 1.0
    ema_decay: float = 0.0
    adaptive_clip: float | None = None
    sequence_score: bool = False
    term_norm_steps: int = 0
    loss_chunk_size: int = 256
    rollout_batch_size: int | None = None
    rollout_backend: str = "fast"
    audio_samples: int = 4
    alarms: bool = True
    guards: dict[str, Any] | str | None = None

    def __post_init__(self):
        if refused := refused_settings(self):
            raise ValueError("; ".join(refused))
        if isinstance(self.guards, str):  # of a command line; TRL would ask for JSON
            self.guards = parse_settings(self.guards, "guards")
        if isinstance(self.guidance_scale, str):  # of a command line
            text = f"guidance_scale: {self.guidance_scale}"
            self.guidance_scale = parse_settings(text, "guidance_scale")["guidance_scale"]
        _check_json(self)
        _check_processes(self)
        self._check_values()
        if self.eval_strategy != "no" or self.eval_on_start or self.do_eval:
            self.check_evaluation()
        # TRL reads an integer in a few places; the trainer sets it to the codes of a clip.
        self.max_completion_length = 1
        _choose_bf16(self)
        _check_optim_args(self)
        super().__post_init__()
        self.guards = GuardConfig.from_dict(self.guards)
        self._check_groups()
        _check_schedule(self)
        idle = idle_settings(self) + idle_settings(self.guards) + unfinished_warmup(self)
        if self.process_index == 0 and idle:
            warnings.warn("; ".join(idle), UserWarning, stacklevel=3)

    @property
    def guidance_range(self) -> GuidanceRange | None:
        """The γ that one student learns and is told; None where γ is one number."""
        one = isinstance(self.guidance_scale, int | float)
        return None if one else GuidanceRange.of(self.guidance_scale)

    @property
    def reference_guidance(self) -> float:
        """γ; of a range, that of a player who tells none."""
        if isinstance(self.guidance_scale, int | float):
            return self.guidance_scale
        return GuidanceRange.of(self.guidance_scale).reference

    def to_dict(self) -> dict[str, Any]:
        """As `TrainingArguments.to_dict`, with the guards as plain values."""
        values = super().to_dict()
        values["guards"] = dict(vars(GuardConfig.from_dict(values["guards"])))
        return values

    def _check_values(self) -> None:
        _check_types(self, CFGDiversityConfig)
        _ = self.guidance_range
        if self.diversity_coef == 0 and self.distillation_coef == 0:
            raise ValueError("diversity_coef and distillation_coef are both 0: there is nothing to train")
        if self.negative_prompt is not None and not self.negative_prompt.strip():
            raise ValueError(
                f"negative_prompt={self.negative_prompt!r} has no text: leave it unset for no text"
            )
        if self.rollout_source == "teacher" and self.diversity_coef > 0:
            raise ValueError(
                f"diversity_coef={self.diversity_coef} with rollout_source='teacher': no clip is the "
                "student's own, so there is no policy gradient; use 'student' or 'mix', or set "
                "diversity_coef=0"
            )

        if self.sequence_score and self.rollout_source != "student":
            raise ValueError(
                f"sequence_score=True with rollout_source={self.rollout_source!r}: only the student's own "
                "clips have a gradient through the sampling; use rollout_source='student'"
            )

    def check_evaluation(self, pairs: bool | None = None) -> None:
        """Refuse evaluations that would fail when their turn comes: every process takes whole prompt groups.

        Args:
            pairs: whether a reward compares the clips of a prompt; None asks `diversity_coef`.
        """
        group = self.num_generations_eval or self.num_generations or 1
        if self.per_device_eval_batch_size % group:
            raise ValueError(
                f"per_device_eval_batch_size={self.per_device_eval_batch_size} is not divisible by the {group} clips "
                "of a prompt (num_generations_eval, else num_generations), which must stay on one process: take "
                f"{-(-self.per_device_eval_batch_size // group) * group}"
            )
        if group < 2 and (self.diversity_coef > 0 if pairs is None else pairs):
            raise ValueError(
                f"num_generations_eval={group}: diversity is a distance between two clips of a prompt; take at "
                "least 2"
            )

    def _check_groups(self) -> None:
        """Whole prompt groups on every process: a reward function sees the clips of one process."""
        if self.diversity_coef > 0 and (self.num_generations or 0) < 3:
            raise ValueError(
                f"num_generations={self.num_generations}: the diversity reward needs at least 3 clips per "
                "prompt (with 2 both earn the same, and the baseline cancels them); raise it, or set "
                "diversity_coef=0"
            )
        local = self.per_device_train_batch_size * self.steps_per_generation
        if local % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size × steps_per_generation = {local} is not divisible by "
                f"num_generations={self.num_generations}: a prompt's clips must stay on one process"
            )


@dataclass
class MusicSFTConfig(TrainingArguments):
    """Settings of `MusicSFTTrainer`: transformers', some with other defaults, and these.

    Args:
        clip_seconds: length of the training clips, which are cut out of the recordings at random. None: the model's
            own length, at most 10 s. Memory and time grow with it.
        text_dropout: share of the clips that are trained on without their text, so that guidance still works.
        held_out: share of the recordings that are not trained on; `eval_loss` is measured on them. 0 is none.
        quick: overfit the beginning of the first recording on purpose, to see that everything works: 200 steps at
            ten times the usual learning rate, unless they are set; nothing is held out.
        audio_samples: clips generated at every evaluation, with the model's own guidance, for captions of held-out
            recordings; written to disk and to the trackers.
        loss_chunk_size: decoder steps whose distributions are held at once.
    """

    learning_rate: float = 1e-5
    adam_beta2: float = 0.95
    bf16: bool | None = None
    logging_steps: float = 10
    eval_strategy: IntervalStrategy | str = "epoch"
    eval_on_start: bool = True
    save_strategy: SaveStrategy | str = "epoch"
    save_total_limit: int | None = 2
    remove_unused_columns: bool | None = False
    hub_private_repo: bool | None = True
    hub_strategy: HubStrategy | str = "end"

    clip_seconds: float | None = None
    text_dropout: float = 0.1
    held_out: float = 0.1
    quick: bool = False
    audio_samples: int = 2
    loss_chunk_size: int = 256

    # What the parts that this trainer shares with the other one ask for.
    teacher_model: ClassVar[None] = None
    guidance_range: ClassVar[None] = None
    rollout_backend: ClassVar[str] = "fast"
    rollout_batch_size: ClassVar[None] = None
    ema_decay: ClassVar[float] = 0.0

    def __post_init__(self):
        self.remove_unused_columns = False  # transformers would take captions for one
        if self.push_to_hub:
            raise ValueError(
                "push_to_hub=True: a fine-tuned base is not pushed; upload its folder with hf upload"
            )
        if refused := refused_settings(self):
            raise ValueError("; ".join(refused))
        _check_json(self)
        _check_processes(self)
        _check_types(self, MusicSFTConfig)
        if self.quick:
            self.held_out = self.text_dropout = 0.0
            self.eval_strategy = self.save_strategy = "no"
            self.max_steps = self.max_steps if self.max_steps > 0 else 200
            usual = self.learning_rate == MusicSFTConfig.learning_rate
            self.learning_rate *= 10 if usual else 1
        _choose_bf16(self)
        _check_optim_args(self)
        super().__post_init__()
        _check_schedule(self)
        if self.process_index == 0 and (idle := idle_settings(self) + unfinished_warmup(self)):
            warnings.warn("; ".join(idle), UserWarning, stacklevel=3)


# ---- what is checked for every trainer ------------------------------------------------------------------


def _check_json(args: TrainingArguments) -> None:
    """Settings by name that a command line gives as text; transformers does not name the one that is wrong."""
    for name in args._VALID_DICT_FIELDS:
        if isinstance(value := getattr(args, name), str) and value.startswith("{"):
            try:
                json.loads(value)
            except json.JSONDecodeError as error:
                raise ValueError(f"{name}={value!r} is not JSON: {error}") from error


def _check_processes(args: Any) -> None:
    """Refuse what accelerate would answer with a traceback, once the model is loaded."""
    if isinstance(args.fsdp, str) and args.fsdp.lower() in ("true", "false"):  # of a command line
        args.fsdp = args.fsdp.lower() == "true" or None
    launched = any(name in os.environ for name in _LAUNCHED)
    for name, value in (("fsdp", args.fsdp), ("ddp_backend", args.ddp_backend)):
        if value and not launched:
            raise ValueError(
                f"{name}={value} is for several processes: start them with --num_processes (or accelerate launch), "
                "or leave it unset"
            )
    given = args.accelerator_config
    if isinstance(given, str) and given.startswith("{"):
        given = json.loads(given)
    if isinstance(given, dict):
        require_settings(given, field_types(AcceleratorConfig), "accelerator_config", "accelerator_config.")


def _choose_bf16(args: TrainingArguments) -> None:
    """bfloat16 where the hardware multiplies it fast: a GPU, or a CPU with AVX512-BF16 or AMX."""
    if args.fp16 and (args.use_cpu or not (torch.cuda.is_available() or torch.backends.mps.is_available())):
        warnings.warn(
            "fp16=True has no effect: a CPU has no float16: set bf16, or leave it off", stacklevel=4
        )
        args.fp16 = False
    if args.bf16 is not None or args.fp16:
        return
    if torch.cuda.is_available() and not args.use_cpu:
        args.bf16 = torch.cuda.is_bf16_supported()
    elif torch.backends.mps.is_available() and not args.use_cpu:
        args.bf16 = False
    else:
        cpu = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        args.bf16 = bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    if args.bf16 and not torch.cuda.is_available():
        args.use_cpu = True  # transformers refuses bf16 without a GPU unless the CPU is chosen outright


def _check_types(args: TrainingArguments, owner: type) -> None:
    """Types of all settings of a class, and ranges of those that `_RANGES` names."""
    for name, annotation in field_types(owner).items():
        # Guards check themselves; of `debug`, transformers' own parser makes None.
        if name not in ("guards", "debug"):
            require_type(name, getattr(args, name), annotation)
    for names, (holds, wanted) in _RANGES.items():
        for name in names.split():
            value = getattr(args, name, None)
            if value is not None and not holds(value):
                raise ValueError(f"{name}={value!r} must be {wanted}")


def _check_optim_args(args: TrainingArguments) -> None:
    """Refuse what transformers cannot read of `optim_args`, or passes over without a word."""
    entries = args.optim_args.replace(" ", "").split(",") if args.optim_args else []
    if wrong := [entry for entry in entries if not re.fullmatch("[^=]+=[^=]+", entry)]:
        raise ValueError(f"optim_args={args.optim_args!r}: {wrong[0]!r} must be name=value")
    optim = getattr(args.optim, "value", args.optim)
    own = _OPTIMIZERS.get(optim)
    if own is None and optim not in ("adamw_torch", "adamw_torch_fused"):
        return  # those have names of their own
    optimizers = [own] if own else _OPTIMIZERS.values()  # AdamW reads none, of which `effects` warns
    known = {name for one in optimizers for name in inspect.signature(one).parameters}
    for name, _, value in [entry.partition("=") for entry in entries]:
        if name not in known:
            raise ValueError(f"optim_args={args.optim_args!r}: optim={optim} has no {name}; leave it out")
        if name in ("nesterov", "centered"):
            continue
        try:
            float(value)
        except ValueError as error:
            raise ValueError(f"optim_args={args.optim_args!r}: {name} must be a number") from error


def _check_schedule(args: TrainingArguments) -> None:
    """Refuse a schedule that could not be built after the model was loaded, or that leaves its bounds at some step."""
    name, given = args.lr_scheduler_type, args.lr_scheduler_kwargs
    steps = args.max_steps if args.max_steps > 0 else 1000  # of epochs the number is not known yet
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    below = []
    if isinstance(given, dict):
        below = [key for key, value in given.items() if isinstance(value, int | float) and value < 0]
    whose = f"lr_scheduler_type={getattr(name, 'value', name)} with lr_scheduler_kwargs={given}"
    if below:
        raise ValueError(f"{whose}: {below[0]} is below 0: change lr_scheduler_kwargs")
    try:
        schedule = get_scheduler(name, optimizer, args.get_warmup_steps(steps), steps, given)
    except (TypeError, ValueError) as error:
        known = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
        takes = [
            one for one in inspect.signature(TYPE_TO_SCHEDULER_FUNCTION[name]).parameters if one not in known
        ]
        raise ValueError(
            f"{whose}: {error}; set lr_scheduler_kwargs, which may hold {', '.join(takes) or 'nothing'}"
        ) from error
    if not isinstance(schedule, LambdaLR):  # it follows the metrics: what it ends at
        floor = max(getattr(schedule, "min_lrs", [0.0]))
        rates = {"in the end": lambda: floor / args.learning_rate}
    else:
        stride = max(1, steps // 10_000)
        rates = {
            f"after step {step}": functools.partial(schedule.lr_lambdas[0], step)
            for step in [*range(0, steps, stride), steps]
        }
    for when, rate in rates.items():
        try:
            factor = rate()
            wrong = None if 0 <= factor <= 1 + 1e-9 else f"{factor * args.learning_rate:g}"
        except (ArithmeticError, TypeError) as error:  # a division by zero, or complex numbers
            wrong = f"none ({error})"
        if wrong:
            raise ValueError(
                f"{whose}: the learning rate would be {wrong} {when}, and must stay between 0 and learning_rate="
                f"{args.learning_rate:g}: change lr_scheduler_kwargs"
            )


def _explain(owner: type) -> None:
    """Give the fields of a class the texts of its docstring, which `--help` shows."""
    entries = re.findall(r"^ {8}(\w+): (.+(?:\n {9,}.+)*)", owner.__doc__ or "", re.MULTILINE)
    texts = {name: " ".join(text.split()).replace("%", "%%") for name, text in entries}
    for item in fields(owner):
        if item.name in owner.__annotations__ and item.name in texts:
            item.metadata = MappingProxyType({"help": texts[item.name]})


_explain(CFGDiversityConfig)
_explain(MusicSFTConfig)


def _is_schedule(value: str) -> bool:
    try:
        return bool(guidance_schedule(value, 2.0, 2))
    except ValueError:
        return False


# fields → (condition, what the message asks for); types, and that numbers are finite, are checked before
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "guidance_scale": (
        lambda value: not isinstance(value, int | float) or value >= 1,
        "a finite number ≥ 1 (1 is no guidance)",
    ),
    "guidance_schedule": (_is_schedule, "constant, linear, cosine or 'interval A B' with 0 ≤ A ≤ B ≤ 1"),
    "diversity_coef distillation_coef weight_decay warmup_steps eval_delay epsilon epsilon_high": (
        lambda value: value >= 0,
        "a finite number ≥ 0",
    ),
    "learning_rate": (lambda value: value > 0, "above 0: with 0 there is nothing to train"),
    "divergence": (DIVERGENCES.__contains__, f"one of {', '.join(DIVERGENCES)}"),
    "jsd_alpha teacher_fraction": (lambda value: 0 < value < 1, "strictly between 0 and 1"),
    "rollout_source": (ROLLOUT_SOURCES.__contains__, f"one of {', '.join(ROLLOUT_SOURCES)}"),
    "rollout_backend": (ROLLOUT_BACKENDS.__contains__, f"one of {', '.join(ROLLOUT_BACKENDS)}"),
    "clip_seconds": (lambda value: value > 0, "a positive number of seconds"),
    "diversity_codebooks": (lambda value: value >= 1, "at least 1, or unset (all)"),
    "prefix_lambda": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "held_out text_dropout ema_decay adam_beta1 adam_beta2": (
        lambda value: 0 <= value < 1,
        "at least 0 (off) and below 1",
    ),
    "adaptive_clip temperature adam_epsilon num_train_epochs logging_steps eval_steps save_steps": (
        lambda value: value > 0,
        "positive",
    ),
    "term_norm_steps audio_samples max_grad_norm dataloader_num_workers": (
        lambda value: value >= 0,
        "0 (off) or more",
    ),
    "loss_chunk_size rollout_batch_size per_device_train_batch_size per_device_eval_batch_size "
    "gradient_accumulation_steps generation_batch_size steps_per_generation num_iterations "
    "num_generations_eval save_total_limit": (lambda value: value >= 1, "at least 1"),
    "num_generations": (
        lambda value: value >= 2,
        "at least 2: a clip is judged against the others of its prompt",
    ),
    "max_steps": (lambda value: value == -1 or value >= 1, "at least 1, or -1 (num_train_epochs decides)"),
    "seed": (lambda value: 0 <= value < 2**32, "from 0 to 2**32 - 1"),
}
