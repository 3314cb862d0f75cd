"""What travels between the stages: the text a policy is conditioned on, the clips it played, and who samples them.

Shape letters, here and everywhere: P prompts, G generations per prompt, N = P·G clips (grouped: the clips of
one prompt are adjacent), K codebooks, T frames, S decoder steps (mono T + K − 1, stereo T + K/2 − 1), V codes
per codebook, D embedding, L audio samples; B is any batch, Lt tokens of text, Dt the text encoder's width.
"""

from dataclasses import dataclass, field, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

ROLLOUT_BACKENDS = ("fast", "transformers")
"""Who samples: the package's own loop, or stock `generate`."""


@dataclass(frozen=True)
class TextCondition:
    """What the decoder cross-attends to, one row per prompt or per clip.

    Args:
        hidden_states: output of the text encoder, before `enc_to_dec_proj` [B, Lt, Dt].
        attention_mask: 1 for tokens, 0 for padding [B, Lt]. A row of zeros in both is the null prompt.
        guidance: γ that the policy is told [B], of a student that was trained for several; None tells nothing.
    """

    hidden_states: Tensor
    attention_mask: Tensor
    guidance: Tensor | None = None

    def __post_init__(self) -> None:
        if self.hidden_states.ndim != 3 or self.hidden_states.shape[:2] != self.attention_mask.shape:
            raise ValueError(
                "a TextCondition needs hidden_states [B, Lt, Dt] and attention_mask [B, Lt], got "
                f"{tuple(self.hidden_states.shape)} and {tuple(self.attention_mask.shape)}"
            )
        if self.guidance is not None and self.guidance.shape != self.attention_mask.shape[:1]:
            raise ValueError(
                f"guidance must be one γ per row [{len(self)}], got {tuple(self.guidance.shape)}"
            )

    def __len__(self) -> int:
        return self.hidden_states.shape[0]

    def told(self, guidance: float | Tensor | None) -> Self:
        """The same rows, of which the policy is told this γ: one for all, one per row [B], or none."""
        if guidance is not None:
            guidance = torch.as_tensor(guidance, device=self.attention_mask.device).expand(len(self))
        return replace(self, guidance=guidance)

    def select(self, rows: Tensor | slice | list[int]) -> Self:
        """The given rows, in the given order (repeats allowed)."""
        guidance = None if self.guidance is None else self.guidance[rows]
        return type(self)(self.hidden_states[rows], self.attention_mask[rows], guidance)

    def null(self) -> Self:
        """The null prompt in this shape: a zero text-encoder output *and* a zero attention mask.

        A policy is trained with it (condition dropout), and it equals a decoder without cross-attention exactly.
        Zeros with an open mask are another prompt: the bias of a projection would leak in.
        """
        return replace(
            self,
            hidden_states=torch.zeros_like(self.hidden_states),
            attention_mask=torch.zeros_like(self.attention_mask),
        )

    def pad(self, num_tokens: int) -> Self:
        """With masked tokens after its own, up to `num_tokens`; they change nothing."""
        missing = max(0, num_tokens - self.attention_mask.shape[1])
        return replace(
            self,
            hidden_states=F.pad(self.hidden_states, (0, 0, 0, missing)),
            attention_mask=F.pad(self.attention_mask, (0, missing)),
        )

    def cat(self, other: Self | None) -> Self:
        """These rows and then the other's, padded to the longer text."""
        if other is None:
            return self
        num_tokens = max(condition.attention_mask.shape[1] for condition in (self, other))
        first, second = self.pad(num_tokens), other.pad(num_tokens)
        told = [rows.guidance for rows in (self, other) if rows.guidance is not None]
        if len(told) == 1:
            raise ValueError(
                "one of two conditions tells γ and the other does not: use told() on both or none"
            )
        return type(self)(
            torch.cat([first.hidden_states, second.hidden_states]),
            torch.cat([first.attention_mask, second.attention_mask]),
            torch.cat(told) if told else None,
        )

    def repeat_interleave(self, num_generations: int) -> Self:
        """Every row `num_generations` times, repeats adjacent: from P prompts to N = P·G clips."""
        rows = torch.arange(len(self), device=self.attention_mask.device)
        return self.select(rows.repeat_interleave(num_generations))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move both tensors; `dtype` concerns the hidden states only."""
        return type(self)(
            self.hidden_states.to(device=device, dtype=dtype),
            self.attention_mask.to(device=device),
            None if self.guidance is None else self.guidance.to(device=device),
        )


@dataclass
class Clips:
    """Clips that a policy sampled, and what the stages between rollout and loss have found out about them.

    Args:
        codes: one code per frame and codebook, int64 [N, K, T]; no start column, no padding.
        sampling_rate: of the audio that the codes stand for, in Hz.
        logps: log-probability (nats, float32) of every code under the distribution that it was drawn from,
            i.e. after guidance, temperature and filters [N, K, T]; None if it was not recorded.
        waveforms: decoded audio, float32 in about [−1, 1]: mono [N, L], stereo [N, 2, L]; None if not
            decoded.
        prompts: text of every clip [N]; None where it is not known.
        columns: what else the dataset says of every clip, name → [N].
        condition: what the decoder cross-attended to, N rows.
        from_teacher: whether the teacher sampled the clip [N].
        decoder_rows: that the decoder computed for every clip, null rows and given beginnings included [N]; None
            where nobody counted.
        seed: of the rollout's noise; with the clip's number it gives the same clip again.
        rewards: of all processes' clips, one column per reward function; NaN where one does not apply.
        advantages: per code, coefficients and estimators already applied [N, K, T].
        old_logps: log-probs under the policy as it was when it sampled [N, K, T]; None on the strictly
            on-policy path.

    Raises:
        ValueError: shapes that do not fit each other.
    """

    codes: Tensor
    sampling_rate: int
    logps: Tensor | None = None
    waveforms: Tensor | None = None
    prompts: list[str] | None = None
    columns: dict[str, list] = field(default_factory=dict)
    condition: TextCondition | None = None
    from_teacher: Tensor | None = None
    decoder_rows: Tensor | None = None
    seed: int | None = None
    rewards: Tensor | None = None
    advantages: Tensor | None = None
    old_logps: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.ndim != 3:
            raise ValueError(f"codes must have shape [N, K, T], got {tuple(self.codes.shape)}")
        for name in ("logps", "advantages", "old_logps"):
            values = getattr(self, name)
            if values is not None and values.shape != self.codes.shape:
                raise ValueError(
                    f"{name} and codes differ in shape: {tuple(values.shape)} and {tuple(self.codes.shape)}"
                )
        for name in ("waveforms", "prompts", "condition", "from_teacher", "decoder_rows"):
            rows = getattr(self, name)
            if rows is not None and len(rows) != len(self):
                raise ValueError(f"{len(rows)} {name} for {len(self)} clips")

    def __len__(self) -> int:
        return self.codes.shape[0]
