"""`CFGDiversityTrainer`: prompts → clips → rewards → advantages → loss → update, in the order of this file.

TRL's `RLOOTrainer` brings prompt groups, reward functions, accumulation, distribution, checkpoints and logging.
It knows one stream of text tokens; how a clip travels through it is told in `disguises`. Between the methods of
this file travel `types.Clips`.

Left out on purpose: a sequence-level importance ratio (meaningless over thousands of codes: ratios are per
code), a reference model (the teacher is the anchor), and the second forward pass for old log-probs where they
equal the new ones.
"""

import functools
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from trl import RLOOTrainer
from trl.trainer.utils import RepeatSampler

from diverse_cfg.assets import shipped
from diverse_cfg.atomic import filling
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
from diverse_cfg.policies.policy import Policy
from diverse_cfg.policies.stored import is_adapter
from diverse_cfg.provenance import Provenance, read_provenance, write_provenance
from diverse_cfg.rewards import checked, embed_clips, is_pairwise, reads_waveforms
from diverse_cfg.trainer import checkpoints, disguises, setup
from diverse_cfg.trainer.advantages import Advantages, CrossGuards, PrefixBaseline
from diverse_cfg.trainer.checkpoints import RunMemory, continuing_from
from diverse_cfg.trainer.housekeeping import Housekeeping
from diverse_cfg.trainer.keeping import LEFT_ALONE, KeptRun
from diverse_cfg.trainer.objective import LossSettings, loss_metrics, student_terms, term_gradient_norms
from diverse_cfg.trainer.teacher import (
    FrozenWeights,
    Sampler,
    Teacher,
    check_teacher,
    has_own_teacher,
    sampler_share,
    separate_teacher,
    who_samples,
)
from diverse_cfg.types import Clips

# How many times its first divergence a run that continues a student may reach before an alarm rings. On the
# nano base that is halfway back to the unguided base.
_KL_LIMIT = 4.0


class CFGDiversityTrainer(KeptRun, RLOOTrainer):
    """Diversity-rewarded CFG distillation of MusicGen (arXiv 2410.06084), with TRL's interface.

    Args:
        model: Hub id, folder, `nano` (the shipped base), or `MusicgenForConditionalGeneration`; AudioCraft's
            checkpoints and live models too, as a `MusicGen` or a pair (LMModel, compression_model). It is the
            student's start and, unless `args.teacher_model` says otherwise, the teacher θ0.
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
        model: str | os.PathLike | nn.Module | Policy,
        reward_funcs: Callable | list[Callable] | None = None,
        args: CFGDiversityConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        model, processing_class = setup.open_model(model, processing_class)
        self._base_model = setup.base_model_name(model)
        if args is None:
            args = CFGDiversityConfig(output_dir=f"{Path(self._base_model or 'musicgen').name}-diverse-cfg")
        if not isinstance(args, CFGDiversityConfig):
            raise ValueError(f"args is a {type(args).__name__}; pass a CFGDiversityConfig")
        args.teacher_model = shipped(args.teacher_model)
        lora = peft_config is not None
        peft_config = setup.lora_config(peft_config)
        adapted = not isinstance(model, nn.Module) and is_adapter(model)
        self._start = AdapterStart(model, peft_config) if lora and adapted else None
        base = self._start.base_model if self._start else self._base_model
        setup.check_pushing(args, peft_config, base)
        check_teacher(model, args)
        self._base_fingerprint = setup.base_fingerprint(base) if lora else None
        policy = self._policy = setup.prepare_policy(model, args, lora)
        setup.teach_guidance(policy, args)
        setup.give_targets(peft_config, policy)
        self._num_frames, self._num_codebooks = setup.check_clips(policy, args), len(policy.delays)
        args.max_completion_length = self._num_frames * self._num_codebooks
        policy.processor = setup.processor_of(processing_class, policy, self._base_model)
        tokenizer = policy.tokenizer
        given = reward_funcs is not None
        reward_funcs = setup.check_reward_funcs(reward_funcs, args, self._base_model)
        self._has_own_teacher = has_own_teacher(model, args)
        setup.check_run(args, reward_funcs, given, eval_dataset, self._has_own_teacher)
        setup.check_embedders(reward_funcs, policy.sampling_rate)
        frozen = separate_teacher(policy, args.teacher_model if self._has_own_teacher else None, lora)
        # With LoRA, the student's own weights too: its adapter is saved for them.
        self._frozen = FrozenWeights(*[policy] * lora, *([] if frozen is None else [frozen]))
        self._memory = RunMemory(
            self._frozen.total(args.teacher_model or model, *[model] * lora),
            initial=setup.initial_weights(model, policy),
        )

        self.args = args  # seams that TRL calls while it is built read it
        set_seed(args.seed)  # new adapters start at random, and not every TRL seeds them
        super().__init__(
            model=policy.model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=setup.train_prompts(train_dataset, tokenizer, args, reward_funcs),
            eval_dataset=setup.prompt_dataset(eval_dataset, tokenizer, "eval_dataset", reward_funcs),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        disguises.route_forward(policy.model)
        if policy.shift is not None:
            policy.shift.requires_grad_(True)  # PEFT trains its own alone
        setup.check_trained(policy)
        self._frozen.check("peft_config rewrites them; use a plain LoraConfig (init_lora_weights=True)")
        if self._start is not None:
            self._start.attach(self.model)
        self._settings = {"temperature": args.temperature, "top_k": 0, "num_frames": self._num_frames}
        policy.set_sampling(self._settings)
        negative = None
        if args.negative_prompt is not None:
            negative = policy.encode_text([args.negative_prompt])
        if frozen is not None:
            frozen.move_own(self.accelerator.device)
        adapted = self.model if frozen is None else None
        scale, reference = setup.guidance(args, self._num_frames), args.reference_guidance
        self._teacher = Teacher(frozen or policy, scale, negative, adapted, reference)
        setup.check_sharding(self.accelerator, args)
        self._prepare_run()

    def _prepare_run(self) -> None:
        args = self.args
        seconds = self._num_frames / self._policy.frame_rate
        kept = checkpoints.kept_settings(args, seconds, self.train_dataset)
        self._memory.keep(self.model, kept, args.world_size)
        self._loss_settings = LossSettings.of(args, self._policy.delays)
        if args.prefix_baseline and args.diversity_coef > 0:
            self._memory.prefix = PrefixBaseline(
                self._num_frames, args.prefix_lambda, self._policy.delays, self.accelerator.reduce
            )
        self._cross_guards = CrossGuards(args.guards, self.reward_func_names, self.reward_funcs)
        self._advantages = Advantages(
            args, self.reward_funcs, self.reward_weights, self._policy.delays, self._memory.prefix
        )
        self._sample = Sampler(
            args, self._num_frames, self._policy, self._teacher, lambda: self.model_wrapped
        )
        self._clips: Clips | None = None  # that TRL is handling
        self._generation_seconds = 0.0
        listens = args.monitor_embedder is not None and self.eval_dataset is not None
        self._monitor = load_embedder(args.monitor_embedder) if listens else None
        self._evaluation_batch = 0
        self._evaluation_clips: list[EvaluationClip] = []
        self._pushing = False
        self._add_callbacks()

    def _add_callbacks(self) -> None:
        args = self.args
        if args.adaptive_clip is not None:

            def clip(limit: float):
                return self.accelerator.clip_grad_norm_(self.model.parameters(), limit)

            self._memory.clip = AdaptiveClipCallback(args.adaptive_clip, clip)
            self.add_callback(self._memory.clip)
        # Before those of the trackers, which may send the model away.
        self._housekeeping = Housekeeping(self)
        self.callback_handler.callbacks.insert(0, self._housekeeping)
        if args.audio_samples and self.eval_dataset is not None:
            self.add_callback(AudioSamplesCallback(lambda: self._evaluation_clips))
        if args.alarms and self.eval_dataset is not None:
            named = zip(self.reward_func_names, self.reward_funcs, strict=True)
            quality = [name for name, function in named if not is_pairwise(function)]
            kl_limit = _KL_LIMIT if self._has_own_teacher else 1.0
            self.add_callback(RewardHackingAlarm(quality, kl_limit=kl_limit))

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
        self._weigh(clips)
        disguises.into_batch(clips, batch)
        if self.model.training:
            self._generation_seconds = time.perf_counter() - started
        else:  # it has no gradient to follow, but a value to report
            batch["earned"] = self._advantages.earned(self._own_rows(clips.rewards))
        return batch

    # ---- clips -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _roll_out(self, rows: list[dict[str, Any]]) -> Clips:
        """Sample one clip per row of the dataset; the rows of a prompt are adjacent."""
        started = time.perf_counter()
        prompts = [row["prompt"] for row in rows]
        condition = self._policy.encode_text(prompts)
        index = torch.arange(len(prompts), device=condition.hidden_states.device)
        sample_ids = index + self._first_row(len(prompts))
        from_teacher, who = torch.zeros_like(index, dtype=torch.bool), (False,)
        if self.model.training:
            from_teacher, who = self._teacher_rows(len(prompts)), who_samples(self.args)
        seed = self._noise_seed()
        if self.args.guidance_range is not None:
            first, group = self._first_row(len(prompts)), self._group_size
            drawn = setup.draw_guidance(self.args.guidance_range, seed, first, len(prompts), group)
            condition = condition.told(torch.tensor(drawn))
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
            self._policy.sampling_rate,
            prompts=prompts,
            columns=setup.columns(rows),
            condition=condition,
            from_teacher=from_teacher,
            seed=seed,
        )

    def _generate(self, prompts: list[str]):
        assert self._clips is not None
        return disguises.as_completions(self._clips, self._first_row(len(prompts)))

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
        clips, logps = self._clips, []
        assert clips is not None and clips.condition is not None
        for rows in torch.arange(len(clips), device=clips.codes.device).split(batch_size or len(clips)):
            part = Clips(clips.codes[rows], clips.sampling_rate, condition=clips.condition.select(rows))
            with self.accelerator.autocast():
                terms, _ = student_terms(self._policy, part, self._loss_settings)
            logps.append(terms.logps)
        clips.old_logps = torch.cat(logps)
        return clips.old_logps.flatten(1), None, None

    # ---- rewards -----------------------------------------------------------------------------------------

    @property
    def _group_size(self) -> int:
        size = self.num_generations if self.model.training else self.num_generations_eval
        assert size is not None  # both have defaults
        return size

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Hand the reward functions audio, group size and sampling rate; gathered rewards [N, F]."""
        started, clips = time.perf_counter(), self._clips
        assert clips is not None
        clips.waveforms = self._policy.decode(clips.codes) if self._listens() else None
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
        local = self._own_rows(rewards)
        if self._cross_guards.weights(local) is not None:
            rewards = self.accelerator.gather(self._cross_guards.apply(local, self._advantages.pairwise))
        clips.rewards = rewards
        self._log_time("reward", started)
        return rewards

    def _own_rows(self, gathered: Tensor) -> Tensor:
        """Those of this process, of all processes' rows."""
        num_rows = len(gathered) // self.accelerator.num_processes
        return gathered[self._first_row(num_rows) :][:num_rows]

    def _listens(self) -> bool:
        """Whether anything wants audio: decoding costs time."""
        listens = any(reads_waveforms(reward_func) for reward_func in self.reward_funcs)
        if not self.model.training:
            listens = listens or getattr(self._monitor, "reads", None) == "waveforms"
            listens = listens or len(self._evaluation_clips) < self.args.audio_samples
        return listens

    def _embed(self, embedder: Embedder, codes: Tensor) -> Tensor:
        """Embeddings of clips, or of their beginnings, decoded anew: a decoded clip that is cut has heard what comes
        later."""
        inputs = codes if embedder.reads == "codes" else self._policy.decode(codes)
        return embed_clips(embedder, inputs, self._policy.sampling_rate)

    # ---- advantages --------------------------------------------------------------------------------------

    def _weigh(self, clips: Clips) -> None:
        """Give the clips their advantages, coefficients applied: one per code, and 0 in an evaluation."""
        assert clips.rewards is not None and clips.from_teacher is not None
        everyones = self.accelerator.gather(clips.from_teacher)
        metrics = self._advantages.reward_metrics(clips.rewards, self._group_size, everyones)
        clips.advantages = torch.zeros(clips.codes.shape, device=clips.codes.device)
        if self.model.training:
            embedder = next((f.embedder for f in self.reward_funcs if is_pairwise(f)), None)
            embed = functools.partial(self._embed, embedder)
            rewards = self._own_rows(clips.rewards)
            clips.advantages, more = self._advantages(
                rewards, clips.codes, self._group_size, clips.from_teacher, embed
            )
            metrics |= more
        self._log_means(metrics)
        if self.log_completions:
            self._log_advantages(clips.advantages)

    def _log_advantages(self, advantages: Tensor) -> None:
        """Each clip's mean advantage [N, K, T] in the table of completions, in the place of TRL's own."""
        means = self.accelerator.gather(advantages.mean(dim=(1, 2))).tolist()
        disguises.show_advantages(self._logs, means)

    # ---- loss --------------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        training, args = self.model.training, self.args
        clips = disguises.from_batch(
            inputs, self._num_codebooks, self._policy.sampling_rate, self._advantages.wanted
        )
        started = time.perf_counter()
        with self.accelerator.autocast():
            teacher = self._teacher(clips.codes, clips.condition)
        after_teacher = time.perf_counter()
        terms, losses = model(
            run=functools.partial(
                student_terms,
                self._policy,
                clips,
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
        self._frozen.check(LEFT_ALONE)
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
        assert clips.prompts is not None
        group = self._group_size
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

    # ---- the loop, and what a checkpoint holds besides `keeping` ------------------------------------------

    def training_step(self, model, inputs, num_items_in_batch=None):
        """As TRL's, timed without the rollout that it may contain."""
        self._generation_seconds = 0.0
        started = time.perf_counter()
        loss = super().training_step(model, inputs, num_items_in_batch)
        update = time.perf_counter() - started - self._generation_seconds
        self._metrics["train"]["time/update"].append(update)
        peak = peak_memory_gb(self.accelerator.device)
        if peak is not None:
            self._metrics["train"]["memory/peak_gb"].append(peak)
        return loss

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
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._policy.shift is not None:
            with continuing_from(resume_from_checkpoint):
                self._policy.shift.load(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._policy.shift is not None:
            self._policy.shift.load(str(self.state.best_model_checkpoint))
        if self._memory.average is not None:  # by it the best checkpoint was chosen
            self._memory.average.load(str(self.state.best_model_checkpoint))

    # ---- what is saved in the end ------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        output_dir = output_dir or self.args.output_dir
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        with filling(output_dir) as folder:
            own = folder / "own" if self._start else folder
            with disguises.without_text(self):
                super()._save(str(own), state_dict)
                if self._start is not None:
                    self._start.write(own, folder)
                    shutil.rmtree(own)
            if self._policy.shift is not None:
                self._policy.shift.save(folder)
            checkpoints.complete(
                folder, self._policy.processor, self._policy.model.generation_config, self._provenance()
            )
        (Path(output_dir) / checkpoints.PICKLE).unlink(missing_ok=True)  # transformers writes it with a push
        if (Path(output_dir) / "adapter_config.json").is_file():
            write_card(output_dir)  # PEFT's does not say that other programs would guide it

    def _provenance(self) -> Provenance:
        return checkpoints.student_provenance(
            self.args,
            self._base_model,
            self._start,
            named=public_name if self._pushing else str,
            sampling=self._settings,
            steps=self.state.global_step,
            clip_seconds=self._num_frames / self._policy.frame_rate,
            base_fingerprint=self._base_fingerprint,
        )

    def push_to_hub(self, *args, blocking: bool = True, **kwargs):
        """As `Trainer.push_to_hub`: the averaged weights, if any, and no folders of this machine in what is sent."""
        self._pushing = True
        try:
            with self._memory.averaged():
                return super().push_to_hub(*args, blocking=blocking, **kwargs)
        finally:
            self._pushing = False
            if blocking and self.args.should_save:  # else the upload is still reading it
                write_provenance(self.args.output_dir, self._provenance())

    def create_model_card(self, model_name=None, dataset_name=None, tags=None) -> None:
        """README.md of the student: the card that `merge` and `publish` write too (TRL's says text generation)."""
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
