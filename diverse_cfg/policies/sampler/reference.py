"""Stock `generate` as the reference backend of the rollout.

Slow, and by other people: what the fast loop is held against, and what remains when a model is outside its
reach. Three things are arranged around it. Codes are caught on their way into the codec, since `generate`
returns audio. Every setting is explicit, since an unset one is inherited from the checkpoint (guidance 3) or
from a default (top-k 50). And its `multinomial` reads the clip's own random numbers, so that both backends
play the same clip.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.modeling_outputs import BaseModelOutput

from diverse_cfg.functional.codebooks import num_decoder_steps
from diverse_cfg.policies.layers import evaluating
from diverse_cfg.policies.musicgen.model import delays, pad_token_id, unwrap
from diverse_cfg.policies.sampler.draws import SamplingSettings, not_finite, race
from diverse_cfg.policies.shift import SHIFT
from diverse_cfg.types import TextCondition

# One call at a time: the codec's method and the generation config are replaced for the while.
_LOCK = threading.RLock()


@torch.no_grad()
def generate_codes(
    model: nn.Module,
    condition: TextCondition,
    num_frames: int,
    settings: SamplingSettings,
    noise: Tensor,
    negative_condition: TextCondition | None = None,
    names: Sequence[str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample one clip per row of `condition` with `MusicgenForConditionalGeneration.generate`.

    Args:
        model: the policy; put into eval mode and given another generation config for the while.
        condition: N rows.
        num_frames: T.
        settings: of the draws.
        noise: random numbers of the clips [N, K, T, M].
        negative_condition: N rows with as many tokens as `condition`, in place of the null prompt.
        names: what to call each row in an error [N].

    Returns:
        Codes and their log-probabilities [N, K, T] (0 when greedy).

    Raises:
        ValueError: a clip so short that `generate` leaves out the delay pattern.
        FloatingPointError: logits that are not finite; names row and step.
    """
    policy = unwrap(model)
    config = policy.decoder.config
    num_steps = num_decoder_steps(num_frames, delays(policy))
    if num_frames < num_steps - num_frames:
        raise ValueError(
            f"num_frames={num_frames} is too short for transformers' generate, which leaves out the "
            f"delay pattern then: use rollout_backend='fast', or at least {num_steps - num_frames} frames"
        )
    # As many ids as clips: with encoder states alone, `generate` would take the null rows for clips.
    ids = condition.attention_mask
    if settings.guided:
        condition = condition.cat(negative_condition or condition.null())
    draws = _KeyedMultinomial(noise, delays(policy))
    check = _RequireFinite(names or [f"row {row}" for row in range(len(ids))], config.num_codebooks)
    with (
        _LOCK,
        evaluating(policy),
        _generation_config(policy, num_steps, settings),
        _caught_codes(policy) as caught,
        _told(policy, condition),
        draws,
    ):
        policy.generate(
            input_ids=ids,
            encoder_outputs=BaseModelOutput(last_hidden_state=condition.hidden_states),
            attention_mask=condition.attention_mask,
            logits_processor=LogitsProcessorList([check]),
        )
    codes = torch.stack(caught, dim=2).flatten(1, 2) if config.audio_channels == 2 else caught[0]
    return codes, draws.logps


@contextmanager
def _told(policy: Any, condition: TextCondition) -> Iterator[None]:
    """Let every row be told its γ: stock MusicGen projects the text of all rows at every step."""
    if condition.guidance is None:
        yield
        return
    shift = getattr(policy, SHIFT)(condition.guidance)[:, None]
    hook = policy.enc_to_dec_proj.register_forward_hook(lambda module, given, text: text + shift)
    try:
        yield
    finally:
        hook.remove()


class _KeyedMultinomial(TorchFunctionMode):
    """While active, `torch.multinomial` draws with given random numbers, step after step."""

    def __init__(self, noise: Tensor, delays: Sequence[int]) -> None:
        super().__init__()
        self.noise = noise
        self.logps = noise.new_zeros(noise.shape[:3])
        self.delays = torch.tensor(delays, device=noise.device)
        self.step = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not torch.multinomial:
            return func(*args, **(kwargs or {}))
        num_clips, num_codebooks, num_frames, _ = self.noise.shape
        frames = self.step - self.delays
        valid = ((frames >= 0) & (frames < num_frames)).nonzero()[:, 0]
        noise = torch.ones_like(self.noise[:, :, 0])
        noise[:, valid] = self.noise[:, valid, frames[valid]]
        codes, logps, _ = race(args[0].float(), noise.flatten(0, 1))
        self.logps[:, valid, frames[valid]] = logps.view(num_clips, num_codebooks)[:, valid]
        self.step += 1
        return codes[:, None]


class _RequireFinite(LogitsProcessor):
    """Stops at the first logits that are not finite, which `multinomial` or `argmax` may not notice."""

    def __init__(self, names: Sequence[str], num_codebooks: int) -> None:
        self.names = names
        self.num_codebooks = num_codebooks
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        finite = torch.isfinite(scores).all(-1)
        if not finite.all():
            row = int((~finite).nonzero()[0]) // self.num_codebooks % len(self.names)
            raise FloatingPointError(not_finite(self.names[row], self.step))
        self.step += 1
        return scores


@contextmanager
def _caught_codes(policy: Any) -> Iterator[list[Tensor]]:
    """Collect the codes that would be decoded, one entry per audio channel [N, K per channel, T]."""
    caught: list[Tensor] = []

    def decode(codes: Tensor, audio_scales: Any = None) -> SimpleNamespace:
        caught.append(codes[0])
        return SimpleNamespace(audio_values=codes.new_zeros(codes.shape[1], 1, 1))

    codec = policy.audio_encoder
    codec.decode = decode  # shadows the class's method
    try:
        yield caught
    finally:
        del codec.decode


@contextmanager
def _generation_config(policy: Any, num_steps: int, settings: SamplingSettings) -> Iterator[None]:
    """Replace the generation config, so that nothing is inherited from it."""
    pad = pad_token_id(policy)
    own = policy.generation_config
    policy.generation_config = GenerationConfig(
        max_new_tokens=num_steps,
        do_sample=not settings.greedy,
        guidance_scale=settings.guidance_scale,
        temperature=settings.temperature or 1.0,
        top_k=settings.top_k,
        top_p=settings.top_p,
        min_p=settings.min_p,
        pad_token_id=pad,
        bos_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_id=None,
        use_cache=True,
    )
    try:
        yield
    finally:
        policy.generation_config = own
