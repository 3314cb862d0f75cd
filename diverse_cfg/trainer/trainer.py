"""`CFGDiversityTrainer`: prompts → rollout → teacher → distillation loss + diversity reward → update.

TRL's `RLOOTrainer` brings prompt groups, reward functions, accumulation, distribution, checkpoints and
logging. It knows one stream of text tokens, so a clip's codes [K, T] travel through it flattened *time-major*
to T·K "completion ids"; TRL only pads, shuffles, splits and counts that stream and hands it back to the few
methods below, which fold it again. Only real codes are stored: no end token, no padding, no delay pattern.

Left out on purpose: a sequence-level importance ratio (meaningless over thousands of codes: ratios are per
code), a reference model (the teacher is the anchor), and the second forward pass for old log-probs where they
equal the new ones.
"""

import contextlib
import functools
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import PeftConfig, PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback, set_seed
from trl import RLOOTrainer

from diverse_cfg.atomic import alone, require_space
from diverse_cfg.callbacks import AudioSamplesCallback, EvaluationClip, RewardHackingAlarm, peak_memory_gb
from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.embeddings import load_embedder
from diverse_cfg.policies.audiocraft import from_audiocraft, is_live_audiocraft
from diverse_cfg.policies.musicgen.model import delays, encode_text, unwrap
from diverse_cfg.policies.sampler.rollout import RolloutWeights
from diverse_cfg.rewards import checked, is_pairwise
from diverse_cfg.trainer import data, setup, start
from diverse_cfg.trainer.advantages import Advantages, PrefixBaseline
from diverse_cfg.trainer.checkpointing import Checkpointing
from diverse_cfg.trainer.continuing import AdapterStart, is_adapter
from diverse_cfg.trainer.estimate import Sampling, seconds
from diverse_cfg.trainer.guarding import CrossGuards
from diverse_cfg.trainer.objective import (
    LossSettings,
    route_forward,
    student_terms,
    term_gradient_norms,
)
from diverse_cfg.trainer.rollouts import Rollouts
from diverse_cfg.trainer.sharding import check_sharding
from diverse_cfg.trainer.teacher import FrozenWeights, Teacher, separate_teacher
from diverse_cfg.types import Clips, TextCondition

# How many times its first divergence a run that continues a student may reach before an alarm rings. On the
# nano base that is halfway back to the unguided base.
_KL_LIMIT = 4.0


class CFGDiversityTrainer(Rollouts, Checkpointing, RLOOTrainer):
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
            LoRA student, what is saved is one adapter of its base that holds both (see `continuing`).

    Raises:
        ValueError: whatever cannot work is refused here, before the first step, naming the option and the
            remedy.
    """

    _tag_names: ClassVar[list[str]] = ["diverse-cfg", "trl", "musicgen", "arxiv:2410.06084"]
    _name = "Diversity-Rewarded CFG Distillation"

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
        self._base_model = start.base_model_name(model)
        if args is None:
            args = CFGDiversityConfig(output_dir=f"{Path(self._base_model or 'musicgen').name}-diverse-cfg")
        if not isinstance(args, CFGDiversityConfig):
            raise ValueError(f"args is a {type(args).__name__}; pass a CFGDiversityConfig")
        peft_config = start.lora_config(peft_config)
        continues = peft_config is not None and is_adapter(model)
        self._start = AdapterStart(model, peft_config) if continues else None
        base = self._start.base_model if self._start else self._base_model
        start.check_pushing(args, peft_config, base)
        start.check_teacher(model, args)
        policy = start.prepare_policy(model, args, lora=peft_config is not None)
        self._num_frames = setup.clip_frames(policy, args.clip_seconds)
        setup.check_codebooks(policy, args.diversity_codebooks)
        self._num_codebooks = policy.config.decoder.num_codebooks
        args.max_completion_length = self._num_frames * self._num_codebooks
        self._processor = start.processor_of(processing_class, policy, self._base_model)
        tokenizer = getattr(self._processor, "tokenizer", self._processor)
        given = reward_funcs is not None
        reward_funcs = setup.check_reward_funcs(reward_funcs, args, self._base_model)
        setup.check_run(args, reward_funcs, given, eval_dataset)
        setup.check_embedders(reward_funcs, policy)
        self._has_own_teacher = start.has_own_teacher(model, args)
        own_teacher = args.teacher_model if self._has_own_teacher else None
        frozen = separate_teacher(policy, own_teacher, peft_config is not None)
        # With LoRA, the student's own weights too: its adapter is saved for them.
        lora = [policy] if peft_config is not None else []
        self._frozen = FrozenWeights(*lora, *([] if frozen is None else [frozen]))
        # To compare when the run is resumed; where an adapter was merged, the last bits differ by machine.
        read = [args.teacher_model or model, *([model] if lora else [])]
        merged = any(isinstance(source, nn.Module) or is_adapter(source) for source in read)
        self._frozen_total = None if merged else self._frozen.total()

        self.args = args  # seams that TRL calls while it is built read it
        set_seed(args.seed)  # new adapters start at random, and not every TRL seeds them
        super().__init__(
            model=policy,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=data.train_prompts(train_dataset, tokenizer, args, reward_funcs),
            eval_dataset=data.prompt_dataset(eval_dataset, tokenizer, "eval_dataset", reward_funcs),
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        policy.__dict__.pop("forward", None)  # TRL's fused LM head, which reads a single head
        route_forward(policy)
        start.check_trained(policy)
        self._frozen.check("peft_config rewrites them; use a plain LoraConfig (init_lora_weights=True)")
        if self._start is not None:
            self._start.attach(self.model)
        self._sampling = {"temperature": args.temperature, "top_k": 0, "num_frames": self._num_frames}
        start.restore_token_ids(policy, self._sampling)
        self._teacher = self._guided_teacher(frozen, tokenizer)
        self._prepare_run(policy)

    # ---- construction
    # -----------------------------------------------------------------------------------------

    def _guided_teacher(self, frozen, tokenizer) -> Teacher:
        if frozen is not None:
            frozen.decoder.to(self.accelerator.device)
            if hasattr(frozen, "enc_to_dec_proj"):
                frozen.enc_to_dec_proj.to(self.accelerator.device)
        negative = None
        if self.args.negative_prompt is not None:
            negative = encode_text(unwrap(self.model), tokenizer, [self.args.negative_prompt])
        return Teacher(frozen if frozen is not None else self.model, self.args.guidance_scale, negative)

    def _prepare_run(self, policy) -> None:
        args = self.args
        check_sharding(self.accelerator, args)
        pattern = delays(policy)
        self._loss_settings = LossSettings(
            divergence=args.divergence,
            alpha=args.jsd_alpha,
            temperature=args.temperature,
            epsilon=args.epsilon,
            epsilon_high=args.epsilon_high,
            delays=pattern,
            chunk_size=args.loss_chunk_size,
        )
        prefix = None
        if args.prefix_baseline and args.diversity_coef > 0:
            prefix = PrefixBaseline(self._num_frames, args.prefix_lambda, pattern, self.accelerator.reduce)
        self._cross_guards = CrossGuards(args.guards, self.reward_func_names, self.reward_funcs)
        self._advantages = Advantages(args, self.reward_funcs, self.reward_weights, pattern, prefix)
        self._fused_weights: dict[bool, RolloutWeights] = {}
        self._clips: Clips | None = None
        self._evaluation_batch = 0
        self._generation_seconds = 0.0
        self._prepare_callbacks()

    def _prepare_callbacks(self) -> None:
        args = self.args
        listens = args.monitor_embedder is not None and self.eval_dataset is not None
        self._monitor = load_embedder(args.monitor_embedder) if listens else None
        self._evaluation_clips: list[EvaluationClip] = []
        self._prepare_checkpointing()
        if args.audio_samples and self.eval_dataset is not None:
            self.add_callback(AudioSamplesCallback(lambda: self._evaluation_clips))
        if args.alarms and self.eval_dataset is not None:
            named = zip(self.reward_func_names, self.reward_funcs, strict=True)
            quality = [name for name, function in named if not is_pairwise(function)]
            kl_limit = _KL_LIMIT if self._has_own_teacher else 1.0
            self.add_callback(RewardHackingAlarm(quality, kl_limit=kl_limit))

    @property
    def _on_policy(self) -> bool:
        """Every clip is trained on before the policy that sampled it changes."""
        return self.args.gradient_accumulation_steps % self._block_length == 0

    def train(self, *args, **kwargs):
        """As `Trainer.train`, with its output folder to itself.

        Raises:
            ValueError: the prompts ended before the first step.
            FileExistsError: another run is writing to the folder.
            UnwritableError: the disk has no room for the student.
        """
        first = self.is_world_process_zero() and self.args.output_dir is not None
        with alone(self.args.output_dir) if first else contextlib.nullcontext() as folder:
            if folder is not None:
                require_space(folder, self._saved_bytes(), folder)
            output = super().train(*args, **kwargs)
        if self.state.global_step == 0 and self.state.max_steps > 0:
            raise ValueError(
                "no step was made: train_dataset gave no prompts when training began; a stream must start anew "
                "whenever it is read"
            )
        return output

    def _saved_bytes(self) -> int:
        """Size of the student as it is saved: all weights, or those of an adapter."""
        adapter = isinstance(self.model, PeftModel)
        weights = [p for p in self.model.parameters() if p.requires_grad or not adapter]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    # ---- rewards -----------------------------------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        """Hand the reward functions audio, group size and sampling rate; gathered rewards [N, F]."""
        started = time.perf_counter()
        clips, mode = self._clips, "train" if self.model.training else "eval"
        assert clips is not None
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        clips.waveforms = self._waveforms(clips.codes, mode)
        context = clips.columns | {
            "num_generations": num_generations,
            "sampling_rate": clips.sampling_rate,
            "codes": clips.codes,
            "waveforms": clips.waveforms,
        }
        if mode == "eval":
            self._watch(clips, num_generations)
        if not self.reward_funcs:
            everyones = torch.zeros(len(prompts) * self.accelerator.num_processes, 1)
            clips.rewards = everyones[:, :0]
            return everyones.to(self.accelerator.device)
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
        first = self.accelerator.process_index * len(prompts)
        local = rewards[first : first + len(prompts)]
        if self._cross_guards.weights(local) is not None:
            rewards = self.accelerator.gather(self._cross_guards.apply(local, self._advantages.pairwise))
        clips.rewards = rewards
        self._log_time(mode, "reward", started)
        return rewards

    def _generate_and_score_completions(self, inputs):
        """TRL's batch, plus what it has no room for: the text condition, and one advantage per code."""
        started = time.perf_counter()
        clips = self._clips = self._roll_out(inputs)
        # TRL takes some columns for its own, such as pictures: it sees none.
        with self._without_tokenizer(_NoText()):
            output = super()._generate_and_score_completions([{"prompt": row["prompt"]} for row in inputs])
        mode = "train" if self.model.training else "eval"
        assert clips.rewards is not None and clips.from_teacher is not None and clips.condition is not None
        num_generations = self.num_generations if mode == "train" else self.num_generations_eval
        everyones = self.accelerator.gather(clips.from_teacher)
        metrics = self._advantages.reward_metrics(clips.rewards, num_generations, everyones)
        clips.advantages = torch.zeros(clips.codes.shape, device=clips.codes.device)
        first = self.accelerator.process_index * len(clips)
        local = clips.rewards[first : first + len(clips)]
        if mode == "eval":  # which has no gradient to follow, but a value to report
            output["earned"] = self._advantages.earned(local)
        else:
            clips.advantages, more = self._advantages(
                local, clips.codes, num_generations, clips.from_teacher, self._embed_codes
            )
            metrics |= more
        self._log_means(mode, metrics)
        if self.log_completions:
            self._log_advantages(clips.advantages)
        output["advantages"] = clips.advantages.flatten(1)
        output["condition_hidden"] = clips.condition.hidden_states
        output["condition_mask"] = clips.condition.attention_mask
        if clips.old_logps is not None:
            output["old_per_token_logps"] = clips.old_logps.flatten(1)
        self._clips = None
        if mode == "train":
            self._generation_seconds = time.perf_counter() - started
        return output

    def _log_advantages(self, advantages: Tensor) -> None:
        """Each clip's mean advantage [N, K, T] in the table of completions, in the place of TRL's own."""
        means = self.accelerator.gather(advantages.mean(dim=(1, 2))).tolist()
        logged = self._logs["advantages"]
        kept = list(logged)[: -len(means)]
        logged.clear()
        logged.extend(kept + means)

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **_
    ):
        """Old log-probs, where they can differ from the new ones; TRL asks for them after every rollout."""
        if self._on_policy or not self.model.training:
            return torch.zeros(len(input_ids), logits_to_keep, device=input_ids.device), None, None
        clips = self._clips
        assert clips is not None and clips.condition is not None
        logps = []
        for rows in torch.arange(len(clips), device=clips.codes.device).split(batch_size or len(clips)):
            part = Clips(clips.codes[rows], clips.sampling_rate, condition=clips.condition.select(rows))
            with self.accelerator.autocast():
                terms, _ = student_terms(unwrap(model), part, self._loss_settings)
            logps.append(terms.logps)
        clips.old_logps = torch.cat(logps)
        return clips.old_logps.flatten(1), None, None

    # ---- loss -----------------------------------------------------------------------------------------

    def _compute_loss(self, model, inputs):
        mode, args = "train" if self.model.training else "eval", self.args
        clips = self._folded(inputs)
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
                score_coef=args.distillation_coef if args.sequence_score and mode == "train" else 0.0,
                probe=mode == "train" and self._probe_now() and clips.advantages is not None,
            )
        )
        metrics = self._loss_metrics(clips, terms)
        if losses is not None:
            metrics |= term_gradient_norms(self.model, losses)
        if mode == "train":
            metrics["time/teacher"] = after_teacher - started
            metrics["time/student"] = time.perf_counter() - after_teacher
        self._log_means(mode, metrics)
        if mode == "eval":
            # The objective, whose gradient is the training loss's: best models are chosen by it.
            loss = terms.loss - inputs["earned"].mean() / clips.codes[0].numel()
            self._log_means(mode, {"loss": loss})
            return loss
        return terms.loss

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        """As transformers', with every metric under the evaluation set's own name, and a mean over all batches.

        TRL calls those of every set alike, and transformers counts a batch of several clips per prompt in part.
        """
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        assert output.metrics is not None
        for name, values in self._metrics["eval"].items():
            there = [value for value in values if not math.isnan(value)]
            if there:
                output.metrics[f"{metric_key_prefix}_{name}"] = sum(there) / len(there)
        self._metrics["eval"].clear()
        return output

    def _run_epoch(self, *args, **kwargs):
        """As transformers', which makes one step too many when it resumes from a run's last step."""
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _folded(self, inputs: dict[str, Tensor]) -> Clips:
        """The clips of TRL's micro-batch, whose codes are one stream per clip."""
        stream = inputs["completion_ids"].unflatten(1, (self._num_frames, self._num_codebooks))
        codes = stream.transpose(1, 2).contiguous()
        old_logps = inputs.get("old_per_token_logps")
        return Clips(
            codes,
            unwrap(self.model).config.audio_encoder.sampling_rate,
            condition=TextCondition(inputs["condition_hidden"], inputs["condition_mask"]),
            advantages=inputs["advantages"].view_as(codes) if self._advantages.wanted else None,
            old_logps=None if old_logps is None else old_logps.view_as(codes),
        )

    def _measure(self) -> tuple[float, float]:
        """Seconds that one optimiser step spends on its rollout and on its updates, from a few clips."""
        args, device, model = self.args, self.accelerator.device, self.model
        clips = args.per_device_train_batch_size * args.gradient_accumulation_steps
        # A GPU takes a whole micro-batch in the time of a few clips; a CPU takes them one after the other.
        rows = min(args.per_device_train_batch_size, 4 if device.type == "cpu" else clips)
        codes = torch.zeros(rows, self._num_codebooks, self._num_frames, dtype=torch.long, device=device)
        condition = encode_text(unwrap(model), self._tokenizer, ["a song"] * rows)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

        def update() -> None:
            with self.accelerator.autocast():
                terms, _ = student_terms(
                    unwrap(model),
                    Clips(codes, 1, condition=condition),
                    self._loss_settings,
                    self._teacher(codes, condition),
                    divergence_weight=1 / codes.numel(),
                )
            torch.autograd.grad(terms.loss, parameters, allow_unused=True)

        frames = min(self._num_frames, 8)

        def rollout(sampling: Sampling) -> float:
            sampled = min(args.rollout_batch_size or clips, clips, sampling.clips)
            texts = encode_text(unwrap(model), self._tokenizer, ["a song"] * sampled)
            ids = torch.arange(sampled, device=device)
            spent = seconds(
                lambda: self._sample(texts, ids, 0, sampling.is_teacher, num_frames=frames), device
            )
            share = self._teacher_share if sampling.is_teacher else 1 - self._teacher_share
            return spent / sampled * share

        steps = (self._num_frames + self._num_codebooks) / (frames + self._num_codebooks)
        per_clip = sum(map(rollout, self._training_samplings())) * steps
        return per_clip * clips / self.num_iterations, seconds(update, device) * clips / rows

    def _probe_now(self) -> bool:
        every = self.args.term_norm_steps
        first = self._step % self.args.gradient_accumulation_steps == 0
        return every > 0 and first and self.state.global_step % every == 0

    def _loss_metrics(self, clips: Clips, terms) -> dict[str, Tensor]:
        """Means over the micro-batch; all in nats per code unless the name says clip."""
        per_codebook = terms.divergences.mean(dim=(0, 2))
        entropies = terms.entropies.mean(dim=(0, 2))
        distillation = per_codebook.mean()
        metrics = {
            "loss/distillation": distillation,
            "kl/clip": distillation * clips.codes[0].numel(),
            "entropy": entropies.mean(),
        }
        metrics |= {f"kl/codebook_{k}": value for k, value in enumerate(per_codebook)}
        metrics |= {f"entropy/codebook_{k}": value for k, value in enumerate(entropies)}
        if clips.advantages is not None:
            metrics["loss/policy_gradient"] = -(clips.advantages * terms.logps).mean()
        if clips.old_logps is not None:
            ratios = (terms.logps - clips.old_logps).exp()
            metrics["ratio/mean"], metrics["ratio/max"] = ratios.mean(), ratios.max()
        return metrics

    def _log_means(self, mode: str, values: dict[str, Tensor | float]) -> None:
        """Average metrics over the processes, in one message."""
        if not values:
            return
        device = self.accelerator.device
        packed = torch.stack([torch.as_tensor(v, device=device).detach().float() for v in values.values()])
        packed = self.accelerator.reduce(packed, reduction="mean")
        for name, value in zip(values, packed.tolist(), strict=True):
            self._metrics[mode][name].append(value)

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


class _NoText:
    """In the tokenizer's place while TRL handles a rollout: older versions decode it to text."""

    def batch_decode(self, rows, **_: Any) -> list[str]:
        return [f"{len(row)} codes" for row in rows]
