"""Who plays: the student, and the teacher, which is the frozen initial policy, guided.

With LoRA the teacher is the student itself with its adapters disabled, so no second copy exists. With full
weights it is a frozen copy of the decoder that shares the (frozen) text encoder and codec with the student.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from peft import PeftModel
from torch import Tensor, nn

from diverse_cfg.config import CFGDiversityConfig, MusicSFTConfig
from diverse_cfg.functional.distillation import GuidedTeacher
from diverse_cfg.functional.guidance import guided_logits
from diverse_cfg.policies.loading import is_distilled, load_policy
from diverse_cfg.policies.policy import Policy, as_policy, plain
from diverse_cfg.policies.sampler.weights import whole_weights
from diverse_cfg.policies.shift import SHIFT
from diverse_cfg.policies.stored import is_adapter, same_base
from diverse_cfg.types import TextCondition


def check_teacher(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig) -> None:
    """Refuse to guide a teacher that has its guidance inside.

    Raises:
        ValueError: the teacher is a student, a merge or an adapter of one, and γ > 1.
    """
    if args.reference_guidance == 1:
        return
    if args.teacher_model is not None:
        if is_distilled(args.teacher_model):
            raise ValueError(
                f"teacher_model={args.teacher_model} is distilled already, and guidance_scale="
                f"{args.reference_guidance:g} would guide it twice: name its base, or set guidance_scale to 1"
            )
        return
    if isinstance(model, nn.Module):
        name, distilled = "the model", getattr(plain(model), "is_distilled", False)
    else:
        name, distilled = os.fspath(model), is_distilled(model)
    if distilled:
        raise ValueError(
            f"{name} is distilled already, and as its own teacher would be guided twice: set teacher_model "
            "(--teacher_model) to the base that it was distilled from, or guidance_scale to 1"
        )


def has_own_teacher(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig) -> bool:
    """Whether the teacher is another model than the student's start.

    A live model may have other weights than the folder that it names.
    """
    if args.teacher_model is None:
        return False
    return isinstance(model, nn.Module) or not same_base(args.teacher_model, os.fspath(model))


def who_samples(args: CFGDiversityConfig) -> tuple[bool, ...]:
    """Who plays the training clips, as values of `is_teacher`: those of the run, whatever one rollout's rows."""
    return {"student": (False,), "teacher": (True,), "mix": (False, True)}[args.rollout_source]


def sampler_share(args: CFGDiversityConfig, is_teacher: bool) -> float:
    """Share of the training prompts that the teacher plays, or the student."""
    share = {"student": 0.0, "teacher": 1.0, "mix": args.teacher_fraction}[args.rollout_source]
    return share if is_teacher else 1 - share


def rollout_dtype(args: CFGDiversityConfig | MusicSFTConfig) -> torch.dtype | None:
    """Of the matrices that a rollout multiplies with; None for the model's own."""
    return torch.bfloat16 if args.bf16 else None


def separate_teacher(policy: Policy, teacher_model: str | None, lora: bool) -> Policy | None:
    """A frozen policy of its own, or None when it is the student without adapters.

    Taken before TRL wraps `policy.forward`: a later copy would run the original's weights.

    Args:
        policy: the student at its start.
        teacher_model: where the teacher is read from; None if it is the start.
        lora: whether the student gets adapters.
    """
    if teacher_model is None:
        return None if lora else policy.frozen_copy()
    teacher = as_policy(load_policy(teacher_model), policy.processor).share_with(policy)
    return None if lora and fingerprint(teacher) == fingerprint(policy) else teacher


def fingerprint(policy: Policy, ignored: tuple[str, ...] = ()) -> dict[str, int]:
    """One number per weight that the teacher reads (text encoder, projection, decoder): the sum of its bits as
    integers.

    It does not depend on the number of threads or the device, and any change of a single value changes it. The
    530 million weights of musicgen-small take 0.06 s on one CPU thread. Adapters do not count: the layers below
    them keep the names that they had before.
    """
    ignored = (f"{SHIFT}.", *ignored)  # of the student alone
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): int(
            parameter.detach().view(_BITS[parameter.itemsize]).sum(dtype=torch.int32)
        )
        for name, parameter in policy.model.named_parameters()
        if not name.startswith(policy.family.codec_prefix) and not name.startswith(ignored)
    }


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenWeights:
    """What a run must leave as it is: the teacher, and the weights below a LoRA student's adapter.

    Args:
        policies: as they are now; adapters may be added to them.
        ignored: beginnings of the names of weights that are not looked at, besides the codec's.
    """

    def __init__(self, *policies: Policy, ignored: tuple[str, ...] = ()):
        self.policies, self.ignored = policies, ignored
        self.sums = self._sums()

    def _sums(self) -> dict[tuple[int, str], int]:
        return {
            (i, name): s
            for i, policy in enumerate(self.policies)
            for name, s in fingerprint(policy, self.ignored).items()
        }

    def total(self, *sources: str | os.PathLike | nn.Module) -> int | None:
        """All of them as one number, which a resumed run compares; None where an adapter was merged into one of the
        models' sources, since the last bits then differ by machine."""
        merged = any(isinstance(source, nn.Module) or is_adapter(source) for source in sources)
        return None if merged else sum(self.sums.values())

    def without(self, student: Policy) -> Self:
        """Those of the other models as they are now, but for the encoders that they share with the student, which is
        in parts or in another precision."""
        others = [policy for policy in self.policies if policy is not student]
        return type(self)(*others, ignored=tuple(f"{part}." for part in student.shared))

    def check(self, whose: str) -> None:
        """Compare with the start.

        Args:
            whose: what may have changed them, and the remedy.

        Raises:
            ValueError: they changed.
        """
        now = self._sums()
        changed = [name for (i, name), found in self.sums.items() if now.get((i, name)) != found]
        if changed:
            raise ValueError(
                f"{len(changed)} weights of the frozen base changed (such as {changed[0]}), so that the teacher "
                f"is no longer the model that the run began with: {whose}"
            )


class Teacher:
    """π_γ,θ0: guided hidden states for the loss, and the policy that samples when clips come from the
    teacher.

    Args:
        policy: a frozen one; or, with LoRA, the student's.
        guidance_scale: γ, or one for each of T frames; where the rows are told theirs, the reference γ.
        reference: the γ that `guidance_scale` is made of.
        negative: condition of the negative prompt [1, Lt, Dt]; None is the null prompt.
        adapted: with LoRA, the student, whose disabled adapters leave θ0.
    """

    def __init__(
        self,
        policy: Policy,
        guidance_scale: float | tuple[float, ...],
        negative: TextCondition | None = None,
        adapted: PeftModel | None = None,
        reference: float = 3.0,
    ):
        self.policy = policy
        self.adapted = adapted
        self.guidance_scale = guidance_scale
        self.reference = reference
        self.negative = negative

    @property
    def shares_weights(self) -> bool:
        """Whether the teacher is the student without its adapters."""
        return self.adapted is not None

    @contextlib.contextmanager
    def frozen(self) -> Iterator[Policy]:
        """The teacher's policy, its adapters disabled while the context lasts."""
        with contextlib.nullcontext() if self.adapted is None else self.adapted.disable_adapter():
            yield self.policy

    def unconditional(self, condition: TextCondition) -> TextCondition:
        """The null or negative prompt, one row for each row of `condition`."""
        if self.negative is None:
            return self.policy.null(condition)
        return self.negative.select([0] * len(condition))

    @torch.no_grad()
    def __call__(self, codes: Tensor, condition: TextCondition) -> GuidedTeacher:
        """Run [cond; null] in one forward pass.

        Args:
            codes: [N, K, T].
            condition: N rows.
        """
        scale, condition = self.scales(condition), condition.told(None)
        with self.frozen() as policy:
            heads = policy.head_weights().detach()
            if not isinstance(scale, Tensor) and scale == 1:
                return GuidedTeacher(policy.hidden_states(codes, condition), None, heads, 1.0)
            rows = condition.cat(self.unconditional(condition))
            cond, uncond = policy.hidden_states(codes.repeat(2, 1, 1), rows).chunk(2)
            if isinstance(scale, Tensor) and scale.shape[-1] == 1:  # of a row: the heads are linear
                return GuidedTeacher(guided_logits(cond, uncond, scale[:, 0]), None, heads, 1.0)
            return GuidedTeacher(cond, uncond, heads, scale)

    def scales(self, condition: TextCondition) -> float | Tensor:
        """γ, of every frame [T], or of every row and frame [N, 1, T or 1], where the rows are told theirs.

        A schedule says which share of γ − 1 a frame has.
        """
        scale, told = self.guidance_scale, condition.guidance
        if isinstance(scale, tuple):
            scale = torch.tensor(scale, device=condition.attention_mask.device)
        if told is None:
            return scale
        return 1 + (told[:, None, None] - 1) * ((scale - 1) / (self.reference - 1))


class Sampler:
    """Clips from the student without guidance, or from the teacher with its own.

    Args:
        args: the run's settings.
        num_frames: T.
        student: the policy.
        teacher: the teacher.
        wrapped: tells the student's model as it is wrapped for several processes.
    """

    def __init__(
        self,
        args: CFGDiversityConfig,
        num_frames: int,
        student: Policy,
        teacher: Teacher,
        wrapped: Callable[[], nn.Module],
    ):
        self.args = args
        self.num_frames = num_frames
        self.student = student
        self.teacher = teacher
        self.wrapped = wrapped
        self.weights: dict[bool, Any] = {}  # snapshots, by `is_teacher`

    def __call__(
        self,
        condition: TextCondition,
        sample_ids: Tensor,
        seed: int,
        is_teacher: bool,
        guidance_scale: float | tuple[float, ...] | None = None,
        names: list[str] | None = None,
        num_frames: int | None = None,
    ) -> Tensor:
        """Codes [N, K, T].

        Every process calls it for the same samplers in the same order, also with N = 0 clips: what FSDP has
        spread over the processes is gathered by all of them at once.

        Args:
            condition: N rows.
            sample_ids: number of each clip among those of all processes [N].
            seed: of the rollout.
            is_teacher: who plays.
            guidance_scale: in the place of the player's own.
            names: what an error calls each clip [N].
            num_frames: in the place of T.
        """
        args, num_frames = self.args, num_frames or self.num_frames
        weights = self.rollout_weights(is_teacher)
        if not len(condition):
            return sample_ids.new_empty(0, len(self.student.delays), num_frames)
        if is_teacher and condition.guidance is not None:
            return self._by_scale(condition, sample_ids, seed, names, num_frames)
        if guidance_scale is None:
            guidance_scale = self.teacher.guidance_scale if is_teacher else 1.0
        if isinstance(guidance_scale, tuple):
            guidance_scale = guidance_scale[:num_frames]  # of a measurement, which is short
        avoids = guidance_scale != 1 and self.teacher.negative is not None
        # Stock `generate` computes in the dtype of a snapshot; a snapshot has its own.
        dtype = rollout_dtype(args) if weights is None else None
        cast = torch.autocast(sample_ids.device.type, dtype, enabled=dtype is not None)
        with self.policy(is_teacher) as policy, cast:
            return policy.sample(
                condition,
                num_frames,
                guidance_scale=guidance_scale,
                temperature=args.temperature,
                seed=seed,
                sample_ids=sample_ids.tolist(),
                negative_condition=self.teacher.unconditional(condition) if avoids else None,
                batch_size=args.rollout_batch_size,
                rollout_backend=args.rollout_backend,
                names=names,
                weights=weights,
            ).codes

    def _by_scale(
        self, condition: TextCondition, ids: Tensor, seed: int, names: list[str] | None, num_frames: int
    ) -> Tensor:
        """The teacher's clips where each row has its own γ: one batch for each."""
        assert condition.guidance is not None
        codes = ids.new_empty(len(ids), len(self.student.delays), num_frames)
        for scale in condition.guidance.unique():
            rows = (condition.guidance == scale).nonzero()[:, 0]
            part = condition.select(rows)
            scales = torch.as_tensor(self.teacher.scales(part))[0].flatten().tolist()
            codes[rows] = self(
                part.told(None),
                ids[rows],
                seed,
                True,
                guidance_scale=scales[0] if len(scales) == 1 else tuple(scales),
                names=names and [names[row] for row in rows.tolist()],
                num_frames=num_frames,
            )
        return codes

    def policy(self, is_teacher: bool) -> contextlib.AbstractContextManager[Policy]:
        """Whose clips they are."""
        return self.teacher.frozen() if is_teacher else contextlib.nullcontext(self.student)

    def rollout_weights(self, is_teacher: bool) -> Any:
        """The snapshot to sample from, kept for its CUDA graphs; None if the model itself is sampled.

        The teacher's never changes. Which weights are read does not depend on the process: see `__call__`.
        """
        if self.args.rollout_backend == "transformers":
            return None
        weights = self.weights.get(is_teacher)
        if weights is not None and is_teacher:
            return weights
        with self.policy(is_teacher) as policy, whole_weights(self.wrapped()):
            if weights is None:
                weights = self.weights[is_teacher] = policy.snapshot(rollout_dtype(self.args))
            else:
                weights.refresh(policy.model)
        return weights
