"""Clips for the trainer: sampled, decoded where something listens, embedded, and measured before training.

A clip's noise is keyed by the run's seed, the rollout's number and the clip's place in it, so that a clip
depends neither on the batch nor on the number of processes.
"""

import contextlib
import hashlib
import math
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl import RLOOTrainer

from diverse_cfg.callbacks import EvaluationClip
from diverse_cfg.embeddings import Embedder
from diverse_cfg.functional.diversity import diversity_reward
from diverse_cfg.policies.musicgen.model import encode_text, unwrap
from diverse_cfg.policies.sampler.rollout import RolloutWeights, decode_codes, sample_codes
from diverse_cfg.rewards import embed_clips, is_pairwise, reads_waveforms
from diverse_cfg.trainer.data import columns
from diverse_cfg.trainer.estimate import Sampling
from diverse_cfg.trainer.guarding import CALIBRATION_PROMPTS, CrossGuards
from diverse_cfg.trainer.sharding import whole_weights
from diverse_cfg.trainer.teacher import Teacher
from diverse_cfg.types import Clips, TextCondition

if TYPE_CHECKING:
    from diverse_cfg.config import CFGDiversityConfig


class Rollouts(RLOOTrainer):
    """Base of the trainer: everything that makes clips or listens to them."""

    args: "CFGDiversityConfig"
    _num_frames: int
    _num_codebooks: int
    _teacher: Teacher
    _cross_guards: CrossGuards
    _monitor: Embedder | None
    _evaluation_clips: list[EvaluationClip]
    _evaluation_batch: int
    _clips: Clips | None
    _fused_weights: dict[bool, RolloutWeights]

    @torch.no_grad()
    def _roll_out(self, rows_of_dataset: list[dict[str, Any]]) -> Clips:
        """Sample one clip per row of the dataset; the rows of a prompt are adjacent."""
        started = time.perf_counter()
        prompts = [row["prompt"] for row in rows_of_dataset]
        training = self.model.training
        condition = encode_text(unwrap(self.model), self._tokenizer, prompts)
        rows = torch.arange(len(prompts), device=condition.hidden_states.device)
        first = int(self.accelerator.process_index) * len(prompts)
        sample_ids = rows + first
        from_teacher = (
            self._teacher_rows(len(prompts)) if training else torch.zeros_like(rows, dtype=torch.bool)
        )
        seed = self._noise_seed(training)

        codes = torch.empty(
            len(prompts), self._num_codebooks, self._num_frames, dtype=torch.long, device=rows.device
        )
        for is_teacher in self._samplers if training else (False,):
            chosen = rows[from_teacher == is_teacher]
            names = [f"the clip of prompt {prompts[row]!r}" for row in chosen.tolist()]
            codes[chosen] = self._sample(
                condition.select(chosen), sample_ids[chosen], seed, is_teacher, names=names
            )
        mode = "train" if training else "eval"
        self._log_time(mode, "rollout", started)
        return Clips(
            codes,
            unwrap(self.model).config.audio_encoder.sampling_rate,
            prompts=prompts,
            columns=columns(rows_of_dataset),
            condition=condition,
            from_teacher=from_teacher,
            seed=seed,
        )

    def _generate(self, prompts: list[str]):
        """The clips in TRL's form: prompt ids that nobody reads (the condition travels apart), codes, labels."""
        clips, first = self._clips, int(self.accelerator.process_index) * len(prompts)
        assert clips is not None
        labels = [f"clip {first + row}, seed {clips.seed}" for row in range(len(clips))]
        return [[0]] * len(clips), clips.codes.transpose(1, 2).flatten(1).tolist(), labels

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
        negative = (
            self._teacher.unconditional(condition) if guidance_scale > 1 and self._teacher.negative else None
        )
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
                negative_condition=negative,
                batch_size=args.rollout_batch_size,
                rollout_backend=args.rollout_backend,
                names=names,
                weights=weights,
            ).codes

    def _sampler(self, is_teacher: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """The plain MusicGen that plays the clips."""
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

    def _training_samplings(self) -> list[Sampling]:
        """What one training rollout of this process samples from each sampler, at most."""
        args, group = self.args, self.num_generations
        prompts = args.per_device_train_batch_size * (args.steps_per_generation or 1) // group
        # The teacher plays its share of a rollout's prompts, rounded down or up.
        share = {False: 1 - self._teacher_share, True: self._teacher_share}
        return [
            Sampling(
                is_teacher,
                math.ceil(prompts * share[is_teacher]) * group,
                guided=is_teacher and args.guidance_scale != 1,
            )
            for is_teacher in self._samplers
        ]

    def _samplings(self) -> list[Sampling]:
        """Every kind of rollout that this process makes in the run: training, evaluation, calibration."""
        args, found = self.args, self._training_samplings()
        if self.eval_dataset is not None:
            found.append(Sampling(False, args.per_device_eval_batch_size))
        if args.guards.calibrated:
            guided = args.guards.gate is not None and args.guidance_scale != 1
            found.append(Sampling(True, CALIBRATION_PROMPTS * self.num_generations, guided))
        return found

    @property
    def _teacher_share(self) -> float:
        """Share of the training prompts that the teacher plays."""
        return {"student": 0.0, "teacher": 1.0, "mix": self.args.teacher_fraction}[self.args.rollout_source]

    @property
    def _samplers(self) -> tuple[bool, ...]:
        """Who plays training clips, as values of `is_teacher`: those of the run, whatever this rollout's rows."""
        who = {"student": (False,), "teacher": (True,), "mix": (False, True)}
        return who[self.args.rollout_source]

    def _teacher_rows(self, num_rows: int) -> Tensor:
        """Rows that the teacher plays: whole prompts, evenly spread, for any number of processes."""
        share, device = self._teacher_share, self.accelerator.device
        local = num_rows // self.num_generations
        first = self._generation_index() * self.accelerator.num_processes * local
        first += self.accelerator.process_index * local
        prompt = torch.arange(first, first + local, dtype=torch.float64)
        chosen = ((prompt + 1) * share).floor() > (prompt * share).floor()
        return chosen.repeat_interleave(self.num_generations).to(device)

    def _generation_index(self) -> int:
        return self._step // self._block_length

    @property
    def _block_length(self) -> int:
        """Micro-batches from one rollout to the next."""
        return (self.args.steps_per_generation or 1) * self.num_iterations

    def _noise_seed(self, training: bool) -> int:
        """Seed of this rollout: with a clip's global index it fixes the clip, whatever the batch or process
        count.

        Every evaluation hears the same noise, so that its curves differ by the policy alone.
        """
        stream = f"train/{self._generation_index()}" if training else f"eval/{self._evaluation_batch}"
        self._evaluation_batch += not training
        digest = hashlib.blake2b(f"{self.args.seed}/{stream}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1

    def _waveforms(self, codes: Tensor, mode: str) -> Tensor | None:
        """Audio [N, L] or [N, 2, L] if anything listens: decoding costs time."""
        listens = any(reads_waveforms(reward_func) for reward_func in self.reward_funcs)
        if mode == "eval":
            listens = listens or getattr(self._monitor, "reads", None) == "waveforms"
            listens = listens or len(self._evaluation_clips) < self.args.audio_samples
        return decode_codes(unwrap(self.model), codes) if listens else None

    def _watch(self, clips: Clips, num_generations: int) -> None:
        """At an evaluation: distance under the second encoder, and a few clips to listen to."""
        assert clips.prompts is not None
        self._metrics["eval"]["clips"].append(float(self.accelerator.num_processes * len(clips)))
        if self._monitor is not None and num_generations > 1:
            inputs = clips.codes if self._monitor.reads == "codes" else clips.waveforms
            embeddings = embed_clips(self._monitor, inputs, clips.sampling_rate)
            rewards = diversity_reward(embeddings.unflatten(0, (-1, num_generations)))
            self._log_means("eval", {"reward/monitor_diversity": rewards.mean()})
        if clips.waveforms is not None:
            wanted = self.args.audio_samples - len(self._evaluation_clips)
            for row in list(range(0, len(clips), num_generations))[: max(wanted, 0)]:
                clip = EvaluationClip(clips.prompts[row], clips.waveforms[row].cpu(), clips.sampling_rate)
                self._evaluation_clips.append(clip)

    def _calibrate_guards(self) -> None:
        """Before the first step: limits that depend on how the base and the teacher play."""
        guards = self.args.guards
        if not guards.calibrated:
            return
        rows = zip(range(CALIBRATION_PROMPTS), self.train_dataset, strict=False)
        clips = [row for _, row in rows for _ in range(self.num_generations)]
        prompts = [row["prompt"] for row in clips]
        policy = unwrap(self.model)
        condition = encode_text(policy, self._tokenizer, prompts)
        ids = torch.arange(len(prompts), device=condition.hidden_states.device)
        rate = policy.config.audio_encoder.sampling_rate
        if guards.distance_quantile is not None:
            codes = self._sample(condition, ids, self.args.seed, True, guidance_scale=1.0)
            for function in filter(is_pairwise, self.reward_funcs):
                inputs = codes if function.embedder.reads == "codes" else decode_codes(policy, codes)
                self._cross_guards.measure_distances(function, inputs, self.num_generations, rate)
        if guards.gate is not None:
            codes = self._sample(condition, ids, self.args.seed, True)
            context = columns(clips) | {
                "num_generations": self.num_generations,
                "sampling_rate": rate,
                "codes": codes,
                "waveforms": decode_codes(policy, codes),
            }
            self._cross_guards.measure_gate(prompts, context)

    def _embed_codes(self, codes: Tensor) -> Tensor:
        """Embeddings of beginnings of clips under the diversity reward's encoder."""
        reward_func = next(function for function in self.reward_funcs if is_pairwise(function))
        policy = unwrap(self.model)
        # Cut codes are decoded anew: a decoded clip that is cut has heard what comes later.
        inputs = codes if reward_func.embedder.reads == "codes" else decode_codes(policy, codes)
        return embed_clips(reward_func.embedder, inputs, policy.config.audio_encoder.sampling_rate)

    def _log_time(self, mode: str, name: str, started: float) -> None:
        """Seconds since `started`, of this process; on a GPU, kernels still queued count for a later part."""
        self._metrics[mode][f"time/{name}"].append(time.perf_counter() - started)
