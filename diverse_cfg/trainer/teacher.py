"""Who plays: the student, and the teacher, which is the frozen initial policy, guided.

With LoRA the teacher is the student itself with its adapters disabled, so no second copy exists. With full
weights it is a frozen copy of the decoder that shares the (frozen) text encoder and codec with the student.
"""

import contextlib
import copy
import os
from collections.abc import Callable, Iterator
from typing import Self

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.config import CFGDiversityConfig
from diverse_cfg.functional.distillation import GuidedTeacher
from diverse_cfg.policies.loading import is_distilled, load_policy
from diverse_cfg.policies.musicgen.model import code_hidden_states, head_weights, unwrap
from diverse_cfg.policies.sampler.rollout import RolloutWeights, sample_codes
from diverse_cfg.policies.sampler.weights import whole_weights
from diverse_cfg.policies.stored import is_adapter, same_base
from diverse_cfg.types import TextCondition


def check_teacher(model: str | os.PathLike | nn.Module, args: CFGDiversityConfig) -> None:
    """Refuse to guide a teacher that has its guidance inside.

    Raises:
        ValueError: the teacher is a student, a merge or an adapter of one, and γ > 1.
    """
    if args.guidance_scale == 1:
        return
    if args.teacher_model is not None:
        if is_distilled(args.teacher_model):
            raise ValueError(
                f"teacher_model={args.teacher_model} is distilled already, and guidance_scale="
                f"{args.guidance_scale:g} would guide it twice: name its base, or set guidance_scale to 1"
            )
        return
    if isinstance(model, nn.Module):
        name, distilled = "the model", getattr(unwrap(model), "is_distilled", False)
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


def samplers(args: CFGDiversityConfig) -> tuple[bool, ...]:
    """Who plays the training clips, as values of `is_teacher`: those of the run, whatever one rollout's rows."""
    return {"student": (False,), "teacher": (True,), "mix": (False, True)}[args.rollout_source]


def sampler_share(args: CFGDiversityConfig, is_teacher: bool) -> float:
    """Share of the training prompts that the teacher plays, or the student."""
    share = {"student": 0.0, "teacher": 1.0, "mix": args.teacher_fraction}[args.rollout_source]
    return share if is_teacher else 1 - share


def rollout_dtype(args: CFGDiversityConfig) -> torch.dtype | None:
    """Of the matrices that a rollout multiplies with; None for the model's own."""
    return torch.bfloat16 if args.bf16 else None


def separate_teacher(
    policy: MusicgenForConditionalGeneration, teacher_model: str | None, lora: bool
) -> MusicgenForConditionalGeneration | None:
    """A frozen model of its own, or None when it is the student without adapters.

    Taken before TRL wraps `policy.forward`: a later copy would run the original's weights.

    Args:
        policy: the student at its start.
        teacher_model: where the teacher is read from; None if it is the start.
        lora: whether the student gets adapters.
    """
    if teacher_model is None:
        return None if lora else frozen_copy(policy)
    teacher = share_encoders(load_policy(teacher_model), policy)
    return None if lora and fingerprint(teacher) == fingerprint(policy) else teacher


def frozen_copy(model: MusicgenForConditionalGeneration) -> MusicgenForConditionalGeneration:
    """Copy of the decoder and its projection, without gradients; text encoder and codec are shared."""
    shared = {id(module): module for module in (model.text_encoder, model.audio_encoder)}
    teacher = copy.deepcopy(model, memo=shared)
    return teacher.requires_grad_(False).eval()


def share_encoders(
    teacher: MusicgenForConditionalGeneration, student: MusicgenForConditionalGeneration
) -> MusicgenForConditionalGeneration:
    """Make a separately loaded teacher use the student's text encoder and codec.

    Raises:
        ValueError: the two do not agree on codes, text or codec, so that no divergence between them is
            defined.
    """
    for part in ("text_encoder", "audio_encoder"):
        theirs, ours = getattr(teacher, part).state_dict(), getattr(student, part).state_dict()
        same = theirs.keys() == ours.keys() and all(torch.equal(theirs[k].cpu(), ours[k].cpu()) for k in ours)
        if not same:
            raise ValueError(
                f"teacher_model has another {part} than the model that is trained: it must be a checkpoint "
                "of the same base (a live model in half precision has rounded weights: pass its folder)"
            )
        setattr(teacher, part, getattr(student, part))
    for name in ("num_codebooks", "vocab_size", "audio_channels"):
        wanted, found = getattr(student.config.decoder, name), getattr(teacher.config.decoder, name)
        if wanted != found:
            raise ValueError(f"teacher_model has {name}={found}, the model that is trained has {wanted}")
    return teacher.requires_grad_(False).eval()


def to_device(teacher: MusicgenForConditionalGeneration, device: torch.device) -> None:
    """Move what the teacher does not share with the student, which the trainer moves."""
    teacher.decoder.to(device)
    if hasattr(teacher, "enc_to_dec_proj"):
        teacher.enc_to_dec_proj.to(device)


def fingerprint(model: nn.Module, ignored: tuple[str, ...] = ("audio_encoder.",)) -> dict[str, int]:
    """One number per weight that the teacher reads (text encoder, projection, decoder): the sum of its bits as
    integers.

    It does not depend on the number of threads or the device, and any change of a single value changes it. The
    530 million weights of musicgen-small take 0.06 s on one CPU thread. Adapters do not count: the layers below
    them keep the names that they had before.
    """
    return {
        name.replace(".base_layer", "").replace(".original_module", ""): int(
            parameter.detach().view(_BITS[parameter.itemsize]).sum(dtype=torch.int32)
        )
        for name, parameter in model.named_parameters()
        if not name.startswith(ignored)
    }


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class FrozenWeights:
    """What a run must leave as it is: the teacher, and the weights below a LoRA student's adapter.

    Args:
        models: plain MusicGens, as they are now; adapters may be added to them.
        ignored: parts that are not looked at.
    """

    def __init__(self, *models: nn.Module, ignored: tuple[str, ...] = ("audio_encoder.",)):
        self.models, self.ignored = models, ignored
        self.sums = self._sums()

    def _sums(self) -> dict[tuple[int, str], int]:
        return {
            (i, name): s
            for i, m in enumerate(self.models)
            for name, s in fingerprint(m, self.ignored).items()
        }

    def total(self, *sources: str | os.PathLike | nn.Module) -> int | None:
        """All of them as one number, which a resumed run compares; None where an adapter was merged into one of the
        models' sources, since the last bits then differ by machine."""
        merged = any(isinstance(source, nn.Module) or is_adapter(source) for source in sources)
        return None if merged else sum(self.sums.values())

    def without(self, student: nn.Module) -> Self:
        """Those of the other models as they are now, but for the encoders that they share with the student, which is
        in parts or in another precision."""
        others = [model for model in self.models if model is not student]
        return type(self)(*others, ignored=("audio_encoder.", "text_encoder."))

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
        model: the frozen copy; or, with LoRA, the `PeftModel` whose disabled adapters leave θ0.
        guidance_scale: γ.
        negative: condition of the negative prompt [1, Lt, Dt]; None is the null prompt.
    """

    def __init__(self, model: nn.Module, guidance_scale: float, negative: TextCondition | None = None):
        self.model = model
        self.guidance_scale = guidance_scale
        self.negative = negative

    @property
    def shares_weights(self) -> bool:
        """Whether the teacher is the student without its adapters."""
        return isinstance(self.model, PeftModel)

    @contextlib.contextmanager
    def policy(self) -> Iterator[nn.Module]:
        """The teacher's plain MusicGen, its adapters disabled while the context lasts."""
        with self.model.disable_adapter() if self.shares_weights else contextlib.nullcontext():
            yield unwrap(self.model)

    def unconditional(self, condition: TextCondition) -> TextCondition:
        """The null or negative prompt, one row for each row of `condition`."""
        if self.negative is None:
            return condition.null()
        return self.negative.select([0] * len(condition))

    @torch.no_grad()
    def __call__(self, codes: Tensor, condition: TextCondition) -> GuidedTeacher:
        """Run [cond; null] in one forward pass.

        Args:
            codes: [N, K, T].
            condition: N rows.
        """
        with self.policy() as policy:
            heads = head_weights(policy).detach()
            if self.guidance_scale == 1:
                return GuidedTeacher(code_hidden_states(policy, codes, condition), None, heads, 1.0)
            rows = condition.cat(self.unconditional(condition))
            cond, uncond = code_hidden_states(policy, codes.repeat(2, 1, 1), rows).chunk(2)
            return GuidedTeacher(cond, uncond, heads, self.guidance_scale)


class Sampler:
    """Clips from the student without guidance, or from the teacher with its own.

    Args:
        args: the run's settings.
        num_frames: T.
        num_codebooks: K.
        student: tells the model as it is trained, and as it is wrapped for several processes.
        teacher: the teacher.
    """

    def __init__(
        self,
        args: CFGDiversityConfig,
        num_frames: int,
        num_codebooks: int,
        student: Callable[[], tuple[nn.Module, nn.Module]],
        teacher: Teacher,
    ):
        self.args = args
        self.num_frames = num_frames
        self.num_codebooks = num_codebooks
        self.student = student
        self.teacher = teacher
        self.weights: dict[bool, RolloutWeights] = {}  # fused, by `is_teacher`

    def __call__(
        self,
        condition: TextCondition,
        sample_ids: Tensor,
        seed: int,
        is_teacher: bool,
        guidance_scale: float | None = None,
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
            return sample_ids.new_empty(0, self.num_codebooks, num_frames)
        if guidance_scale is None:
            guidance_scale = args.guidance_scale if is_teacher else 1.0
        avoids = guidance_scale > 1 and self.teacher.negative is not None
        # Stock `generate` computes in the dtype of a snapshot; a snapshot has its own.
        dtype = rollout_dtype(args) if weights is None else None
        cast = torch.autocast(sample_ids.device.type, dtype, enabled=dtype is not None)
        with self.policy(is_teacher) as policy, cast:
            return sample_codes(
                policy,
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

    def policy(self, is_teacher: bool) -> contextlib.AbstractContextManager[nn.Module]:
        """The plain model that plays."""
        return self.teacher.policy() if is_teacher else contextlib.nullcontext(unwrap(self.student()[0]))

    def rollout_weights(self, is_teacher: bool) -> RolloutWeights | None:
        """The fused copy to sample from, kept for its CUDA graphs; None if stock `generate` samples.

        The teacher's never changes. Which weights are read does not depend on the process: see `__call__`.
        """
        if self.args.rollout_backend == "transformers":
            return None
        weights = self.weights.get(is_teacher)
        if weights is not None and is_teacher:
            return weights
        with self.policy(is_teacher) as policy, whole_weights(self.student()[1]):
            if weights is None:
                weights = self.weights[is_teacher] = RolloutWeights.from_model(
                    policy, rollout_dtype(self.args)
                )
            else:
                weights.refresh(policy)
        return weights
