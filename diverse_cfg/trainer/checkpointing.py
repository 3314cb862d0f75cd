"""The loop's memory: averaged weights, and the folder that is saved at the end."""

import contextlib
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from diverse_cfg.atomic import filling
from diverse_cfg.callbacks import AdaptiveClipCallback
from diverse_cfg.cards import plot_training_curves, public_name, write_card
from diverse_cfg.policies.musicgen.model import encode_text, frame_rate, unwrap
from diverse_cfg.provenance import Provenance, read_provenance, write_provenance
from diverse_cfg.trainer import start
from diverse_cfg.trainer.estimate import memory
from diverse_cfg.trainer.objective import LossSettings, student_terms
from diverse_cfg.trainer.resuming import Resuming
from diverse_cfg.trainer.state import (
    WeightAverage,
    check_checkpoint,
    continuing_from,
    instead_of,
    last_checkpoint,
    not_finite,
)
from diverse_cfg.trainer.teacher import FrozenWeights
from diverse_cfg.types import Clips

if TYPE_CHECKING:
    from diverse_cfg.config import CFGDiversityConfig
    from diverse_cfg.trainer.continuing import AdapterStart

# It has no place in a model folder; resuming does not read it.
_PICKLE = "training_args.bin"
_LEFT_ALONE = "a callback or a reward function changes them; give it a copy of the model"


class EpochSampler(RepeatSampler):
    """TRL's sampler with an order that depends on the epoch's number, not on how many were drawn before.

    A run that is resumed in its second epoch then sees the prompts that it would have seen.
    """

    def __init__(self, *args, epoch, **kwargs):
        super().__init__(*args, **kwargs)
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed((self.seed or 0) + 1_000_003 * self.epoch())
        return super().__iter__()


class Checkpointing(Resuming):
    """Base of the trainer: training loop, evaluation and saving around the objective."""

    args: "CFGDiversityConfig"
    _start: "AdapterStart | None"
    _frozen: FrozenWeights
    _loss_settings: LossSettings
    _num_frames: int
    _num_codebooks: int

    def _prepare_checkpointing(self) -> None:
        self._average: WeightAverage | None = None
        self._has_average = False
        self._pushing = False
        self._checkpoint: str | None = None  # that the run continues, or that it wrote last
        self._beside: str | None = None  # where a checkpoint is being written
        self._adaptive_clip: AdaptiveClipCallback | None = None
        if self.args.adaptive_clip is not None:
            clip = AdaptiveClipCallback(self.args.adaptive_clip, self._clip_gradient)
            self._adaptive_clip = clip
            self.add_callback(clip)
        # Before those of the trackers, which may send the model away.
        self.callback_handler.callbacks.insert(0, _Housekeeping(self))

    def _clip_gradient(self, limit: float):
        return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

    # ---- loop -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`; a resumed run continues exactly, also between two updates on the same clips.

        With `ema_decay` the model has the averaged weights afterwards: those of the best checkpoint with
        `load_best_model_at_end`.

        Args:
            resume_from_checkpoint: folder, or True for the last one; None takes the settings'.
            kwargs: of `Trainer.train`.

        Raises:
            ValueError: there is no checkpoint to resume from, or one of its files is missing, damaged or not finite.
            FloatingPointError: the weights, or what they compute, are no longer finite; nothing of it is saved.
        """
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        if str(resume_from_checkpoint).lower() in ("true", "false"):
            resume_from_checkpoint = str(resume_from_checkpoint).lower() == "true"
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(
                    f"resume_from_checkpoint=True, but {self.args.output_dir} holds no complete checkpoint"
                )
        self._checkpoint = resume_from_checkpoint or None
        if self._checkpoint is not None:
            check_checkpoint(self._checkpoint, self._needed_to_resume(self._checkpoint))
        # Out of transformers' sight, or it would write the tokenizer's ids over MusicGen's.
        try:
            with self._without_tokenizer():
                return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        except FloatingPointError as error:
            last = self._checkpoint  # others in the folder are of an earlier run
            way_back = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}; {way_back}") from error

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not isinstance(sampler, RepeatSampler):
            return sampler
        return EpochSampler(
            data_source=sampler.data_source,
            mini_repeat_count=sampler.mini_repeat_count,
            batch_size=sampler.batch_size,
            repeat_count=sampler.repeat_count,
            shuffle=sampler.shuffle,
            seed=sampler.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    @contextlib.contextmanager
    def _without_tokenizer(self, substitute: Any = None) -> Iterator[None]:
        tokenizer, self.processing_class = self.processing_class, substitute
        try:
            yield
        finally:
            self.processing_class = tokenizer

    def evaluate(self, *args, **kwargs):
        """As `Trainer.evaluate`, with the averaged weights if any, and the same noise every time."""
        self._frozen.check(_LEFT_ALONE)
        self._evaluation_batch = 0
        self._evaluation_clips = []
        # A data loader draws a seed: the training run must not notice that it was looked at.
        with torch.random.fork_rng(devices=[]), self._averaged_weights():
            return super().evaluate(*args, **kwargs)

    @contextlib.contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        if self._average is None or self._has_average:  # saving may push, and pushing saves
            yield
            return
        self._has_average = True
        try:
            with self._average.applied():
                yield
        finally:
            self._has_average = False

    def _settle(self) -> None:
        """Last thing of a training run: the model is what is evaluated and saved."""
        if self._average is not None:
            self._average.settle()
            self._average = None

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._average is not None:  # by it the best checkpoint was chosen
            self._average.load(str(self.state.best_model_checkpoint))

    def training_step(self, *args, **kwargs):
        """As `Trainer.training_step`, before whose update the loss must be finite: it is left out of the log."""
        loss = super().training_step(*args, **kwargs)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} after step {self.state.global_step}")
        return loss

    def _check_finite(self, *, computes: bool = False, resumable: bool = False) -> None:
        """Whether the student is still one.

        Args:
            computes: also let it compute the log-probs of a few codes, which huge weights cannot.
            resumable: also look at what else a checkpoint holds, optimizer and averaged weights.

        Raises:
            FloatingPointError: it is not.
        """
        named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        broken = not_finite(named)
        what = f"{len(broken)} of {len(named)} weight tensors are inf or nan ({', '.join(broken[:1])})"
        if resumable and not broken:
            averages = {} if self._average is None else self._average.averages
            memory = {f"the average of {name}": average for name, average in averages.items()}
            if not self.is_deepspeed_enabled:
                for index, moments in enumerate(self.optimizer.state.values()):
                    memory |= {f"the optimizer's {key} of tensor {index}": m for key, m in moments.items()}
            memory = {name: m for name, m in memory.items() if torch.is_tensor(m) and m.is_floating_point()}
            broken = not_finite(memory)
            what = f"{', '.join(broken[:1])} is inf or nan"
        if not broken and computes and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            device = self.accelerator.device
            codes = torch.zeros(1, self._num_codebooks, min(self._num_frames, 8), dtype=int, device=device)
            condition = encode_text(unwrap(self.model), self._tokenizer, ["a song"])
            with torch.no_grad(), self.accelerator.autocast():
                clips = Clips(codes, 1, condition=condition)
                terms, _ = student_terms(unwrap(self.model), clips, self._loss_settings)
            if not terms.logps.isfinite().all():
                broken, what = ["logits"], "the student's logits are inf or nan"
        if broken:
            raise FloatingPointError(
                f"after step {self.state.global_step} {what}: check learning_rate={self.args.learning_rate} and "
                f"weight_decay={self.args.weight_decay}, or clip the gradient with max_grad_norm or adaptive_clip"
            )

    def _begin(self) -> None:
        """First thing of a training run, the model being where it will be trained."""
        start.restore_token_ids(unwrap(self.model), self._sampling)
        if self._checkpoint is not None:  # older versions saved what had diverged
            try:
                self._check_finite(computes=True, resumable=True)
            except FloatingPointError as error:
                raise ValueError(f"{self._checkpoint} ({error}): {instead_of(self._checkpoint)}") from error
        if self.args.ema_decay > 0:
            self._average = WeightAverage(self.model, self.args.ema_decay)
        if self.is_world_process_zero():
            tqdm.write(f"estimate: {self._estimate()}", file=sys.stderr)
        self._calibrate_guards()
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            # The student, and the encoders that the teacher shares with it, are in parts or another precision.
            others = [model for model in self._frozen.models if model is not unwrap(self.model)]
            self._frozen = FrozenWeights(*others, ignored=("audio_encoder.", "text_encoder."))
        if self._checkpoint is not None:
            with continuing_from(self._checkpoint):
                self._load_state(self._checkpoint)

    def _estimate(self) -> str:
        args, policy = self.args, unwrap(self.model)
        fused = args.rollout_backend == "fast"
        needs = memory(
            policy,
            micro_batch=args.per_device_train_batch_size,
            num_frames=self._num_frames,
            samplings=self._samplings(),
            rollout_batch_size=args.rollout_batch_size,
            rollout_dtype=self._rollout_dtype or policy.decoder.dtype,
            fused=fused,
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            separate_teacher=not self._teacher.shares_weights,
            averaged=args.ema_decay > 0,
            half_precision=bool(args.bf16 or args.fp16),
            checkpointing=bool(args.gradient_checkpointing),
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return f"{needs}, less what is sharded"
        rollout, update = self._measure()
        by = "" if fused else f" by stock generate, since rollout_backend={args.rollout_backend!r}"
        return f"{needs}; {rollout + update:.2g} s per step (rollout {rollout:.2g}{by}, update {update:.2g})"

    # ---- saving -----------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student: the averaged weights, if any; checkpoints hold the raw ones beside them."""
        self._frozen.check(_LEFT_ALONE)
        with contextlib.nullcontext() if _internal_call else self._averaged_weights():
            self._check_finite(computes=True, resumable=self._beside is not None)
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with filling(output_dir) as folder:
            own = folder / "own" if self._start else folder
            with self._without_tokenizer(), warnings.catch_warnings():
                # PEFT looks for the base's vocabulary of text; an adapter or AudioCraft's folder has none.
                warnings.filterwarnings("ignore", "Could not find a config file")
                super()._save(str(own), state_dict)
                if self._start is not None:
                    self._start.write(own, folder)
                    shutil.rmtree(own)
            # What playing the weights needs; an adapter's folder needs the generation settings most, since
            # without them its base's guidance of 3 would come back.
            self._processor.save_pretrained(folder)
            unwrap(self.model).generation_config.save_pretrained(folder)
            write_provenance(folder, self._provenance())
            (folder / _PICKLE).unlink(missing_ok=True)
        (Path(output_dir) / _PICKLE).unlink(missing_ok=True)  # transformers writes it with a push
        if (Path(output_dir) / "adapter_config.json").is_file():
            write_card(output_dir)  # PEFT's does not say that other programs would guide it

    def push_to_hub(self, *args, blocking: bool = True, **kwargs):
        """As `Trainer.push_to_hub`: the averaged weights, if any, and no folders of this machine in what is
        sent."""
        self._pushing = True
        try:
            with self._averaged_weights():
                return super().push_to_hub(*args, blocking=blocking, **kwargs)
        finally:
            self._pushing = False
            if blocking and self.args.should_save:  # else the upload is still reading it
                write_provenance(self.args.output_dir, self._provenance())

    def _provenance(self) -> Provenance:
        args = self.args
        named_here = public_name if self._pushing else str
        named = (
            "learning_rate",
            "num_generations",
            "generation_batch_size",
            "divergence",
            "distillation_coef",
            "negative_prompt",
            "rollout_source",
            "prefix_baseline",
            "prefix_lambda",
            "diversity_codebooks",
            "ema_decay",
            "seed",
        )
        training: dict[str, Any] = {
            "initial_model": self._base_model and named_here(self._base_model),
            # One adapter holds both runs; see `continuing`.
            "includes_adapter": self._start and named_here(self._start.checkpoint.source),
            "steps": self.state.global_step,
            "clip_seconds": self._num_frames / frame_rate(unwrap(self.model)),
        }
        base_model = args.teacher_model or self._base_model
        return Provenance(
            kind="student",
            base_model=base_model and named_here(base_model),
            guidance_scale=args.guidance_scale,
            diversity_coef=args.diversity_coef,
            sampling=self._sampling,
            training=training | {name: getattr(args, name) for name in named},
        )

    def create_model_card(
        self,
        model_name: str | None = None,
        dataset_name: str | None = None,
        tags: str | list[str] | None = None,
    ) -> None:
        """README.md of the student: the card that `merge` and `publish` write too (TRL's says text
        generation)."""
        folder = self.args.output_dir
        if not self.is_world_process_zero() or read_provenance(folder) is None:
            return  # a checkpoint's turn comes before the student itself is saved
        plot_training_curves(folder, self.state.log_history)
        write_card(
            folder,
            repo_id=self.args.hub_model_id or model_name,
            datasets=[dataset_name] if dataset_name else (),
            tags=[tags] if isinstance(tags, str) else tags or (),
        )


class _Housekeeping(TrainerCallback):
    """The trainer's own events."""

    def __init__(self, trainer: Checkpointing):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._settle()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._check_finite()
        if self.trainer._average is not None:
            self.trainer._average.update()
