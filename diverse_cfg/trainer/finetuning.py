"""`MusicSFTTrainer`: recordings → codes → clips → cross-entropy → update.

It is transformers' `Trainer` with its own loss, order and evaluation. TRL's `SFTTrainer` would tokenise text, pack
it and read a chat template: more to disguise than to use. What a checkpoint holds and how a run resumes is
`keeping`'s, as for the other trainer.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Sampler
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed

from diverse_cfg.atomic import filling
from diverse_cfg.callbacks import AudioSamplesCallback, EvaluationClip, peak_memory_gb
from diverse_cfg.config import MusicSFTConfig
from diverse_cfg.functional.distillation import DistillationTerms
from diverse_cfg.policies.layers import merged_state
from diverse_cfg.policies.loading import is_distilled
from diverse_cfg.policies.policy import Policy, plain, require_prompts
from diverse_cfg.recordings import (
    Cuts,
    Recording,
    collate,
    encode_recordings,
    find_recordings,
    split_recordings,
)
from diverse_cfg.trainer import checkpoints, disguises, setup
from diverse_cfg.trainer.checkpoints import RunMemory
from diverse_cfg.trainer.estimate import Rollout, memory
from diverse_cfg.trainer.housekeeping import Housekeeping
from diverse_cfg.trainer.keeping import KeptRun
from diverse_cfg.trainer.objective import LossSettings, likelihood_terms
from diverse_cfg.trainer.teacher import FrozenWeights, rollout_dtype
from diverse_cfg.types import TextCondition

_KEPT = (*checkpoints.KEPT_BY_ALL, "text_dropout", "held_out", "quick")
_TOP_K = 250  # of the clips that are generated at evaluations; AudioCraft's own


class MusicSFTTrainer(KeptRun):
    """Supervised fine-tuning of a policy over codes on a user's own recordings.

    Args:
        model: Hub id, folder or live model, also of AudioCraft; not one that was distilled.
        args: a `MusicSFTConfig`.
        train_dataset: whatever `find_recordings` takes, or a list of `Recording`.
        eval_dataset: the same, to evaluate on; None holds out `args.held_out` of the training recordings.
        processing_class: the model's processor or tokenizer; needed for a live model that names no folder.
        callbacks: further callbacks.
        optimizers: optimiser and scheduler, as in transformers.
        peft_config: a `LoraConfig`; its default targets are the policy's. Checkpoints hold the adapter, and what is
            saved in the end is the whole model, so that every other command takes it as a base.

    Attributes:
        recordings: that are trained on.
        held_out: recordings to evaluate on.

    Raises:
        ValueError, FileNotFoundError: whatever cannot work is refused here, naming the option or the file.
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | os.PathLike | nn.Module | Policy,
        args: MusicSFTConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        model, processing_class = setup.open_model(model, processing_class)
        self.base_model = setup.base_model_name(model)
        if args is None:
            args = MusicSFTConfig(output_dir=f"{Path(self.base_model or 'model').name}-finetuned")
        if not isinstance(args, MusicSFTConfig):
            raise ValueError(f"args is a {type(args).__name__}; pass a MusicSFTConfig")
        _check_base(model)
        lora, peft_config = peft_config is not None, setup.lora_config(peft_config)
        if whole := getattr(peft_config, "modules_to_save", None):
            raise ValueError(
                f"modules_to_save={whole}: only LoRA layers are merged into the model; leave it unset"
            )
        found = _found(train_dataset, "train_dataset")
        found_held_out = [] if eval_dataset is None else _found(eval_dataset, "eval_dataset")
        policy = self._policy = setup.prepare_policy(model, args, lora)
        setup.give_targets(peft_config, policy)
        self._num_frames, self._num_codebooks = (
            setup.clip_frames(policy, args.clip_seconds),
            len(policy.delays),
        )
        policy.processor = setup.processor_of(processing_class, policy, self.base_model)
        for recording in (*found, *found_held_out):
            require_prompts([recording.caption], policy.tokenizer, f"{recording.name}: ")
        policy.model.to(args.device)
        with args.main_process_first(desc="encoding the recordings"):
            encode = functools.partial(encode_recordings, policy=policy, quiet=args.process_index > 0)
            self.recordings = encode(found[:1] if args.quick else found)
            self.held_out = encode(found_held_out) if found_held_out else []
        cuts = self._cuts(args)
        self._frozen = FrozenWeights(*[policy] * lora)
        self._memory = RunMemory(self._frozen.total(model), initial=setup.initial_weights(model, policy))
        set_seed(args.seed)  # new adapters start at random
        super().__init__(
            model=get_peft_model(policy.model, peft_config) if peft_config is not None else policy.model,
            args=args,
            data_collator=collate,
            train_dataset=cuts,
            eval_dataset=Cuts(self.held_out, self._num_frames) if self.held_out else None,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._memory.keep(self.model, self._settings_to_keep(args), args.world_size)
        disguises.route_forward(policy.model)
        setup.check_trained(policy)
        if self.is_fsdp_enabled:
            raise ValueError("finetune does not run with FSDP: use DDP or ZeRO-2 (recipes/accelerate)")
        self.model_accepts_loss_kwargs = True  # the loss is divided by the codes of the whole step
        self._loss_settings = LossSettings(
            "reverse_kl", 0.5, 1.0, 0.2, None, policy.delays, args.loss_chunk_size
        )
        self._evaluation_clips: list[EvaluationClip] = []
        self._housekeeping = _Housekeeping(self)
        self.callback_handler.callbacks.insert(0, self._housekeeping)
        if args.audio_samples:
            self.add_callback(AudioSamplesCallback(lambda: self._evaluation_clips))

    # ---- clips -------------------------------------------------------------------------------------------

    def _cuts(self, args: MusicSFTConfig) -> Cuts:
        """The training clips; also decides what is held out."""
        if args.quick:
            first = self.recordings[0]
            self.recordings = self.held_out = [replace(first, codes=first.codes[:, : self._num_frames])]
            return Cuts(self.recordings, self._num_frames)
        if not self.held_out:
            self.recordings, self.held_out = split_recordings(self.recordings, args.held_out, args.seed)
        if not self.held_out:
            if args.load_best_model_at_end:
                raise ValueError(
                    "load_best_model_at_end needs recordings to evaluate on: set held_out above 0"
                )
            args.eval_strategy, args.eval_on_start = type(args.eval_strategy)("no"), False
        return Cuts(self.recordings, self._num_frames, args.seed, args.text_dropout)

    def _settings_to_keep(self, args: MusicSFTConfig) -> dict[str, Any]:
        """What a resumed run may not change."""
        data = [(recording.digest, recording.caption) for recording in (*self.recordings, *self.held_out)]
        digest = hashlib.blake2b(json.dumps(data).encode(), digest_size=4).hexdigest()
        settings = {name: getattr(args, name) for name in _KEPT}
        settings["clip_seconds"] = self._num_frames / self._policy.frame_rate
        return settings | {"recordings": f"{len(data)} ({digest})"}

    def _get_train_sampler(self, train_dataset=None):
        cuts: Any = self.train_dataset if train_dataset is None else train_dataset
        return _EpochOrder(len(cuts), self.args.seed, lambda: int(self.state.epoch or 0))

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Batches of an optimiser step, and the number of codes in them over all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = torch.stack([(batch["labels"] >= 0).sum() for batch in batches]).sum().to(device)
        return batches, self.accelerator.reduce(count)

    # ---- loss --------------------------------------------------------------------------------------------

    def _likelihood(
        self, model: nn.Module, batch: dict[str, Any], weight: float | Tensor
    ) -> DistillationTerms:
        condition = self._policy.encode_text(batch["captions"])
        null, dropped = self._policy.null(condition), batch["dropped"].to(condition.hidden_states.device)
        condition = TextCondition(
            torch.where(dropped[:, None, None], null.hidden_states, condition.hidden_states),
            torch.where(dropped[:, None], null.attention_mask, condition.attention_mask),
        )
        with self.accelerator.autocast():
            return model(
                run=functools.partial(
                    likelihood_terms,
                    self._policy,
                    batch["labels"],
                    condition,
                    weight,
                    self.args.loss_chunk_size,
                )
            )

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean cross-entropy (nats per code) over the codes of the step; processes are averaged afterwards."""
        assert num_items_in_batch is not None
        terms = self._likelihood(model, inputs, self.accelerator.num_processes / num_items_in_batch)
        return (terms.loss, terms) if return_outputs else terms.loss

    # ---- evaluation --------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        """As `Trainer.evaluate`; the training run does not notice it."""
        self._evaluation_clips = []
        with torch.random.fork_rng(devices=[]):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Per clip: nats of each codebook, and of all without the text [N, K + 1]; number of codes [N, 1]."""
        inputs = self._prepare_inputs(inputs)
        valid = inputs["labels"] >= 0
        with torch.no_grad():
            told = self._likelihood(model, inputs, 0.0).logps
            untold = self._likelihood(
                model, inputs | {"dropped": torch.ones_like(inputs["dropped"])}, 0.0
            ).logps
        nats = [-torch.where(valid, logps, 0).sum(dim=2) for logps in (told, untold)]
        counts = valid.sum(dim=(1, 2))[:, None]
        nats = torch.cat([nats[0], nats[1].sum(dim=1, keepdim=True)], dim=1)
        return nats[:, :-1].sum() / counts.sum(), nats, counts

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        kwargs["prediction_loss_only"] = False
        output: Any = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        nats, codes = output.predictions.sum(axis=0, dtype="float64"), int(output.label_ids.sum())
        found = {"loss": nats[:-1].sum() / codes, "loss/no_text": nats[-1] / codes}
        per_codebook = codes / self._num_codebooks
        found |= {f"loss/codebook_{k}": nats[k] / per_codebook for k in range(self._num_codebooks)}
        output.metrics.update({f"{metric_key_prefix}_{name}": float(value) for name, value in found.items()})
        self._evaluation_clips = self._generate_samples()
        return output

    @torch.no_grad()
    def _generate_samples(self) -> list[EvaluationClip]:
        """Clips for the first captions of the held-out recordings, with the model's own guidance."""
        policy, wanted = self._policy, self.args.audio_samples
        captions = list(dict.fromkeys(recording.caption for recording in self.held_out))[:wanted]
        if not captions:
            return []
        own = policy.model.generation_config.guidance_scale
        clips = policy.sample(
            policy.encode_text(captions),
            self._num_frames,
            guidance_scale=own or 1.0,
            top_k=min(_TOP_K, policy.vocab_size),
            seed=self.args.seed,
            weights=policy.snapshot(rollout_dtype(self.args)),
        )
        waveforms = policy.decode(clips.codes).cpu()
        pairs = zip(captions, waveforms, strict=True)
        return [EvaluationClip(caption, audio, policy.sampling_rate) for caption, audio in pairs]

    def log(self, logs, start_time=None):
        peak = peak_memory_gb(self.accelerator.device)
        super().log(logs | ({} if peak is None else {"memory/peak_gb": peak}), start_time)

    # ---- what is saved -----------------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self._memory.save(output_dir, 0, None, self.accelerator.process_index, self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir, policy = output_dir or str(self.args.output_dir), self._policy
        with filling(output_dir) as folder, disguises.without_text(self):
            if isinstance(self.model, PeftModel) and self._beside is None:
                policy.model.save_pretrained(folder, state_dict=merged_state(policy.model))
            else:
                super()._save(str(folder), state_dict)
            policy.processor.save_pretrained(folder)
            policy.model.generation_config.save_pretrained(folder)
            (folder / checkpoints.PICKLE).unlink(missing_ok=True)


class _EpochOrder(Sampler):
    """A random order that depends on seed and epoch alone; clip i of epoch n has the number i + n · size."""

    def __init__(self, size: int, seed: int, epoch: Callable[[], int]):
        self.size, self.seed, self.epoch = size, seed, epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch()
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * epoch)
        yield from (torch.randperm(self.size, generator=generator) + epoch * self.size).tolist()


class _Housekeeping(Housekeeping):
    """Before the first step: whether a resumed run is whole, and what memory the run needs."""

    def begin(self) -> None:
        trainer: Any = self.trainer
        self.check_resumed()
        if trainer._checkpoint is not None:
            args = trainer.args
            checkpoints.find_best(trainer.state, trainer._checkpoint, args.load_best_model_at_end)
        if trainer.is_world_process_zero():
            tqdm.write(f"estimate: {self._estimate()}", file=sys.stderr)

    def _estimate(self) -> str:
        trainer: Any = self.trainer
        guided = (trainer._policy.model.generation_config.guidance_scale or 1) > 1
        samples = [Rollout(False, trainer.args.audio_samples, guided)] if trainer.eval_dataset else []
        needs = memory(
            trainer._policy,
            trainer.args,
            num_frames=trainer._num_frames,
            rollouts=samples,
            trained=sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
            separate_teacher=False,
        )
        return f"{needs}{', less what is sharded' if self.sharded else ''}"


def _check_base(model: Any) -> None:
    live = isinstance(model, nn.Module)
    if getattr(plain(model), "is_distilled", False) if live else is_distilled(model):
        name = "the model" if live else os.fspath(model)
        raise ValueError(f"{name} is distilled already: fine-tune its base, and distil that afterwards")


def _found(data: Any, name: str) -> list[Recording]:
    if data is None:
        raise ValueError(f"{name} is required: a folder of recordings, a table or a dataset")
    listed = isinstance(data, list | tuple) and data and all(isinstance(one, Recording) for one in data)
    return list(data) if listed else find_recordings(data)
