"""What a run writes and how it continues: checkpoints, the average of the weights, where a student comes from.

A checkpoint holds, beside transformers' own files:

| file | content |
|---|---|
| `averaged_weights.safetensors` | the moving average of the trained weights |
| `diversity_state.safetensors` | micro-batch counter, prefix regression, running gradient norm, the run's settings |
| `rollout_buffer_R.safetensors` | clips of process R that were sampled and are still to be trained on |

With these a killed run continues exactly, also when it was saved between two updates on the same clips.
"""

import contextlib
import hashlib
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from diverse_cfg.atomic import open_weights, replacing, writing
from diverse_cfg.callbacks import AdaptiveClipCallback
from diverse_cfg.config import CFGDiversityConfig, MusicSFTConfig
from diverse_cfg.merging.adapter import AdapterStart
from diverse_cfg.policies.shift import SHIFT_FILE
from diverse_cfg.provenance import Provenance, write_provenance
from diverse_cfg.reading import last_checkpoint
from diverse_cfg.trainer.advantages import PrefixBaseline

AVERAGE_FILE = "averaged_weights.safetensors"
STATE_FILE = "diversity_state.safetensors"
BUFFER_FILE = "rollout_buffer_{rank}.safetensors"
PICKLE = "training_args.bin"  # it has no place in a model folder; resuming does not read it
_RECORDED = (
    *("learning_rate", "num_generations", "generation_batch_size", "divergence", "distillation_coef"),
    *("negative_prompt", "rollout_source", "prefix_baseline", "prefix_lambda", "diversity_codebooks"),
    *("guidance_schedule", "ema_decay", "seed"),
)
# What a resumed run may not change: it would be ignored, as it stands in the state of optimiser and schedule, or the
# student would be that of two methods.
KEPT_BY_ALL = (
    *("per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("lr_scheduler_kwargs", "warmup_steps", "max_grad_norm", "optim", "optim_args", "optim_target_modules"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "seed"),
)
_KEPT = (
    *(*KEPT_BY_ALL, "adaptive_clip", "num_iterations", "guidance_scale", "diversity_coef", "jsd_alpha"),
    *(
        "teacher_fraction",
        "sequence_score",
        "temperature",
        "reward_weights",
        "epsilon",
        "epsilon_high",
        *_RECORDED,
    ),
)
# Of an adapter's configuration: what it does not say of how a layer is adapted.
_NOT_OF_LAYERS = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    "inference_mode",
)
_PER_PROCESS = ("per_device_train_batch_size", "gradient_accumulation_steps")


# ---- writing a checkpoint ----------------------------------------------------------------------------------


@contextmanager
def beside(
    place: Path, step: int, state: TrainerState, writes: bool, wait: Callable[[], None]
) -> Iterator[Path]:
    """Where to write a checkpoint that then takes its place: a folder `checkpoint-N` is complete, also when the
    process is killed while it rewrites one.

    Args:
        place: of the checkpoint.
        step: number of the step.
        state: of the run; if this checkpoint is the best one, the state will name its place.
        writes: whether this process writes, and not only the others.
        wait: for all processes.
    """
    folder = place.with_name(f".{place.name}.{step:08x}.incomplete")  # on every process the same
    written = folder / place.name
    try:
        with writing(place):
            yield written
            if state.best_model_checkpoint == str(written):
                state.best_model_checkpoint = str(place)
                if writes:
                    state.save_to_json(str(written / TRAINER_STATE_NAME))
            wait()
            if writes:
                open_weights(written)
                if place.exists():
                    place.rename(folder / "replaced")
                written.rename(place)
    finally:
        if writes:
            shutil.rmtree(folder, ignore_errors=True)


def saved_bytes(model: nn.Module) -> int:
    """Size of the student as it is saved: all weights, or those of an adapter."""
    adapter = isinstance(model, PeftModel)
    weights = [p for p in model.parameters() if p.requires_grad or not adapter]
    return sum(weight.numel() * weight.element_size() for weight in weights)


def complete(folder: Path, processor: Any, generation_config: Any, provenance: Provenance) -> None:
    """Add to a folder with a student's weights what playing them needs.

    An adapter's folder needs the generation settings most: without them its base's guidance of 3 would come back.
    """
    processor.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    write_provenance(folder, provenance)
    (folder / PICKLE).unlink(missing_ok=True)


def student_provenance(
    args: CFGDiversityConfig,
    base_model: str | None,
    start: AdapterStart | None,
    *,
    named: Callable[[str], str],
    sampling: dict[str, Any],
    steps: int,
    clip_seconds: float,
    base_fingerprint: str | None = None,
) -> Provenance:
    """What a student's folder tells of where it comes from.

    Args:
        args: the run's settings.
        base_model: that it started from.
        start: the adapter that it continues, if any: one adapter holds both runs.
        named: how a model's name is written, since a folder of this machine means nothing elsewhere.
        sampling: settings to play the student with.
        steps: that it was trained.
        clip_seconds: length of the training clips.
        base_fingerprint: of an adapter's base, as the run began.
    """
    origin, guidance = args.teacher_model or base_model, args.guidance_range
    training = {
        "initial_model": base_model and named(base_model),
        "includes_adapter": start and named(start.checkpoint.source),
        "steps": steps,
        "clip_seconds": clip_seconds,
    }
    if base_fingerprint is not None:
        training["base_fingerprint"] = base_fingerprint
    return Provenance(
        kind="student",
        base_model=origin and named(origin),
        guidance_scale=args.reference_guidance,
        guidance_range=guidance and [guidance.knots[0], guidance.knots[-1]],
        diversity_coef=args.diversity_coef,
        sampling=sampling,
        training=training | {name: getattr(args, name) for name in _RECORDED},
    )


def kept_settings(args: CFGDiversityConfig, clip_seconds: float, prompts: Any) -> dict[str, Any]:
    """What a checkpoint holds of a run's settings: resumed, they must be the same.

    Args:
        args: the run's settings.
        clip_seconds: length of the training clips.
        prompts: the training prompts; of a stream nothing is held.
    """
    settings = {name: getattr(args, name) for name in _KEPT}
    settings |= {"clip_seconds": clip_seconds, "guards": dict(vars(args.guards))}
    if isinstance(prompts, Dataset):
        texts = list(prompts["prompt"])
        digest = hashlib.blake2b(json.dumps(texts).encode(), digest_size=4).hexdigest()
        settings["train_dataset"] = f"{len(texts)} prompts ({digest})"
    return settings


def adapter_settings(model: nn.Module) -> dict[str, Any]:
    """The same of an adapter, by the names of the command line where it has them; nothing without one."""
    if not isinstance(model, PeftModel):
        return {}
    config: Any = model.peft_config[model.active_adapter].to_dict()
    named = {"r": "lora_r", "target_modules": "lora_target_modules"}
    return {
        named.get(name) or str(name): value for name, value in config.items() if name not in _NOT_OF_LAYERS
    }


# ---- continuing from one -----------------------------------------------------------------------------------


def checkpoint_to_resume(wanted: str | bool | None, output_dir: str) -> str | None:
    """The folder that `resume_from_checkpoint` means; True, also as a word, is the last one.

    Raises:
        ValueError: there is none.
    """
    if str(wanted).lower() in ("true", "false"):
        wanted = str(wanted).lower() == "true"
    if wanted is not True:
        return wanted or None
    last = last_checkpoint(output_dir)
    if last is None:
        raise ValueError(f"resume_from_checkpoint=True, but {output_dir} holds no complete checkpoint")
    return last


def check_checkpoint(folder: str | os.PathLike, needed: Sequence[str]) -> None:
    """Look at every file of a checkpoint before a run continues from it.

    Args:
        folder: of the checkpoint.
        needed: names of files without which a run would not continue as it was.

    Raises:
        ValueError: a file is missing or damaged; it is named, and so is the checkpoint before.
    """
    folder = Path(folder)
    if not (folder / STATE_FILE).is_file():
        inside = last_checkpoint(folder)  # of a finished student's folder
        remedy = f"name a checkpoint of it, resume_from_checkpoint={inside}" if inside else instead_of(folder)
        raise ValueError(
            f"{folder} is no checkpoint to resume from (it has no {STATE_FILE}: it is a finished student, was written "
            f"with save_only_model, or by another trainer): {remedy}"
        )
    wrong = [f"{folder / name} is missing" for name in needed if not (folder / name).is_file()]
    wrong += [f"{path} is damaged" for path in sorted(folder.iterdir()) if not is_whole(path)]
    if wrong:
        raise ValueError(f"{wrong[0]}: {instead_of(folder)}")


def needed_to_resume(
    folder: str | os.PathLike,
    args: CFGDiversityConfig | MusicSFTConfig,
    *,
    adapter: bool,
    sharded: str | None,
    scaled: bool,
) -> list[str]:
    """Files that this process needs; transformers goes on without them and says nothing.

    Args:
        folder: of the checkpoint.
        args: the run's settings.
        adapter: whether an adapter is trained.
        sharded: "deepspeed" or "fsdp" where that writes weights and optimiser in its own way.
        scaled: whether a gradient scaler is in use.

    Raises:
        ValueError: the checkpoint holds an adapter and the run trains all weights, or the other way round.
    """
    folder, rank = Path(folder), args.process_index
    noise = f"rng_state_{rank}.pth" if args.world_size > 1 else "rng_state.pth"
    needed = [] if sharded == "deepspeed" else [SCHEDULER_NAME]
    if sharded is None:
        needed.append(OPTIMIZER_NAME)
        weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME)
        there = [name == SAFETENSORS_WEIGHTS_NAME for name in weights if (folder / name).is_file()]
        if not there:
            needed.append(weights[2 if adapter else 0])
        elif adapter not in there:
            held, trained = ("all weights", "an adapter") if adapter else ("an adapter", "all weights")
            raise ValueError(
                f"{folder} holds {held}, and this run trains {trained}: resume {'without' if adapter else 'with'} "
                "use_peft (in Python, peft_config)"
            )
    state = folder / STATE_FILE
    # Nothing of a state that is missing or damaged, which is told later, or of older versions.
    has = read_tensors(state)[1] if state.is_file() and is_whole(state) else {}
    if args.ema_decay and "average" in has:
        needed.append(AVERAGE_FILE)
    if args.guidance_range is not None:
        needed.append(SHIFT_FILE)
    if scaled:
        needed.append(SCALER_NAME)
    others = [path for path in folder.glob("rng_state*.pth") if path.name != noise]
    if others and not (folder / noise).is_file():
        warnings.warn(
            f"{folder} has no {noise}: it was written by another number of processes, and what is drawn "
            "outside of the package (a reward's noise, say) differs from here on",
            stacklevel=3,
        )
        return needed
    if "buffer" in has:
        needed.append(BUFFER_FILE.format(rank=rank))
    return [*needed, noise]


def instead_of(folder: str | os.PathLike) -> str:
    """What to do when a checkpoint is of no use."""
    folder = Path(folder)
    number = folder.name.removeprefix("checkpoint-")
    earlier = last_checkpoint(folder.parent, int(number)) if number.isdigit() else None
    if earlier is None:
        return "begin again, there is none before it"
    return f"continue from the checkpoint before it, resume_from_checkpoint={earlier}"


def is_whole(path: Path) -> bool:
    """Whether a file is what its name says, as far as can be told without reading all of it."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                return True
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
    except (SafetensorError, ValueError, RecursionError):
        return False
    return path.suffix not in (".pt", ".pth") or zipfile.is_zipfile(path)


@contextmanager
def continuing_from(folder: str | os.PathLike) -> Iterator[None]:
    """What libraries say about a checkpoint that does not fit the run becomes one line that names it."""
    try:
        yield
    except Exception as error:  # pickle, zip files, optimisers and models each have their own
        if isinstance(error, OSError | torch.OutOfMemoryError) or str(folder) in str(error):
            raise
        raise ValueError(
            f"{folder} cannot be continued ({' '.join(str(error).split())[:200]}): resume with the model and the "
            "settings that the run began with, or from another checkpoint"
        ) from error


def check_adapter_weights(model: nn.Module, folder: str | os.PathLike) -> None:
    """Refuse a checkpoint that lacks weights of the run's adapter: PEFT goes on without them."""
    path = Path(folder) / SAFETENSORS_WEIGHTS_NAME
    if isinstance(model, PeftModel) and path.is_file():
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        if lacking := own.keys() - read_tensors(path)[0].keys():
            raise ValueError(f"it lacks weights such as {min(lacking)}")


def check_optimizer(optimizer: Any) -> None:
    """Refuse the state of another optimiser, which fails at the first step."""
    for group in optimizer.param_groups:
        if lacking := optimizer.defaults.keys() - group.keys():
            raise ValueError(f"the state of its optimizer is of another optim and lacks {min(lacking)}")


def check_loaded(model: nn.Module, load_result: Any) -> None:
    """Refuse what transformers warns about: weights that a checkpoint lacks stay those of the start."""
    state, missing = model.state_dict(), load_result.missing_keys
    there = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
    lacking = [name for name in missing if state[name].data_ptr() not in there]  # tied ones are there
    if wrong := [*lacking, *load_result.unexpected_keys]:
        which = "lacks" if lacking else "has unexpected"
        raise ValueError(f"it {which} weights such as {wrong[0]}")


def find_best(state: TrainerState, folder: str, wanted: bool) -> None:
    """Let a resumed run find its best checkpoint, also when its folder was moved.

    Args:
        state: of the run.
        folder: of the checkpoint that it continues from.
        wanted: whether the best one is loaded in the end.
    """
    best = Path(folder).parent / f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}"
    if best.is_dir():
        state.best_model_checkpoint = str(best)
    elif wanted and state.best_global_step and state.best_model_checkpoint is None:
        warnings.warn(f"{best}, the best checkpoint, is gone: it is chosen from here on", stacklevel=2)
        state.best_metric = state.best_global_step = None


# ---- what a run remembers ----------------------------------------------------------------------------------


class WeightAverage:
    """Exponential moving average of the trained weights.

    Args:
        model: whose trainable parameters are averaged.
        decay: of the average; in the first steps it is smaller, (1 + t) / (10 + t), so that the initial
            weights do not linger in short runs.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._in_use = False
        # In float32, also of a model in bfloat16: a step of 1 % of a difference would vanish.
        self.averages = {name: p.detach().float().clone() for name, p in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the current weights in; call after every optimiser step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages = list(self.averages.values())
        torch._foreach_lerp_(averages, [p.detach().float() for p in self.parameters.values()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights while the context lasts; also within another such context."""
        if self._in_use:  # saving may push, and pushing saves
            yield
            return
        self._in_use = True
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self._in_use = False

    @torch.no_grad()
    def settle(self) -> None:
        """Give the model the averaged weights for good."""
        for name, parameter in self.parameters.items():
            parameter.copy_(self.averages[name])

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            raw = parameter.detach().clone()
            parameter.copy_(self.averages[name])
            self.averages[name].copy_(raw)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the averages into a checkpoint folder."""
        tensors = {name: average.cpu() for name, average in self.averages.items()}
        write_tensors(Path(folder) / AVERAGE_FILE, tensors, {"updates": str(self.updates)})

    def load(self, folder: str | os.PathLike) -> None:
        """Continue from a checkpoint folder.

        Raises:
            ValueError: the checkpoint was written without averages, or for other parameters.
        """
        path = Path(folder) / AVERAGE_FILE
        if not path.is_file():
            raise ValueError(
                f"{folder} has no averaged weights: it was trained with ema_decay=0; resume with 0 too"
            )
        tensors, metadata = read_tensors(path)
        if tensors.keys() != self.averages.keys():
            raise ValueError(
                f"{path} averages other parameters than this run trains: resume with the same peft_config"
            )
        for name, tensor in tensors.items():
            self.averages[name].copy_(tensor)
        self.updates = int(metadata["updates"])


@dataclass
class RunMemory:
    """What changes in the course of a run besides weights and optimiser.

    Args:
        frozen: sum of the weights that must not change, to compare with; None where it differs by machine.
        prefix: the regression on the beginnings of clips, if any.
        clip: the running norm of the gradient, if any.
        average: the average of the weights, while a run keeps one.
        settings: that a resumed run may not change, see `kept_settings`.
        initial: name of the model that the run began with, and a sum of its weights, which is compared.
    """

    frozen: int | None = None
    prefix: PrefixBaseline | None = None
    clip: AdaptiveClipCallback | None = None
    average: WeightAverage | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    initial: tuple[str | None, int | str | None] = (None, None)

    def keep(self, model: nn.Module, settings: Mapping[str, Any], processes: int) -> None:
        """Settings, and those of the model's adapter, that a resumed run may not change, as JSON has them."""
        whole = {**settings, **adapter_settings(model), "processes": processes}
        self.settings = json.loads(json.dumps(whole, default=lambda value: sorted(value)))

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """The model has the averaged weights, if there are any, while the context lasts."""
        return contextlib.nullcontext() if self.average is None else self.average.applied()

    def save(
        self, folder: str, step: int, buffer: list[dict[str, Tensor]] | None, rank: int, writes: bool
    ) -> None:
        """Write it into a checkpoint folder, but for the average, which a folder that only others write lacks.

        Args:
            folder: of the checkpoint.
            step: number of micro-batches so far.
            buffer: micro-batches of a generation block that is still open; every process has its own.
            rank: of this process.
            writes: whether this process writes what all share.
        """
        os.makedirs(folder, exist_ok=True)
        has = {"settings": json.dumps(self.settings), "initial": json.dumps(self.initial)}
        if self.average is not None:
            has["average"] = "1"
        if buffer is not None:
            save_buffer(folder, rank, buffer)
            has["buffer"] = "1"
        if not writes:
            return
        state = {"step": torch.tensor(step)}
        if self.frozen is not None:
            state["frozen_weights"] = torch.tensor(self.frozen)
        if self.prefix is not None:
            state |= {f"prefix/{name}": value.cpu() for name, value in self.prefix.state().items()}
        if self.clip is not None and self.clip.mean is not None:
            state["gradient_norm"] = torch.tensor(self.clip.mean, dtype=torch.float64)
        write_tensors(Path(folder) / STATE_FILE, state, has)

    def check(self, folder: str) -> None:
        """Refuse a checkpoint folder of a run with other models or settings; older versions held no settings.

        Raises:
            ValueError: it belongs to another run.
        """
        state, has = read_tensors(Path(folder) / STATE_FILE)
        frozen = int(state.get("frozen_weights", -1))
        if self.frozen is not None and frozen not in (-1, self.frozen):
            raise ValueError(
                f"{folder} was written by a run with another teacher or base: resume with the model and "
                "teacher_model that the run began with"
            )
        name, weights = json.loads(has.get("initial", "[null, null]"))
        if None not in (weights, self.initial[1]) and weights != self.initial[1]:
            raise ValueError(
                f"{folder} is of a run that began with the model {name}, and this one begins with other weights, those "
                f"of {self.initial[0]}: resume with the model (model_name_or_path) that the run began with"
            )
        before = json.loads(has.get("settings", "{}"))
        # Other processes may share the same batch otherwise.
        free = (
            () if before.get("processes") == self.settings.get("processes") else ("processes", *_PER_PROCESS)
        )
        other = [
            f"{name}={self.settings[name]!r} (the run began with {value!r})"
            for name, value in before.items()
            if name not in free and self.settings.get(name, value) != value
        ]
        if other:
            raise ValueError(
                f"{folder} cannot be continued with {', '.join(other)}: resume with what the run began with, or begin "
                "anew from the student, with model_name_or_path and another output_dir"
            )

    def load(self, folder: str) -> int:
        """Continue from a checkpoint folder; the number of micro-batches."""
        state, _ = read_tensors(Path(folder) / STATE_FILE)
        if self.prefix is not None:
            kept = {name: value for name, value in state.items() if name.startswith("prefix/")}
            self.prefix.load_state({name.removeprefix("prefix/"): value for name, value in kept.items()})
        if self.clip is not None and "gradient_norm" in state:
            self.clip.mean = float(state["gradient_norm"])
        if self.average is not None:
            self.average.load(folder)
        return int(state["step"])

    def broken(self, model: nn.Module, moments: Mapping[Any, Mapping[str, Any]] | None = None) -> str | None:
        """What is inf or nan, in words, of the trained weights.

        Args:
            model: the student.
            moments: of the optimiser; with them, also of what a checkpoint holds besides the weights.
        """
        named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if broken := not_finite(named):
            return f"{len(broken)} of {len(named)} weight tensors are inf or nan ({broken[0]})"
        if moments is None:
            return None
        averages = {} if self.average is None else self.average.averages
        held = {f"the average of {name}": average for name, average in averages.items()}
        for index, values in enumerate(moments.values()):
            held |= {f"the optimizer's {key} of tensor {index}": value for key, value in values.items()}
        broken = not_finite({n: m for n, m in held.items() if torch.is_tensor(m) and m.is_floating_point()})
        return f"{broken[0]} is inf or nan" if broken else None


def not_finite(tensors: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that hold inf or nan; of a sharded one, each process sees its part."""
    sums = [getattr(t, "to_local", lambda t=t: t)().detach().float().sum() for t in tensors.values()]
    finite = torch.stack([s.to(sums[0].device) for s in sums]).isfinite().tolist() if sums else []
    return [name for name, good in zip(tensors, finite, strict=True) if not good]


def save_buffer(folder: str | os.PathLike, rank: int, batches: list[dict[str, Tensor]]) -> None:
    """Write the micro-batches of a generation block that is still open."""
    tensors = {
        f"{index}/{key}": value.cpu() for index, batch in enumerate(batches) for key, value in batch.items()
    }
    write_tensors(Path(folder) / BUFFER_FILE.format(rank=rank), tensors, {"batches": str(len(batches))})


def load_buffer(folder: str | os.PathLike, rank: int, device: torch.device) -> list[dict[str, Tensor]] | None:
    """The micro-batches that `save_buffer` wrote; None if no block was open."""
    path = Path(folder) / BUFFER_FILE.format(rank=rank)
    if not path.is_file():
        return None
    tensors, metadata = read_tensors(path)
    batches: list[dict[str, Tensor]] = [{} for _ in range(int(metadata["batches"]))]
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        batches[int(index)][key] = value.to(device)
    return batches


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file so that a reader finds all of it or nothing."""
    # Clones: safetensors refuses tensors that share memory, as slices of one batch do.
    whole = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(whole, temporary, metadata=metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        names, metadata = list(file.keys()), dict(file.metadata() or {})
        return {name: file.get_tensor(name) for name in names}, metadata
