"""How a run keeps what it has done: one process in its folder, whole checkpoints, an exact resumption."""

import contextlib
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from diverse_cfg.atomic import alone, require_space
from diverse_cfg.trainer import checkpoints, disguises
from diverse_cfg.trainer.checkpoints import RunMemory, continuing_from
from diverse_cfg.trainer.teacher import FrozenWeights

LEFT_ALONE = "a callback or a reward function changes them; give it a copy of the model"


class KeptRun(Trainer):
    """transformers' loop and checkpoints, for every trainer of this package.

    Attributes:
        _memory: what changes besides weights and optimiser.
        _frozen: weights that must stay as they are.
        _housekeeping: finds the checkpoint to resume from.
        _checkpoint: that the run continues, or that it wrote last.
        _beside: where a checkpoint is being written.
    """

    _memory: RunMemory
    _frozen: FrozenWeights
    _housekeeping: Any
    _checkpoint: str | None = None
    _beside: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """As `Trainer.train`, with its output folder to itself; a resumed run continues exactly, also between two
        updates on the same clips.

        With `ema_decay` the model has the averaged weights afterwards: those of the best checkpoint with
        `load_best_model_at_end`.

        Args:
            resume_from_checkpoint: folder, or True for the last one; None takes the settings'.
            kwargs: of `Trainer.train`.

        Raises:
            ValueError: there is no checkpoint to resume from, or one of its files is missing, damaged or not finite;
                or the prompts ended before the first step.
            FloatingPointError: the weights, or what they compute, are no longer finite; nothing of it is saved.
            FileExistsError: another run is writing to the folder.
            UnwritableError: the disk has no room for the student.
        """
        first = self.is_world_process_zero() and self.args.output_dir is not None
        with alone(self.args.output_dir) if first else contextlib.nullcontext() as folder:
            if folder is not None:
                require_space(folder, checkpoints.saved_bytes(self.model), folder)
            output = self._train(resume_from_checkpoint, kwargs)
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "no step was made: train_dataset gave no prompts when training began; a stream must start anew "
                "whenever it is read"
            )
        return output

    def _train(self, wanted: str | bool | None, kwargs: dict[str, Any]):
        wanted = self.args.resume_from_checkpoint if wanted is None else wanted
        self._checkpoint = self._housekeeping.resume(wanted)
        try:
            with disguises.without_tokenizer(self):
                return super().train(resume_from_checkpoint=self._checkpoint, **kwargs)
        except FloatingPointError as error:
            last = self._checkpoint  # others in the folder are of an earlier run
            way_back = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}; {way_back}") from error

    def _run_epoch(self, *args, **kwargs):
        if not disguises.has_ended(self):
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As `Trainer.training_step`; the loss must be finite before the update."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} after step {self.state.global_step}")
        return loss

    # ---- checkpoints -------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """As `Trainer._save_checkpoint`, beside its place."""
        run, step = self._get_output_dir(trial), self.state.global_step
        place = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        writes, wait = self.args.should_save, self.accelerator.wait_for_everyone
        try:
            with checkpoints.beside(place, step, self.state, writes, wait) as written:
                self._beside = str(written.parent)
                super()._save_checkpoint(model, trial)
                if self._memory.average is not None and writes:
                    self._memory.average.save(written)
        finally:
            self._beside = None
        self._checkpoint = str(place)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if writes:
            rotate_checkpoints(
                run, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _get_output_dir(self, trial) -> str:
        return self._beside or super()._get_output_dir(trial)

    def _determine_best_metric(self, metrics: dict[str, float], trial) -> bool:
        """As `Trainer._determine_best_metric`; what is best is saved, also between the steps that are saved anyway."""
        try:
            best = super()._determine_best_metric(metrics, trial)
        except KeyError as error:
            known = ", ".join(name.removeprefix("eval_") for name in metrics)
            raise ValueError(
                f"metric_for_best_model={self.args.metric_for_best_model!r} is not measured here; take one of {known}"
            ) from error
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._beside is None:  # else it has not taken its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with continuing_from(resume_from_checkpoint):
            checkpoints.check_adapter_weights(self.model, resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with continuing_from(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None and not self.is_deepspeed_enabled:
                checkpoints.check_optimizer(self.optimizer)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with continuing_from(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        checkpoints.check_loaded(self.model, load_result)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model: the averaged weights, if any; checkpoints hold the raw ones beside them."""
        self._frozen.check(LEFT_ALONE)
        with contextlib.nullcontext() if _internal_call else self._memory.averaged():
            self._housekeeping.check_finite(computes=True, resumable=self._beside is not None)
            super().save_model(output_dir, _internal_call)
