"""Around the training loop: what is measured before the first step, and what must hold after every one."""

import functools
import itertools
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from tqdm.auto import tqdm
from transformers import TrainerCallback
from transformers.utils import SAFE_WEIGHTS_NAME

from diverse_cfg.rewards import is_pairwise
from diverse_cfg.trainer.advantages import CALIBRATION_PROMPTS
from diverse_cfg.trainer.checkpoints import (
    WeightAverage,
    check_checkpoint,
    checkpoint_to_resume,
    continuing_from,
    instead_of,
    needed_to_resume,
)
from diverse_cfg.trainer.estimate import all_rollouts, memory, seconds, training_rollouts
from diverse_cfg.trainer.objective import student_terms
from diverse_cfg.trainer.setup import columns, reward_context
from diverse_cfg.trainer.teacher import sampler_share
from diverse_cfg.types import Clips

if TYPE_CHECKING:
    from diverse_cfg.trainer.trainer import CFGDiversityTrainer


class Housekeeping(TrainerCallback):
    """The trainer's own events.

    Args:
        trainer: whose run it keeps in order.
    """

    def __init__(self, trainer: "CFGDiversityTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.begin()

    def on_step_end(self, args, state, control, **kwargs):
        self.check_finite()
        if self.trainer._memory.average is not None:
            self.trainer._memory.average.update()

    def on_train_end(self, args, state, control, **kwargs):
        # The model is from here on what is evaluated and saved.
        if self.trainer._memory.average is not None:
            self.trainer._memory.average.settle()
            self.trainer._memory.average = None

    @property
    def sharded(self) -> str | None:
        """What spreads the weights over the processes, if anything."""
        if self.trainer.is_deepspeed_enabled:
            return "deepspeed"
        return "fsdp" if self.trainer.is_fsdp_enabled else None

    def resume(self, wanted: str | bool | None) -> str | None:
        """The folder to continue from, its files looked at; None to begin.

        Raises:
            ValueError: there is none, one of its files is missing or damaged, or it belongs to another run.
        """
        trainer = self.trainer
        folder = checkpoint_to_resume(wanted, trainer.args.output_dir)
        if folder is not None:
            needed = needed_to_resume(
                folder,
                trainer.args,
                adapter=isinstance(trainer.model, PeftModel),
                sharded=self.sharded,
                scaled=getattr(trainer.accelerator, "scaler", None) is not None,
            )
            check_checkpoint(folder, needed)
            trainer._memory.check(folder)
        return folder

    def begin(self) -> None:
        """First thing of a training run, the model being where it will be trained."""
        trainer = self.trainer
        trainer._policy.set_sampling(trainer._settings)
        self.check_resumed()
        if trainer.args.ema_decay > 0:
            trainer._memory.average = WeightAverage(trainer.model, trainer.args.ema_decay)
        if trainer.is_world_process_zero():
            tqdm.write(f"estimate: {self._estimate()}", file=sys.stderr)
        self._calibrate_guards()
        if self.sharded:
            trainer._frozen = trainer._frozen.without(trainer._policy)
        if trainer._checkpoint is not None:
            with continuing_from(trainer._checkpoint):
                trainer._load_state(trainer._checkpoint)

    def check_resumed(self) -> None:
        """Whether the checkpoint that a run continues from holds a model, and the one that the run began with.

        Raises:
            ValueError: it does not.
        """
        trainer = self.trainer
        if trainer._checkpoint is None:
            return
        done, wanted = trainer.state.global_step, trainer.state.max_steps
        if done > wanted:
            raise ValueError(
                f"{trainer._checkpoint} has {done} steps behind it, and the run ends after {wanted}: raise max_steps "
                "(or num_train_epochs), or resume from an earlier checkpoint"
            )
        try:  # older versions saved what had diverged
            self.check_finite(computes=True, resumable=True)
        except FloatingPointError as error:
            remedy = instead_of(trainer._checkpoint)
            raise ValueError(f"{trainer._checkpoint} ({error}): {remedy}") from error
        if not self.sharded:
            weights = Path(trainer._checkpoint) / SAFE_WEIGHTS_NAME
            weights = weights if weights.is_file() else weights.parent
            trainer._frozen.check(f"{weights} is damaged, {instead_of(trainer._checkpoint)}")

    def check_finite(self, *, computes: bool = False, resumable: bool = False) -> None:
        """Whether the student is still one.

        Args:
            computes: also let it compute the log-probs of a few codes, which huge weights cannot.
            resumable: also look at what else a checkpoint holds, optimizer and averaged weights.

        Raises:
            FloatingPointError: it is not.
        """
        trainer = self.trainer
        moments = {} if trainer.is_deepspeed_enabled or not resumable else trainer.optimizer.state
        what = trainer._memory.broken(trainer.model, moments if resumable else None)
        if what is None and computes and not self.sharded:
            with torch.no_grad(), trainer.accelerator.autocast():
                clips = self._any_clips(1, min(trainer._num_frames, 8))
                terms, _ = student_terms(trainer._policy, clips, trainer._loss_settings)
            what = None if terms.logps.isfinite().all() else "the student's logits are inf or nan"
        if what is not None:
            remedy = "max_grad_norm" + " or adaptive_clip" * hasattr(trainer.args, "adaptive_clip")
            raise FloatingPointError(
                f"after step {trainer.state.global_step} {what}: check learning_rate={trainer.args.learning_rate} and "
                f"weight_decay={trainer.args.weight_decay}, or clip the gradient with {remedy}"
            )

    def _any_clips(self, num_clips: int, num_frames: int) -> Clips:
        """Clips of no meaning, to measure with."""
        trainer = self.trainer
        codes = torch.zeros(num_clips, trainer._num_codebooks, num_frames, dtype=torch.long)
        condition = trainer._policy.encode_text(["a song"] * num_clips)
        return Clips(codes.to(trainer.accelerator.device), trainer._policy.sampling_rate, condition=condition)

    def _estimate(self) -> str:
        """What the run needs: memory, and seconds per step."""
        trainer = self.trainer
        args = trainer.args
        needs = memory(
            trainer._policy,
            args,
            num_frames=trainer._num_frames,
            rollouts=all_rollouts(args, trainer.eval_dataset is not None),
            trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            separate_teacher=not trainer._teacher.shares_weights,
        )
        needs = f"{needs}, reward models come on top"
        if self.sharded:
            return f"{needs}, less what is sharded"
        rollout, update = self._measure()
        stock = args.rollout_backend != "fast"
        by = f" by stock generate, since rollout_backend={args.rollout_backend!r}" if stock else ""
        return f"{needs}; {rollout + update:.2g} s per step (rollout {rollout:.2g}{by}, update {update:.2g})"

    def _measure(self) -> tuple[float, float]:
        """Seconds that one optimiser step spends on its rollout and on its updates, from a few clips."""
        trainer, args, device = self.trainer, self.trainer.args, self.trainer.accelerator.device
        clips = args.per_device_train_batch_size * args.gradient_accumulation_steps
        # A GPU takes a whole micro-batch in the time of a few clips; a CPU takes them one after the other.
        rows = min(args.per_device_train_batch_size, 4 if device.type == "cpu" else clips)
        batch = self._any_clips(rows, trainer._num_frames)
        parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]

        def update() -> None:
            with trainer.accelerator.autocast():
                teacher = trainer._teacher(batch.codes, batch.condition)
                weight = 1 / batch.codes.numel()
                terms, _ = student_terms(
                    trainer._policy, batch, trainer._loss_settings, teacher, divergence_weight=weight
                )
            torch.autograd.grad(terms.loss, parameters, allow_unused=True)

        frames = min(trainer._num_frames, 8)
        steps = (trainer._num_frames + trainer._num_codebooks) / (frames + trainer._num_codebooks)
        per_clip = 0.0
        for rollout in training_rollouts(args):
            sampled, who = min(args.rollout_batch_size or clips, clips, rollout.clips), rollout.is_teacher
            texts, ids = self._any_clips(sampled, 1).condition, torch.arange(sampled, device=device)
            sample = functools.partial(trainer._sample, texts, ids, 0, who, num_frames=frames)
            per_clip += seconds(sample, device) * steps / sampled * sampler_share(args, who)
        return per_clip * clips / args.num_iterations, seconds(update, device) * clips / rows

    def _calibrate_guards(self) -> None:
        """Limits that depend on how the base and the teacher play."""
        trainer = self.trainer
        guards, group = trainer.args.guards, trainer.num_generations
        if not guards.calibrated:
            return
        rows = itertools.islice(trainer.train_dataset, CALIBRATION_PROMPTS)
        rows = [row for row in rows for _ in range(group)]
        prompts = [row["prompt"] for row in rows]
        condition = trainer._policy.encode_text(prompts)
        ids = torch.arange(len(prompts), device=condition.hidden_states.device)
        if guards.distance_quantile is not None:  # of the unguided base
            codes = trainer._sample(condition, ids, trainer.args.seed, True, guidance_scale=1.0)
            for function in filter(is_pairwise, trainer.reward_funcs):
                trainer._cross_guards.measure_distances(
                    function, trainer._embed(function.embedder, codes), group
                )
        if guards.gate is not None:  # of the guided teacher
            codes = trainer._sample(condition, ids, trainer.args.seed, True)
            clips = Clips(codes, trainer._policy.sampling_rate, prompts=prompts, columns=columns(rows))
            clips.waveforms = trainer._policy.decode(codes)
            trainer._cross_guards.measure_gate(prompts, reward_context(clips, group))
