"""`CFGDiversityTrainer`: prompts → clips → rewards → advantages → loss → update, in the order of this file.

TRL's `RLOOTrainer` brings prompt groups, reward functions, accumulation, distribution, checkpoints and logging.
It knows one stream of text tokens; how a clip travels through it is told in `disguises`. Between the methods of
this file travel `types.Clips`.

Left out on purpose: a sequence-level importance ratio (meaningless over thousands of codes: ratios are per
code), a reference model (the teacher is the anchor), and the second forward pass for old log-probs where they
equal the new ones.
"""

import contextlib
import functools
import hashlib
import itertools
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from diverse_cfg.atomic import alone, filling, require_space
from diverse_cfg.callbacks import (
    AdaptiveClipCallback,
    AudioSamplesCallback,
    EvaluationClip,
    RewardHackingAlarm,
    peak_memory_gb,
)
from diverse_cfg.cards import plot_training_curves, public_name, write_card
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.embeddings import Embedder, load_embedder
from diverse_cfg.functional.diversity import diversity_reward
from diverse_cfg.merging.adapter import AdapterStart
from diverse_cfg.policies.audiocraft import from_audiocraft, is_live_audiocraft
from diverse_cfg.policies.musicgen.policy import delays, encode_text, frame_rate, unwrap
from diverse_cfg.policies.sampler.rollout import RolloutWeights, decode_codes, sample_codes
from diverse_cfg.policies.sampler.weights import whole_weights
from diverse_cfg.policies.stored import is_adapter
from diverse_cfg.provenance import Provenance, read_provenance, write_provenance
from diverse_cfg.rewards import checked, embed_clips, is_pairwise, reads_waveforms
from diverse_cfg.trainer import checkpoints, disguises, setup
from diverse_cfg.trainer.advantages import CALIBRATION_PROMPTS, Advantages, CrossGuards, PrefixBaseline
from diverse_cfg.trainer.checkpoints import RunMemory, WeightAverage, continuing_from
from diverse_cfg.trainer.estimate import all_samplings, memory, step_seconds
from diverse_cfg.trainer.objective import LossSettings, loss_metrics, student_terms, term_gradient_norms
from diverse_cfg.trainer.teacher import (
    FrozenWeights,
    Teacher,
    check_teacher,
    has_own_teacher,
    sampler_share,
    samplers,
    separate_teacher,
    to_device,
)
from diverse_cfg.types import Clips, TextCondition

# How many times its first divergence a run that continues a student may reach before an alarm rings. On the
# nano base that is halfway back to the unguided base.
_KL_LIMIT = 4.0
_LEFT_ALONE = "a callback or a reward function changes them; give it a copy of the model"
_PICKLE = "training_args.bin"  # it has no place in a model folder; resuming does not read it


class CFGDiversityTrainer(RLOOTrainer):
    """Diversity-rewarded CFG distillation of MusicGen (arXiv 2410.06084), with TRL's interface.

    Args:
        model: Hub id, folder, or `MusicgenForConditionalGeneration`; AudioCraft's checkpoints and live models
            too, as a `MusicGen` or a pair (LMModel, compression_model). It is the student's start and, unless
            `args.teacher_model` says otherwise, the teacher θ0.
        reward_funcs: callables with TRL's reward interface (see `diverse_cfg.rewards`), sync or async. None
            takes `DiversityReward` with the shipped encoder (nano base) or CLAP.
        args: a `CFGDiversityConfig`.
        train_dataset: prompts: whatever `load_prompts` takes, with a `prompt` column, or a streaming dataset
            (which needs TRL 1.9).
        eval_dataset: the same, or a dict of them.
        processing_class: the model's `MusicgenProcessor` or its tokenizer; needed when `model` is a live
            model that does not remember its folder.
        callbacks: further callbacks.
        optimizers: optimiser and scheduler, as in transformers.
        peft_config: a `LoraConfig`; its default targets are the decoder's own projections. Where the model is a
            LoRA student, what is saved is one adapter of its base that holds both (see `AdapterStart`).

    Raises:
        ValueError: whatever cannot work is refused here, before the first step, naming the option and the
            remedy.
    """

    _tag_names: ClassVar[list[str]] = ["diverse-cfg", "trl", "musicgen", "arxiv:2410.06084"]
    _name = "Diversity-Rewarded CFG Distillation"

    # ---- construction ------------------------------------------------------------------------------------

    def __init__(
        self,
        model: str | os.PathLike | nn.Module,
        reward_funcs: Callable | list[Callable] | None = None,
        args: CFGDiversityConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (
            None,
            None,
        ),
        peft_config: PeftConfig | None = None,
    ):
        if is_live_audiocraft(model):
            model, processor = from_audiocraft(model)
            processing_class = processor if processing_class is None else processing_class
        self._base_model = setup.base_model_name(model)
        if args is None:
            args = CFGDiversityConfig(output_dir=f"{Path(self._base_model or 'musicgen').name}-diverse-cfg")
        if not isinstance(args, CFGDiversityConfig):
            raise ValueError(f"args is a {type(args).__name__}; pass a CFGDiversityConfig")
        lora = peft_config is not None
        peft_config = setup.lora_config(peft_config)
        adapted = not isinstance(model, nn.Module) and is_adapter(model)
        self._start = AdapterStart(model, peft_config) if lora and adapted else None
        base = self._start.base_model if self._start else self._base_model
        setup.check_pushing(args, peft_config, base)
        check_teacher(model, args)
        policy = setup.prepare_policy(model, args, lora)
        self._num_frames = setup.clip_frames(policy, args.clip_seconds)
        setup.check_codebooks(policy, args.diversity_codebooks)
        self._delays = delays(policy)
        self._num_codebooks = len(self._delays)
        self._sampling_rate = policy.config.audio_encoder.sampling_rate
        args.max_completion_length = self._num_frames * self._num_codebooks
        self._processor = setup.processor_of(processing_class, policy, self._base_model)
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        given = reward_funcs is not None
        reward_funcs = setup.check_reward_funcs(reward_funcs, args, self._base_model)
        setup.check_run(args, reward_funcs, given, eval_dataset)
        setup.check_embedders(reward_funcs, self._sampling_rate)
        self._has_own_teacher = has_own_teacher(model, args)
        frozen = separate_teacher(policy, args.teacher_model if self._has_own_teacher else None, lora)
        # With LoRA, the student's own weights too: its adapter is saved for them.
        self._frozen = FrozenWeights(*[policy] * lora, *([] if frozen is None else [frozen]))
        # To compare when the run is resumed; where an adapter was merged, the last bits differ by machine.
        read = [args.teacher_model or model, *[model] * lora]
        merged = any(isinstance(source, nn.Module) or is_adapter(source) for source in read)
        self._memory = RunMemory(frozen=None if merged else self._frozen.total())

        self.args = args  # seams that TRL calls while it is built read it
        set_seed(args.seed)  # new adapters start at random, and not every TRL seeds them
        super().__init__(
            model=policy,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=setup.train_prompts(train_dataset, tokenizer, args, reward_funcs),
            eval_dataset=setup.prompt_dataset(eval_dataset, tokenizer, "eval_dataset", reward_funcs),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        disguises.route_forward(policy)
        setup.check_trained(policy)
        self._frozen.check("peft_config rewrites them; use a plain LoraConfig (init_lora_weights=True)")
        if self._start is not None:
            self._start.attach(self.model)
        self._sampling = {"temperature": args.temperature, "top_k": 0, "num_frames": self._num_frames}
        disguises.restore_token_ids(policy, self._sampling)
        negative = None
        if args.negative_prompt is not None:
            negative = encode_text(unwrap(self.model), tokenizer, [args.negative_prompt])
        if frozen is not None:
            to_device(frozen, self.accelerator.device)
        self._teacher = Teacher(self.model if frozen is None else frozen, args.guidance_scale, negative)
        setup.check_sharding(self.accelerator, args)
        self._prepare_run()

    def _prepare_run(self) -> None:
        args = self.args
        self._loss_settings = LossSettings.of(args, self._delays)
        if args.prefix_baseline and args.diversity_coef > 0:
            self._memory.prefix = PrefixBaseline(
                self._num_frames, args.prefix_lambda, self._delays, self.accelerator.reduce
            )
        self._cross_guards = CrossGuards(args.guards, self.reward_func_names, self.reward_funcs)
        self._advantages = Advantages(
            args, self.reward_funcs, self.reward_weights, self._delays, self._memory.prefix
        )
        self._fused_weights: dict[bool, RolloutWeights] = {}
        self._clips: Clips | None = None  # that TRL is handling
        self._generation_seconds = 0.0
        listens = args.monitor_embedder is not None and self.eval_dataset is not None
        self._monitor = load_embedder(args.monitor_embedder) if listens else None
        self._evaluation_batch = 0
        self._evaluation_clips: list[EvaluationClip] = []
        self._pushing = False
        self._checkpoint: str | None = None  # that the run continues, or that it wrote last
        self._beside: str | None = None  # where a checkpoint is being written
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        args = self.args
        if args.adaptive_clip is not None:

            def clip(limit: float):
                return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

            self._memory.clip = AdaptiveClipCallback(args.adaptive_clip, clip)
            self.add_callback(self._memory.clip)
        # Before those of the trackers, which may send the model away.
        self.callback_handler.callbacks.insert(0, _Housekeeping(self))
        if args.audio_samples and self.eval_dataset is not None:
            self.add_callback(AudioSamplesCallback(lambda: self._evaluation_clips))
        if args.alarms and self.eval_dataset is not None:
            named = zip(self.reward_func_names, self.reward_funcs, strict=True)
            quality = [name for name, function in named if not is_pairwise(function)]
            kl_limit = _KL_LIMIT if self._has_own_teacher else 1.0
            self.add_callback(RewardHackingAlarm(quality, kl_limit=kl_limit))

    # ---- the loop, and what is measured before its first step -----------------------------------------------

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
                require_space(folder, self._saved_bytes(), folder)
            output = self._train(resume_from_checkpoint, kwargs)
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "no step was made: train_dataset gave no prompts when training began; a stream must start anew "
                "whenever it is read"
            )
        return output

    def _train(self, wanted: str | bool | None, kwargs: dict[str, Any]):
        wanted = self.args.resume_from_checkpoint if wanted is None else wanted
        folder = self._checkpoint = checkpoints.checkpoint_to_resume(wanted, self.args.output_dir)
        if folder is not None:
            needed = checkpoints.needed_to_resume(
                folder,
                self.args,
                adapter=isinstance(self.model, PeftModel),
                sharded="deepspeed"
                if self.is_deepspeed_enabled
                else "fsdp"
                if self.is_fsdp_enabled
                else None,
                scaled=getattr(self.accelerator, "scaler", None) is not None,
            )
            checkpoints.check_checkpoint(folder, needed)
        try:
            with disguises.without_tokenizer(self):
                return super().train(resume_from_checkpoint=folder, **kwargs)
        except FloatingPointError as error:
            last = self._checkpoint  # others in the folder are of an earlier run
            way_back = f"the last checkpoint is {last}" if last else "there is no checkpoint yet"
            raise FloatingPointError(f"{error}; {way_back}") from error

    def _begin(self) -> None:
        """First thing of a training run, the model being where it will be trained."""
        disguises.restore_token_ids(unwrap(self.model), self._sampling)
        if self._checkpoint is not None:  # older versions saved what had diverged
            try:
                self._check_finite(computes=True, resumable=True)
            except FloatingPointError as error:
                remedy = checkpoints.instead_of(self._checkpoint)
                raise ValueError(f"{self._checkpoint} ({error}): {remedy}") from error
        if self.args.ema_decay > 0:
            self._memory.average = WeightAverage(self.model, self.args.ema_decay)
        if self.is_world_process_zero():
            tqdm.write(f"estimate: {self._estimate()}", file=sys.stderr)
        self._calibrate_guards()
        if self._is_sharded:
            # The student, and the encoders that the teacher shares with it, are in parts or another precision.
            others = [model for model in self._frozen.models if model is not unwrap(self.model)]
            self._frozen = FrozenWeights(*others, ignored=("audio_encoder.", "text_encoder."))
        if self._checkpoint is not None:
            with continuing_from(self._checkpoint):
                self._load_state(self._checkpoint)

    @property
    def _is_sharded(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _settle(self) -> None:
        """Last thing of a training run: the model is what is evaluated and saved."""
        if self._memory.average is not None:
            self._memory.average.settle()
            self._memory.average = None

    def _run_epoch(self, *args, **kwargs):
        if not disguises.has_ended(self):
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As TRL's, timed without the rollout that it may contain; the loss must be finite before the update."""
        self._generation_seconds = 0.0
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} after step {self.state.global_step}")
        update = time.perf_counter() - started - self._generation_seconds
        self._metrics["train"]["time/update"].append(update)
        peak = peak_memory_gb(self.accelerator.device)
        if peak is not None:
            self._metrics["train"]["memory/peak_gb"].append(peak)
        return loss

    def _check_finite(self, *, computes: bool = False, resumable: bool = False) -> None:
        """Whether the student is still one.

        Args:
            computes: also let it compute the log-probs of a few codes, which huge weights cannot.
            resumable: also look at what else a checkpoint holds, optimizer and averaged weights.

        Raises:
            FloatingPointError: it is not.
        """
        moments = {} if self.is_deepspeed_enabled or not resumable else self.optimizer.state
        what = self._memory.broken(self.model, moments if resumable else None)
        if what is None and computes and not self._is_sharded:
            with torch.no_grad(), self.accelerator.autocast():
                clips = self._any_clips(1, min(self._num_frames, 8))
                terms, _ = student_terms(unwrap(self.model), clips, self._loss_settings)
            what = None if terms.logps.isfinite().all() else "the student's logits are inf or nan"
        if what is not None:
            raise FloatingPointError(
                f"after step {self.state.global_step} {what}: check learning_rate={self.args.learning_rate} and "
                f"weight_decay={self.args.weight_decay}, or clip the gradient with max_grad_norm or adaptive_clip"
            )

    def _any_clips(self, num_clips: int, num_frames: int) -> Clips:
        """Clips of no meaning, to measure with."""
        codes = torch.zeros(num_clips, self._num_codebooks, num_frames, dtype=torch.long)
        song = encode_text(unwrap(self.model), self._tokenizer, ["a song"])
        return Clips(
            codes.to(self.accelerator.device), self._sampling_rate, condition=song.select([0] * num_clips)
        )

    def _estimate(self) -> str:
        """What the run needs: memory, and seconds per step."""
        args = self.args
        fused = args.rollout_backend == "fast"
        needs = memory(
            unwrap(self.model),
            micro_batch=args.per_device_train_batch_size,
            num_frames=self._num_frames,
            samplings=all_samplings(args, self.eval_dataset is not None),
            rollout_batch_size=args.rollout_batch_size,
            rollout_dtype=self._rollout_dtype,
            fused=fused,
            trained=sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            separate_teacher=not self._teacher.shares_weights,
            averaged=args.ema_decay > 0,
            half_precision=bool(args.bf16 or args.fp16),
            checkpointing=bool(args.gradient_checkpointing),
        )
        if self._is_sharded:
            return f"{needs}, less what is sharded"
        rollout, update = self._measure()
        by = "" if fused else f" by stock generate, since rollout_backend={args.rollout_backend!r}"
        return f"{needs}; {rollout + update:.2g} s per step (rollout {rollout:.2g}{by}, update {update:.2g})"

    def _measure(self) -> tuple[float, float]:
        """Seconds that one optimiser step spends on its rollout and on its updates."""
        song = self._any_clips(1, self._num_frames)
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

        def sample(num_clips: int, num_frames: int, is_teacher: bool) -> None:
            ids = torch.arange(num_clips, device=self.accelerator.device)
            texts = song.condition.select([0] * num_clips)
            self._sample(texts, ids, 0, is_teacher, num_frames=num_frames)

        def update(num_clips: int) -> None:
            codes, condition = song.codes.repeat(num_clips, 1, 1), song.condition.select([0] * num_clips)
            clips = Clips(codes, self._sampling_rate, condition=condition)
            with self.accelerator.autocast():
                teacher = self._teacher(codes, condition)
                terms, _ = student_terms(
                    unwrap(self.model),
                    clips,
                    self._loss_settings,
                    teacher,
                    divergence_weight=1 / codes.numel(),
                )
            torch.autograd.grad(terms.loss, parameters, allow_unused=True)

        return step_seconds(
            self.args, self.accelerator.device, self._num_frames, self._num_codebooks, sample, update
        )

    def _calibrate_guards(self) -> None:
        """Limits that depend on how the base and the teacher play."""
        guards, group = self.args.guards, self.num_generations
        if not guards.calibrated:
            return
        rows = itertools.islice(self.train_dataset, CALIBRATION_PROMPTS)
        rows = [row for row in rows for _ in range(group)]
        prompts = [row["prompt"] for row in rows]
        condition = encode_text(unwrap(self.model), self._tokenizer, prompts)
        ids = torch.arange(len(prompts), device=condition.hidden_states.device)
        if guards.distance_quantile is not None:  # of the unguided base
            codes = self._sample(condition, ids, self.args.seed, True, guidance_scale=1.0)
            for function in filter(is_pairwise, self.reward_funcs):
                self._cross_guards.measure_distances(function, self._embed(function.embedder, codes), group)
        if guards.gate is not None:  # of the guided teacher
            codes = self._sample(condition, ids, self.args.seed, True)
            clips = Clips(codes, self._sampling_rate, prompts=prompts, columns=setup.columns(rows))
            clips.waveforms = decode_codes(unwrap(self.model), codes)
            self._cross_guards.measure_gate(prompts, setup.reward_context(clips, group))

    # ---- prompts -----------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if not isinstance(sampler, RepeatSampler):
            return sampler
        return disguises.EpochSampler(sampler, lambda: int(self.state.epoch or 0))

    def _generate_and_score_completions(self, inputs):
        """One rollout: prompts → clips → rewards → advantages, in the form of TRL's batch.

        TRL calls `_generate`, `_get_per_token_logps_and_entropies` and `_calculate_rewards`, in this order.
        """
        started = time.perf_counter()
        clips = self._clips = self._roll_out(inputs)
        # TRL takes some columns for its own, such as pictures: it sees none.
        with disguises.without_tokenizer(self, disguises.NoText()):
            batch = super()._generate_and_score_completions([{"prompt": row["prompt"]} for row in inputs])
        self._clips = None
        if self.model.training:
            self._weigh(clips)
            self._generation_seconds = time.perf_counter() - started
        else:  # which has no gradient to follow, but a value to report
            clips.advantages = torch.zeros(clips.codes.shape, device=clips.codes.device)
            batch["earned"] = self._advantages.earned(self._own_rows(clips.rewards, len(clips)))
            self._log_means(self._reward_metrics(clips))
        if self.log_completions:
            self._log_advantages(clips.advantages)
        disguises.into_batch(clips, batch)
        return batch

    # ---- clips -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _roll_out(self, rows: list[dict[str, Any]]) -> Clips:
        """Sample one clip per row of the dataset; the rows of a prompt are adjacent."""
        started = time.perf_counter()
        prompts = [row["prompt"] for row in rows]
        condition = encode_text(unwrap(self.model), self._tokenizer, prompts)
        index = torch.arange(len(prompts), device=condition.hidden_states.device)
        sample_ids = index + self._first_row(len(prompts))
        from_teacher, who = torch.zeros_like(index, dtype=torch.bool), (False,)
        if self.model.training:
            from_teacher, who = self._teacher_rows(len(prompts)), samplers(self.args)
        seed = self._noise_seed()
        codes = index.new_empty(len(prompts), self._num_codebooks, self._num_frames)
        for is_teacher in who:
            chosen = index[from_teacher == is_teacher]
            names = [f"the clip of prompt {prompts[row]!r}" for row in chosen.tolist()]
            codes[chosen] = self._sample(
                condition.select(chosen), sample_ids[chosen], seed, is_teacher, names=names
            )
        self._log_time("rollout", started)
        return Clips(
            codes,
            self._sampling_rate,
            prompts=prompts,
            columns=setup.columns(rows),
            condition=condition,
            from_teacher=from_teacher,
            seed=seed,
        )

    def _generate(self, prompts: list[str]):
        return disguises.as_completions(self._clips, self._first_row(len(prompts)))

    def _sample(
        self,
        condition: TextCondition,
        sample_ids: Tensor,
        seed: int,
        is_teacher: bool,
        guidance_scale: float | None = None,
        names: list[str] | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """Codes [N, K, T] from the student without guidance, or from the teacher with its own.

        Every process calls it for the same samplers in the same order, also with N = 0 clips: what FSDP has
        spread over the processes is gathered by all of them at once.
        """
        args, num_frames = self.args, num_frames or self._num_frames
        weights = self._rollout_weights(is_teacher)
        if not len(condition):
            return sample_ids.new_empty(0, self._num_codebooks, num_frames)
        if guidance_scale is None:
            guidance_scale = args.guidance_scale if is_teacher else 1.0
        avoids = guidance_scale > 1 and self._teacher.negative is not None
        # Stock `generate` computes in the dtype of a snapshot; a snapshot has its own.
        dtype = self._rollout_dtype if weights is None else None
        cast = torch.autocast(sample_ids.device.type, dtype, enabled=dtype is not None)
        with self._sampler(is_teacher) as policy, cast:
            return sample_codes(
                policy,
                condition,
                num_frames,
                guidance_scale=guidance_scale,
                temperature=args.temperature,
                seed=seed,
                sample_ids=sample_ids.tolist(),
                negative_condition=self._teacher.unconditional(condition) if avoids else None,
                batch_size=args.rollout_batch_size,
                rollout_backend=args.rollout_backend,
                names=names,
                weights=weights,
            ).codes

    def _sampler(self, is_teacher: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """The plain model that plays the clips."""
        return self._teacher.policy() if is_teacher else contextlib.nullcontext(unwrap(self.model))

    def _rollout_weights(self, is_teacher: bool) -> RolloutWeights | None:
        """The fused copy to sample from, kept for its CUDA graphs; None if stock `generate` samples.

        The teacher's never changes. Which weights are read does not depend on the process: see `_sample`.
        """
        if self.args.rollout_backend == "transformers":
            return None
        weights = self._fused_weights.get(is_teacher)
        if weights is not None and is_teacher:
            return weights
        with self._sampler(is_teacher) as policy, whole_weights(self.model_wrapped):
            if weights is None:
                weights = RolloutWeights.from_model(policy, self._rollout_dtype)
                self._fused_weights[is_teacher] = weights
            else:
                weights.refresh(policy)
        return weights

    @property
    def _rollout_dtype(self) -> torch.dtype | None:
        """Of the matrices that a rollout multiplies with; None for the model's own."""
        return torch.bfloat16 if self.args.bf16 else None

    def _teacher_rows(self, num_rows: int) -> Tensor:
        """Rows that the teacher plays: whole prompts, evenly spread, for any number of processes."""
        share, local = sampler_share(self.args, True), num_rows // self.num_generations
        first = self._generation_index() * self.accelerator.num_processes * local + self._first_row(local)
        prompt = torch.arange(first, first + local, dtype=torch.float64)
        chosen = ((prompt + 1) * share).floor() > (prompt * share).floor()
        return chosen.repeat_interleave(self.num_generations).to(self.accelerator.device)

    def _first_row(self, num_rows: int) -> int:
        """Number of this process's first row among those of all processes."""
        return int(self.accelerator.process_index) * num_rows

    def _generation_index(self) -> int:
        return self._step // self._block_length

    @property
    def _block_length(self) -> int:
        """Micro-batches from one rollout to the next."""
        return (self.args.steps_per_generation or 1) * self.num_iterations

    @property
    def _on_policy(self) -> bool:
        """Every clip is trained on before the policy that sampled it changes."""
        return self.args.gradient_accumulation_steps % self._block_length == 0

    def _noise_seed(self) -> int:
        """Seed of this rollout: with a clip's global index it fixes the clip, whatever the batch or process count.

        Every evaluation hears the same noise, so that its curves differ by the policy alone.
        """
        stream = f"train/{self._generation_index()}"
        if not self.model.training:
            stream = f"eval/{self._evaluation_batch}"
            self._evaluation_batch += 1
        digest = hashlib.blake2b(f"{self.args.seed}/{stream}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **_
    ):
        """Old log-probs, where they can differ from the new ones; TRL asks for them after every rollout."""
        if self._on_policy or not self.model.training:
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        clips = self._clips
        logps = []
        for rows in torch.arange(len(clips), device=clips.codes.device).split(batch_size or len(clips)):
            part = Clips(clips.codes[rows], clips.sampling_rate, condition=clips.condition.select(rows))
            with self.accelerator.autocast():
                terms, _ = student_terms(unwrap(model), part, self._loss_settings)
            logps.append(terms.logps)
        clips.old_logps = torch.cat(logps)
        return clips.old_logps.flatten(1), None, None

    # ---- rewards -----------------------------------------------------------------------------------------

    @property
    def _group_size(self) -> int:
        return self.num_generations if self.model.training else self.num_generations_eval

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Hand the reward functions audio, group size and sampling rate; gathered rewards [N, F]."""
        started, clips = time.perf_counter(), self._clips
        clips.waveforms = decode_codes(unwrap(self.model), clips.codes) if self._listens() else None
        if not self.model.training:
            self._watch(clips)
        if not self.reward_funcs:  # TRL wants a column
            everyones = torch.zeros(len(prompts) * self.accelerator.num_processes, 1)
            clips.rewards = everyones[:, :0]
            return everyones.to(self.accelerator.device)
        context = setup.reward_context(clips, self._group_size)
        heard = list(clips.codes if clips.waveforms is None else clips.waveforms)
        reward_funcs = self.reward_funcs
        self.reward_funcs = [
            checked(function, name, prompts, context)
            for function, name in zip(reward_funcs, self.reward_func_names, strict=True)
        ]
        try:
            rewards = super()._calculate_rewards(inputs, prompts, heard, completion_ids_list)
        finally:
            self.reward_funcs = reward_funcs
        local = self._own_rows(rewards, len(prompts))
        if self._cross_guards.weights(local) is not None:
            rewards = self.accelerator.gather(self._cross_guards.apply(local, self._advantages.pairwise))
        clips.rewards = rewards
        self._log_time("reward", started)
        return rewards

    def _own_rows(self, gathered: Tensor, num_rows: int) -> Tensor:
        first = self._first_row(num_rows)
        return gathered[first : first + num_rows]

    def _listens(self) -> bool:
        """Whether anything wants audio: decoding costs time."""
        listens = any(reads_waveforms(reward_func) for reward_func in self.reward_funcs)
        if not self.model.training:
            listens = listens or getattr(self._monitor, "reads", None) == "waveforms"
            listens = listens or len(self._evaluation_clips) < self.args.audio_samples
        return listens

    def _embed(self, embedder: Embedder, codes: Tensor) -> Tensor:
        """Embeddings of clips, or of beginnings of clips.

        Cut codes are decoded anew: a decoded clip that is cut has heard what comes later.
        """
        inputs = codes if embedder.reads == "codes" else decode_codes(unwrap(self.model), codes)
        return embed_clips(embedder, inputs, self._sampling_rate)

    # ---- advantages --------------------------------------------------------------------------------------

    def _weigh(self, clips: Clips) -> None:
        """Give the clips of a training rollout their advantages, coefficients applied."""
        embedder = next((f.embedder for f in self.reward_funcs if is_pairwise(f)), None)
        clips.advantages, metrics = self._advantages(
            self._own_rows(clips.rewards, len(clips)),
            clips.codes,
            self.num_generations,
            clips.from_teacher,
            functools.partial(self._embed, embedder),
        )
        self._log_means(self._reward_metrics(clips) | metrics)

    def _reward_metrics(self, clips: Clips) -> dict[str, float]:
        everyones = self.accelerator.gather(clips.from_teacher)
        return self._advantages.reward_metrics(clips.rewards, self._group_size, everyones)

    def _log_advantages(self, advantages: Tensor) -> None:
        """Each clip's mean advantage [N, K, T] in the table of completions, in the place of TRL's own."""
        means = self.accelerator.gather(advantages.mean(dim=(1, 2))).tolist()
        disguises.show_advantages(self._logs, means)

    # ---- loss --------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        training, args = self.model.training, self.args
        clips = disguises.from_batch(
            inputs, self._num_codebooks, self._sampling_rate, self._advantages.wanted
        )
        started = time.perf_counter()
        with self.accelerator.autocast():
            teacher = self._teacher(clips.codes, clips.condition)
        after_teacher = time.perf_counter()
        terms, losses = model(
            run=functools.partial(
                student_terms,
                clips=clips,
                settings=self._loss_settings,
                teacher=teacher,
                divergence_weight=args.distillation_coef / clips.codes.numel(),
                score_coef=args.distillation_coef if args.sequence_score and training else 0.0,
                probe=training and self._probe_now() and clips.advantages is not None,
            )
        )
        metrics = loss_metrics(clips, terms)
        if losses is not None:
            metrics |= term_gradient_norms(self.model, losses)
        if training:
            metrics["time/teacher"] = after_teacher - started
            metrics["time/student"] = time.perf_counter() - after_teacher
            loss = terms.loss
        else:
            # The objective, whose gradient is the training loss's: best models are chosen by it.
            loss = metrics["loss"] = terms.loss - inputs["earned"].mean() / clips.codes[0].numel()
        self._log_means(metrics)
        return loss

    def _probe_now(self) -> bool:
        every = self.args.term_norm_steps
        first = self._step % self.args.gradient_accumulation_steps == 0
        return every > 0 and first and self.state.global_step % every == 0

    # ---- log ---------------------------------------------------------------------------------------------

    def _log_means(self, values: dict[str, Any]) -> None:
        """Average metrics over the processes, in one message."""
        if not values:
            return
        device = self.accelerator.device
        packed = torch.stack([torch.as_tensor(v, device=device).detach().float() for v in values.values()])
        packed = self.accelerator.reduce(packed, reduction="mean")
        for name, value in zip(values, packed.tolist(), strict=True):
            self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _log_time(self, name: str, started: float) -> None:
        """Seconds since `started`, of this process; on a GPU, kernels still queued count for a later part."""
        mode = "train" if self.model.training else "eval"
        self._metrics[mode][f"time/{name}"].append(time.perf_counter() - started)

    # ---- evaluation --------------------------------------------------------------------------------------

    def evaluate(self, *args, **kwargs):
        """As `Trainer.evaluate`, with the averaged weights if any, and the same noise every time."""
        self._frozen.check(_LEFT_ALONE)
        self._evaluation_batch = 0
        self._evaluation_clips = []
        # A data loader draws a seed: the training run must not notice that it was looked at.
        with torch.random.fork_rng(devices=[]), self._memory.averaged():
            return super().evaluate(*args, **kwargs)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        disguises.name_metrics(output.metrics, self._metrics["eval"], metric_key_prefix)
        return output

    def _watch(self, clips: Clips) -> None:
        """At an evaluation: distance under the second encoder, and a few clips to listen to."""
        group = self.num_generations_eval
        self._metrics["eval"]["clips"].append(float(self.accelerator.num_processes * len(clips)))
        if self._monitor is not None and group > 1:
            inputs = clips.codes if self._monitor.reads == "codes" else clips.waveforms
            embeddings = embed_clips(self._monitor, inputs, clips.sampling_rate)
            rewards = diversity_reward(embeddings.unflatten(0, (-1, group)))
            self._log_means({"reward/monitor_diversity": rewards.mean()})
        if clips.waveforms is not None:
            wanted = self.args.audio_samples - len(self._evaluation_clips)
            for row in list(range(0, len(clips), group))[: max(wanted, 0)]:
                clip = EvaluationClip(clips.prompts[row], clips.waveforms[row].cpu(), clips.sampling_rate)
                self._evaluation_clips.append(clip)

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
        best = super()._determine_best_metric(metrics, trial)
        self.control.should_save |= best and self.args.load_best_model_at_end
        return best

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._beside is None:  # else it has not taken its place
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Called for every checkpoint that can be resumed from, on every process.
        super()._save_optimizer_and_scheduler(output_dir)
        buffer = self._buffered_inputs if self._step % self._block_length else None
        rank = self.accelerator.process_index
        self._memory.save(output_dir, self._step, buffer, rank, self.args.should_save)

    def _load_state(self, folder: str) -> None:
        self._step = self._memory.load(folder)
        checkpoints.find_best(self.state, folder, self.args.load_best_model_at_end)
        rank, device = self.accelerator.process_index, self.accelerator.device
        self._buffered_inputs = checkpoints.load_buffer(folder, rank, device)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        with continuing_from(resume_from_checkpoint):
            checkpoints.check_adapter_weights(self.model, resume_from_checkpoint)
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with continuing_from(str(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with continuing_from(str(checkpoint)):
            super()._load_rng_state(checkpoint)

    def _issue_warnings_after_load(self, load_result) -> None:
        checkpoints.check_loaded(self.model, load_result)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._memory.average is not None:  # by it the best checkpoint was chosen
            self._memory.average.load(str(self.state.best_model_checkpoint))

    # ---- what is saved in the end ------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the student: the averaged weights, if any; checkpoints hold the raw ones beside them."""
        self._frozen.check(_LEFT_ALONE)
        with contextlib.nullcontext() if _internal_call else self._memory.averaged():
            self._check_finite(computes=True, resumable=self._beside is not None)
            super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with filling(output_dir) as folder:
            own = folder / "own" if self._start else folder
            with disguises.without_tokenizer(self), warnings.catch_warnings():
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

    def _saved_bytes(self) -> int:
        """Size of the student as it is saved: all weights, or those of an adapter."""
        adapter = isinstance(self.model, PeftModel)
        weights = [p for p in self.model.parameters() if p.requires_grad or not adapter]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def _provenance(self) -> Provenance:
        return checkpoints.student_provenance(
            self.args,
            self._base_model,
            self._start,
            named=public_name if self._pushing else str,
            sampling=self._sampling,
            steps=self.state.global_step,
            clip_seconds=self._num_frames / frame_rate(unwrap(self.model)),
        )

    def push_to_hub(self, *args, blocking: bool = True, **kwargs):
        """As `Trainer.push_to_hub`: the averaged weights, if any, and no folders of this machine in what is
        sent."""
        self._pushing = True
        try:
            with self._memory.averaged():
                return super().push_to_hub(*args, blocking=blocking, **kwargs)
        finally:
            self._pushing = False
            if blocking and self.args.should_save:  # else the upload is still reading it
                write_provenance(self.args.output_dir, self._provenance())

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

    def __init__(self, trainer: CFGDiversityTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin()

    def on_train_end(self, args, state, control, **kwargs):
        self.trainer._settle()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._check_finite()
        if self.trainer._memory.average is not None:
            self.trainer._memory.average.update()
