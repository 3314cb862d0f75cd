"""A policy over codes, whatever model is behind it: what rollout, teacher, loss and checkpoints ask it for."""

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self

import torch
from peft import PeftModel
from torch import Tensor, nn

from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.functional.guidance import GuidanceRange, guided_logits
from diverse_cfg.policies.families import Family, family_of
from diverse_cfg.policies.sampler.draws import SamplingSettings, draw, keyed_noise, sampling_logits
from diverse_cfg.policies.shift import SHIFT, GuidanceShift
from diverse_cfg.types import Clips, TextCondition

_LONGEST_TEXT = 512
"""Tokens that a text encoder was trained on whose tokenizer has no limit of its own, which says so by a huge number."""

_SAID_UNKNOWN: set[str] = set()  # prompts that were warned of: every batch of a run is checked


class Policy(ABC):
    """A live model that turns a text condition into K streams of codes.

    A family names its parts and computes hidden states; what follows from these is here, in the plainest way. Its
    own, faster way to sample replaces `sample` and `snapshot`.

    Args:
        model: the plain model, which may have PEFT's layers inside.
        processor: its processor or tokenizer; needed for `encode_text`.

    Attributes:
        trained: beginnings of the names of the parameters that are trained; all others are the teacher's too.
        shared: names of the submodules that student and teacher have in common.
        lora_targets: default `target_modules` of an adapter.
    """

    trained: ClassVar[tuple[str, ...]] = ("",)
    shared: ClassVar[tuple[str, ...]] = ()
    lora_targets: ClassVar[list[str]] = []

    def __init__(self, model: Any, processor: Any = None) -> None:
        self.model = model
        self.processor = processor

    @property
    def family(self) -> Family:
        """Of the model: what its folders look like."""
        return family_of(self.model)

    @property
    def tokenizer(self) -> Any:
        """Of the prompts."""
        return getattr(self.processor, "tokenizer", self.processor)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights that are trained."""
        return next(p.dtype for name, p in self.model.named_parameters() if name.startswith(self.trained))

    # ---- codes ------------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """V, codes per codebook; as an input, V itself stands where a clip has no code."""

    @property
    @abstractmethod
    def max_steps(self) -> int:
        """Most decoder steps of a clip, the start included."""

    @property
    def delays(self) -> tuple[int, ...]:
        """Delay of each codebook in decoder steps [K]."""
        return (0,)

    @property
    def frame_rate(self) -> float:
        """Frames per second (Hz)."""
        return 1.0

    @property
    def sampling_rate(self) -> int:
        """Of the audio that the codes stand for (Hz)."""
        return 1

    @property
    def usual_seconds(self) -> float:
        """Length of a clip where nobody names one."""
        return (self.max_steps - max(self.delays) - 1) / self.frame_rate

    # ---- the conditional model --------------------------------------------------------------------------

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> TextCondition:
        """P texts as P rows, each distinct text encoded once.

        Raises:
            ValueError: see `require_prompts`.
        """

    def null(self, condition: TextCondition) -> TextCondition:
        """The null prompt, one row for each row of `condition`."""
        return condition.null()

    @abstractmethod
    def hidden_states(self, codes: Tensor, condition: TextCondition | None) -> Tensor:
        """Hidden states from which the heads predict given codes; gradients flow.

        Args:
            codes: [N, K, T].
            condition: N rows; None for the null prompt.

        Returns:
            [N, S, D]; the one at step t + d_k predicts `codes[:, k, t]` (d: `delays`).
        """

    @abstractmethod
    def head_weights(self) -> Tensor:
        """Weights of the K heads [K, V, D]; gradients flow."""

    def code_logits(self, codes: Tensor, condition: TextCondition | None) -> Tensor:
        """Logits of every code of a clip [N, K, T, V]; `[n, k, t]` depends on the codes before step t + d_k only."""
        hidden, frames = self.hidden_states(codes, condition), codes.shape[-1]
        heads = zip(self.head_weights(), self.delays, strict=True)
        return torch.stack([hidden[:, delay : delay + frames] @ head.T for head, delay in heads], dim=1)

    def decode(self, codes: Tensor) -> Tensor:
        """Audio of codes [N, K, T]: float32, mono [N, L] or stereo [N, 2, L]."""
        raise ValueError(f"{type(self).__name__} has no codec: use rewards and embedders that read codes")

    @property
    def audio_channels(self) -> int:
        """1, or 2 for stereo."""
        return 1

    def encode(self, waveforms: Tensor) -> Tensor:
        """Codes [N, K, ⌈L / hop⌉] of audio in the policy's rate and channels, shaped as `decode` returns it."""
        raise ValueError(f"{type(self).__name__} has no codec: it cannot be trained on recordings")

    # ---- a student that is told γ ------------------------------------------------------------------------

    @property
    def shift(self) -> GuidanceShift | None:
        """What the model adds to its text for a γ that it is told; None of one that was trained for one γ."""
        return getattr(self.model, SHIFT, None)

    def learn_guidance(self, guidance: GuidanceRange) -> None:
        """Let the model be told γ, in place: it begins as one that pays no heed.

        Raises:
            ValueError: the family, or this model of it, has no bias to fold γ into; or the model knows other γ.
        """
        if self.shift is not None:
            self._require_same_guidance(guidance)
            return
        width = self._guidance_bias(
            f"guidance_scale from {guidance.knots[0]:g} to {guidance.knots[-1]:g}"
        ).shape[0]
        self.set_shift(GuidanceShift(guidance, width))

    def set_shift(self, shift: GuidanceShift | None) -> None:
        """Give the model what it adds for a γ, or take it away, in place."""
        self.model._modules.pop(SHIFT, None)
        if shift is not None:
            bias = self._guidance_bias("a student that is told γ")
            if shift.table.shape[1] != bias.shape[0]:
                raise ValueError(
                    f"the table of γ has width {shift.table.shape[1]}, the model {bias.shape[0]}: it is another "
                    "model's"
                )
            self.model.add_module(SHIFT, shift.to(bias.device, bias.dtype))

    def require_guidance(self, guidance_scale: float) -> GuidanceShift:
        """The shift of a model that can be told this γ.

        Raises:
            ValueError: it was trained for one γ, or for others.
        """
        if self.shift is None:
            raise ValueError(
                f"student_guidance={guidance_scale}: the model was trained for one γ; leave it out, or train with a "
                "range, guidance_scale: {low: 1, high: 5}"
            )
        self.shift.guidance.require(guidance_scale)
        return self.shift

    @torch.no_grad()
    def fold_guidance(self, guidance_scale: float) -> None:
        """Make the model one for this γ alone, in place: an ordinary model of its family.

        Raises:
            ValueError: see `require_guidance`.
        """
        shift = self.require_guidance(guidance_scale)
        self._guidance_bias("a student that is told γ").add_(shift.at(guidance_scale))
        self.set_shift(None)

    def _guidance_bias(self, what: str) -> nn.Parameter:
        name, kind = self.family.guidance_bias, self.model.config.model_type
        if name is None:
            raise ValueError(f"{what} is not supported by {kind!r} models: set guidance_scale to one number")
        bias = dict(self.model.named_parameters()).get(name)
        if bias is None:
            raise ValueError(
                f"{what} needs {name} to fold γ into, which this {kind!r} model lacks, as its text encoder is as wide "
                "as its decoder: set guidance_scale to one number"
            )
        return bias

    def _require_same_guidance(self, guidance: GuidanceRange) -> None:
        assert self.shift is not None
        if self.shift.guidance != guidance:
            knots = self.shift.guidance.knots
            raise ValueError(
                f"the model is a student that knows γ from {knots[0]:g} to {knots[-1]:g} (knots "
                f"{', '.join(f'{knot:g}' for knot in knots)}): train it on with the same guidance_scale, or fold one γ "
                "into it first (diverse-cfg merge --bake-guidance)"
            )

    # ---- sampling ---------------------------------------------------------------------------------------

    def snapshot(self, dtype: torch.dtype | None = None) -> Any:
        """A copy to sample from, with a `refresh(model)`; None where the model itself is sampled."""
        return None

    @torch.no_grad()
    def sample(
        self,
        condition: TextCondition,
        num_frames: int,
        *,
        guidance_scale: float | Sequence[float] = 1.0,
        temperature: float = 1.0,
        seed: int = 0,
        sample_ids: Sequence[int] | None = None,
        negative_condition: TextCondition | None = None,
        **options: Any,
    ) -> Clips:
        """One clip of codes per row, by a whole forward pass per step.

        Args:
            condition: N rows.
            num_frames: T.
            guidance_scale: γ; T numbers are a schedule.
            temperature: 0 is greedy.
            seed: of the run.
            sample_ids: which clip of the run each row is [N]; 0 … N − 1 by default.
            negative_condition: N rows in the place of the null prompt.
            options: of a family's own way to sample: batch_size, rollout_backend, names, weights.
        """
        settings = SamplingSettings(guidance_scale, temperature)
        delays, rows = self.delays, condition
        if settings.guided:
            rows = condition.cat(negative_condition or self.null(condition))
        scale = settings.guidance_scale
        if isinstance(scale, tuple):
            scale = torch.tensor(scale, device=self.device)
        ids = range(len(condition)) if sample_ids is None else sample_ids
        noise = keyed_noise(seed, ids, len(delays), num_frames, self.vocab_size).to(self.device)
        codes = torch.zeros(len(condition), len(delays), num_frames, dtype=torch.long, device=self.device)
        for step in range(num_decoder_steps(num_frames, delays)):
            logits = self.code_logits(codes.repeat(len(rows) // len(codes), 1, 1), rows)
            if settings.guided:
                logits = guided_logits(*logits.chunk(2), scale)
            drawn, _, _ = draw(sampling_logits(logits, settings), noise, settings.greedy)
            for codebook, delay in enumerate(delays):
                if 0 <= step - delay < num_frames:
                    codes[:, codebook, step - delay] = drawn[:, codebook, step - delay]
        return Clips(codes, self.sampling_rate, condition=condition)

    # ---- memory -----------------------------------------------------------------------------------------

    @property
    def hidden_units(self) -> int:
        """Of all layers: what the activations of a step grow with."""
        return 0

    def snapshot_bytes(self, dtype: torch.dtype) -> int:
        """Size of a `snapshot`."""
        return 0

    def cache_bytes(self, num_frames: int, guided: bool, dtype: torch.dtype) -> int:
        """Bytes that one clip takes while it is sampled."""
        return 0

    def automatic_batch(self, num_frames: int, guided: bool, dtype: torch.dtype) -> int:
        """Clips that are sampled at once where nobody chose a number."""
        return 64

    # ---- student and teacher ----------------------------------------------------------------------------

    def freeze(self) -> None:
        """Freeze all but what is trained, in place."""
        for name, parameter in self.model.named_parameters():
            if not name.startswith(self.trained):
                parameter.requires_grad_(False)

    def prepare_training(self, device: torch.device) -> None:  # noqa: B027  (most need nothing)
        """Keep text trainers' habits off the model, in place."""

    def processor_of(self, tokenizer: Any) -> Any:
        """What is saved with a student of which only a tokenizer was given."""
        return tokenizer

    def set_sampling(self, sampling: dict[str, Any] | None = None) -> None:
        """Give the model the generation settings of a student; see `Family.playing_config`."""
        self.family.repair_token_ids(self.model.config)
        like = self.model.generation_config
        self.model.generation_config = self.family.playing_config(self.model.config, sampling, like=like)

    def frozen_copy(self) -> Self:
        """Without gradients; text encoder and codec are shared."""
        shared = {id(part): part for part in map(self.model.get_submodule, self.shared)}
        teacher = copy.deepcopy(self.model, memo=shared)
        return type(self)(teacher.requires_grad_(False).eval(), self.processor)

    def share_with(self, student: "Policy") -> Self:
        """Use the student's text encoder and codec, as a teacher that was loaded apart.

        Raises:
            ValueError: the two do not agree on codes, text or codec, so that no divergence between them is
                defined.
        """
        for part in self.shared:
            theirs = self.model.get_submodule(part).state_dict()
            ours = student.model.get_submodule(part).state_dict()
            same = theirs.keys() == ours.keys() and all(
                torch.equal(theirs[k].cpu(), ours[k].cpu()) for k in ours
            )
            if not same:
                raise ValueError(
                    f"teacher_model has another {part} than the model that is trained: it must be a checkpoint "
                    "of the same base (a live model in half precision has rounded weights: pass its folder)"
                )
            self.model.set_submodule(part, student.model.get_submodule(part))
        for name in ("delays", "vocab_size"):
            wanted, found = getattr(student, name), getattr(self, name)
            if wanted != found:
                raise ValueError(f"teacher_model has {name}={found}, the model that is trained has {wanted}")
        self.model.requires_grad_(False).eval()
        return self

    def move_own(self, device: torch.device) -> None:
        """Move what is not shared."""
        shared = tuple(f"{part}." for part in self.shared)
        for name, module in self.model.named_children():
            if not f"{name}.".startswith(shared or ("\0",)):
                module.to(device)


def listed(prompts: str | Sequence[str]) -> list[str]:
    """Prompts as a list; one text is a list of one.

    Raises:
        ValueError: neither.
    """
    if not isinstance(prompts, str) and not isinstance(prompts, Iterable):
        raise ValueError(f"prompts must be a non-empty list of texts, got {prompts!r}")
    return [prompts] if isinstance(prompts, str) else list(prompts)


def require_prompts(prompts: Sequence[str], tokenizer: Any, where: str = "") -> None:
    """Raise unless there are prompts, each has text, and none is longer than the text encoder was trained on.

    A text encoder would take a longer one, in memory that grows with the square of its length: 2.7 GB for 40,000
    letters and MusicGen's T5.
    """
    if isinstance(prompts, str) or not prompts:
        raise ValueError(f"prompts must be a non-empty list of texts, got {prompts!r}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(
                f"{where}prompt {index} is {prompt!r}: every prompt needs text (for clips without a prompt, pass "
                "condition.null() to sample_codes)"
            )
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    limit = tokenizer.model_max_length if tokenizer.model_max_length < 10**6 else _LONGEST_TEXT
    distinct, unknown = list(dict.fromkeys(prompts)), []
    for prompt, ids in zip(distinct, tokenizer(distinct, truncation=False)["input_ids"], strict=True):
        if len(ids) > limit:
            raise ValueError(
                f"{where}prompt {prompts.index(prompt)} has {len(ids)} tokens, the text encoder takes {limit}: "
                f"shorten it ({prompt[:60]!r}…)"
            )
        if tokenizer.unk_token_id in ids and not tokenizer.decode(ids, skip_special_tokens=True).strip():
            unknown.append(prompt)
    if new := [prompt for prompt in unknown if prompt not in _SAID_UNKNOWN]:
        _SAID_UNKNOWN.update(new)
        warnings.warn(
            f"{where}prompt {prompts.index(new[0])} ({new[0][:60]!r}) has no character that the tokenizer knows"
            f"{f', nor have {len(new) - 1} others' if new[1:] else ''}: all such prompts are the same to the model; "
            "write them in English",
            UserWarning,
            stacklevel=3,
        )


def as_policy(model: Any, processor: Any = None) -> Policy:
    """The policy around a live model, also one inside a `PeftModel` (whose layers stay active) or a DDP-like wrapper.

    Args:
        model: of a family that is known; a `Policy` is returned as it is.
        processor: its processor or tokenizer.

    Raises:
        ValueError: a model of no known family.
    """
    if isinstance(model, Policy):
        return model
    inner = plain(model)
    return family_of(inner).policy_class(inner, processor)


def plain(model: nn.Module) -> Any:
    """The model inside a `PeftModel` (its LoRA layers stay active) or a DDP-like wrapper."""
    inner = getattr(model, "module", model)
    return inner.get_base_model() if isinstance(inner, PeftModel) else inner
