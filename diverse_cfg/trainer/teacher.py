"""The teacher: the frozen initial policy, guided.

With LoRA it is the student itself with its adapters disabled, so no second copy exists. With full weights it
is a frozen copy of the decoder that shares the (frozen) text encoder and codec with the student.
"""

import contextlib
import copy
from collections.abc import Iterator

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import MusicgenForConditionalGeneration

from diverse_cfg.functional.distillation import GuidedTeacher
from diverse_cfg.policies.loading import load_policy
from diverse_cfg.policies.musicgen.model import code_hidden_states, head_weights, unwrap
from diverse_cfg.types import TextCondition


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

    def total(self) -> int:
        """All of them as one number."""
        return sum(self.sums.values())

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
