"""Checkpoints: what is in one, how it takes its place, and how a run continues from it."""

import os
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from transformers.trainer import OPTIMIZER_NAME, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from trl import RLOOTrainer

from diverse_cfg.atomic import writing
from diverse_cfg.callbacks import AdaptiveClipCallback
from diverse_cfg.trainer.advantages import Advantages
from diverse_cfg.trainer.state import (
    AVERAGE_FILE,
    BUFFER_FILE,
    STATE_FILE,
    WeightAverage,
    continuing_from,
    is_whole,
    load_buffer,
    read_tensors,
    save_buffer,
    write_tensors,
)

if TYPE_CHECKING:
    from diverse_cfg.config import CFGDiversityConfig


class Resuming(RLOOTrainer):
    """Base of the trainer: writes and reads its checkpoints."""

    args: "CFGDiversityConfig"
    _adaptive_clip: AdaptiveClipCallback | None
    _advantages: Advantages
    _average: WeightAverage | None
    _beside: str | None
    _block_length: int
    _checkpoint: str | None
    _frozen_total: int | None

    def _get_output_dir(self, trial: Any) -> str:
        return self._beside or super()._get_output_dir(trial)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As `Trainer._save_checkpoint`, beside its place: a folder `checkpoint-N` is complete, also when the
        process is killed while it rewrites one."""
        run, step = self._get_output_dir(trial), self.state.global_step
        place = Path(run) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        beside = place.with_name(f".{place.name}.{step:08x}.incomplete")  # on every process the same
        written = beside / place.name
        self._beside = str(beside)
        try:
            with writing(place):
                super()._save_checkpoint(model, trial)
                if self._average is not None and self.args.should_save:
                    self._average.save(written)
                if self.state.best_model_checkpoint == str(written):
                    self.state.best_model_checkpoint = str(place)
                    if self.args.should_save:
                        self.state.save_to_json(str(written / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    if place.exists():
                        place.rename(beside / "replaced")
                    written.rename(place)
        finally:
            self._beside = None
            if self.args.should_save:
                shutil.rmtree(beside, ignore_errors=True)
        self._checkpoint = str(place)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate_checkpoints(
                run, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As `Trainer._determine_best_metric`; what is best is saved, also between the steps that are saved anyway."""
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._beside is None:  # else it has not taken its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _needed_to_resume(self, folder: str) -> list[str]:
        """Files that this process needs; transformers goes on without them and says nothing."""
        several, rank = self.args.world_size > 1, self.args.process_index
        noise = f"rng_state_{rank}.pth" if several else "rng_state.pth"
        needed = [] if self.is_deepspeed_enabled else [SCHEDULER_NAME]
        if not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            needed.append(OPTIMIZER_NAME)
            weights = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFETENSORS_WEIGHTS_NAME)
            if not any((Path(folder) / name).is_file() for name in weights):
                needed.append(weights[2 if isinstance(self.model, PeftModel) else 0])
        state = Path(folder) / STATE_FILE
        # Nothing of a state that is missing or damaged, which is told later, or of older versions.
        has = read_tensors(state)[1] if is_whole(state) else {}
        if self.args.ema_decay and "average" in has:
            needed.append(AVERAGE_FILE)
        if getattr(self.accelerator, "scaler", None) is not None:
            needed.append(SCALER_NAME)
        others = [path for path in Path(folder).glob("rng_state*.pth") if path.name != noise]
        if others and not (Path(folder) / noise).is_file():
            warnings.warn(
                f"{folder} has no {noise}: it was written by another number of processes, and what is drawn "
                "outside of the package (a reward's noise, say) differs from here on",
                stacklevel=3,
            )
            return needed
        if "buffer" in has:
            needed.append(BUFFER_FILE.format(rank=rank))
        return [*needed, noise]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        adapter = Path(resume_from_checkpoint) / SAFETENSORS_WEIGHTS_NAME
        with continuing_from(resume_from_checkpoint):
            if isinstance(self.model, PeftModel) and adapter.is_file():  # PEFT goes on without what it lacks
                own = get_peft_model_state_dict(self.model, save_embedding_layers=False)
                if lacking := own.keys() - read_tensors(adapter)[0].keys():
                    raise ValueError(f"it lacks weights such as {min(lacking)}")
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with continuing_from(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with continuing_from(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Refuse what transformers warns about: weights that a checkpoint lacks stay those of the start."""
        state, missing = self.model.state_dict(), load_result.missing_keys
        there = {tensor.data_ptr() for name, tensor in state.items() if name not in missing}
        lacking = [name for name in missing if state[name].data_ptr() not in there]  # tied ones are there
        if wrong := [*lacking, *load_result.unexpected_keys]:
            which = "lacks" if lacking else "has unexpected"
            raise ValueError(f"it {which} weights such as {wrong[0]}")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Called for every checkpoint that can be resumed from, on every process.
        super()._save_optimizer_and_scheduler(output_dir)
        self._save_state(output_dir)

    def _save_state(self, folder: str) -> None:
        os.makedirs(folder, exist_ok=True)
        has = {} if self._average is None else {"average": "1"}
        if self._step % self._block_length and self._buffered_inputs is not None:
            save_buffer(folder, self.accelerator.process_index, self._buffered_inputs)
            has["buffer"] = "1"
        if not self.args.should_save:
            return
        state = {"step": torch.tensor(self._step)}
        if self._frozen_total is not None:
            state["frozen_weights"] = torch.tensor(self._frozen_total)
        if self._advantages.prefix is not None:
            state |= {
                f"prefix/{name}": value.cpu() for name, value in self._advantages.prefix.state().items()
            }
        if self._adaptive_clip is not None and self._adaptive_clip.mean is not None:
            state["gradient_norm"] = torch.tensor(self._adaptive_clip.mean, dtype=torch.float64)
        write_tensors(Path(folder) / STATE_FILE, state, has)

    def _load_state(self, folder: str) -> None:
        state, _ = read_tensors(Path(folder) / STATE_FILE)
        frozen = int(state.get("frozen_weights", -1))
        if self._frozen_total is not None and frozen not in (-1, self._frozen_total):
            raise ValueError(
                f"{folder} was written by a run with another teacher or base: resume with the model and "
                "teacher_model that the run began with"
            )
        best_step = self.state.best_global_step
        best = Path(folder).parent / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
        if best.is_dir():  # also when the run was moved
            self.state.best_model_checkpoint = str(best)
        elif self.args.load_best_model_at_end and best_step and self.state.best_model_checkpoint is None:
            warnings.warn(f"{best}, the best checkpoint, is gone: it is chosen from here on", stacklevel=2)
            self.state.best_metric = self.state.best_global_step = None
        self._step = int(state["step"])
        self._buffered_inputs = load_buffer(folder, self.accelerator.process_index, self.accelerator.device)
        if self._advantages.prefix is not None:
            prefix = {
                name.removeprefix("prefix/"): v for name, v in state.items() if name.startswith("prefix/")
            }
            self._advantages.prefix.load_state(prefix)
        if self._adaptive_clip is not None and "gradient_norm" in state:
            self._adaptive_clip.mean = float(state["gradient_norm"])
        if self._average is not None:
            self._average.load(folder)
