"""Rollouts: prompts in, clips out.

`fast_generate` is what users and the trainer call: it encodes each distinct prompt once, samples codes in
batches with the package's own loop (`loop`, `decoders`, `sampling`) and decodes them to audio. A clip depends
on its prompt, the settings, the seed and its sample id only: not on the batch it is in, nor on the number of
processes. Stock `generate` is the reference backend (`reference`), driven by the same random numbers.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from diverse_cfg.functional.codebooks import num_decoder_steps, revert_delay_pattern
from diverse_cfg.policies.musicgen.model import delays, encode_text, frame_rate, unwrap
from diverse_cfg.policies.policy import as_policy, listed, require_prompts
from diverse_cfg.policies.sampler.batches import automatic_batch, in_batches, may_be_kept
from diverse_cfg.policies.sampler.draws import SamplingSettings, keyed_noise, not_finite, require_64_bits
from diverse_cfg.policies.sampler.loop import DecodeLoop, default_mode
from diverse_cfg.policies.sampler.reference import generate_codes
from diverse_cfg.policies.sampler.weights import RolloutWeights
from diverse_cfg.policies.tensors import require_float
from diverse_cfg.provenance import warn_if_guided
from diverse_cfg.types import ROLLOUT_BACKENDS, Clips, TextCondition

MAX_SECONDS = 30
"""What MusicGen was trained on; longer music needs a sliding window, see `extension`."""

_TEXT_BUCKET = 32

_CPU_FRAMES = 300
"""Frames that a CPU decodes at once: of more, it spends its time on fetching memory."""


def fast_generate(
    model: nn.Module | str | os.PathLike,
    prompts: str | Sequence[str],
    *,
    processor: Any = None,
    num_frames: int,
    guidance_scale: float | Sequence[float] = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    adaptive_guidance: tuple[float, int] | None = None,
    seed: int | None = None,
    num_generations: int = 1,
    batch_size: int | None = None,
    rollout_backend: str = "fast",
    negative_prompt: str | None = None,
    sample_ids: Sequence[int] | None = None,
    return_logps: bool = False,
    decode: bool = True,
    weights: RolloutWeights | None = None,
    dtype: torch.dtype | None = None,
    prefix: Tensor | None = None,
    student_guidance: float | None = None,
) -> Clips:
    """Generate clips for prompts.

    Args:
        model: a MusicGen, e.g. of `load_policy`; also inside a `PeftModel`. It is only read. A folder, an id or
            `nano` is loaded for this call, its processor too.
        prompts: P texts.
        processor: the model's processor or tokenizer.
        num_frames: T; MusicGen has 50 a second.
        guidance_scale: γ; 1 for a distilled model, 3 is usual for a base model, at twice the cost. T numbers are
            a schedule, γ of every frame; see `guidance_schedule`.
        temperature: 0 is greedy.
        top_k: keep this many codes; 0 keeps all.
        top_p: keep the most likely codes up to this mass; 1 keeps all.
        min_p: drop codes less likely than this fraction of the likeliest; 0 keeps all.
        adaptive_guidance: (ε, n): no null rows any more once prompt and null prompt have agreed to ε for n steps; see
            `functional.guidance.adaptive_guidance`. On a GPU they are computed and have no effect.
        seed: same seed, same clips; None takes one from torch's global generator (`torch.manual_seed`).
        num_generations: G clips per prompt.
        batch_size: clips at once; by default up to 64 on a CPU and 256 on a GPU, fewer when their caches
            would take too much memory. Halved when memory runs out.
        rollout_backend: "fast", or "transformers" for stock `generate` (same clips, slowly).
        negative_prompt: text in the place of the null prompt (only with guidance).
        sample_ids: which clip of the run each row is [N]; 0 … N − 1 by default.
        return_logps: record log-probabilities.
        decode: also make waveforms.
        weights: a snapshot to sample from, for the fast backend; taken now by default. Between calls that share
            one, a GPU also keeps its graphs.
        dtype: of a snapshot taken now, the model's by default; bfloat16 is faster where the hardware has it, but
            rounds differently in batches of different size, so that a clip may depend on its batch.
        prefix: codes that the clips begin with [N, K, Tp], of this or another model with the same codec; what
            follows is sampled, and what is −1.
        student_guidance: γ that the model is told, of a student that was trained for a range of them; by default
            it plays its reference γ. One row per clip, whatever it is.

    Returns:
        N = P·G clips on the model's device, those of one prompt adjacent.

    Raises:
        ValueError: a prompt, number, length or backend that cannot work; nothing has been computed then.
        FloatingPointError: logits that are not finite; names prompt and step.
        torch.OutOfMemoryError: not even one clip fits.
    """
    prompts = listed(prompts)
    settings = SamplingSettings(guidance_scale, temperature, top_k, top_p, min_p, adaptive_guidance)
    if not isinstance(weights, RolloutWeights | None):
        raise ValueError(
            f"weights={weights!r} must be what RolloutWeights.from_model(model) returns, or None"
        )
    _check_dtype(dtype)
    if isinstance(model, str | os.PathLike):
        from diverse_cfg.policies.loading import load_policy, load_processor

        processor = load_processor(model) if processor is None else processor
        model = load_policy(model)
    elif processor is None:
        raise ValueError(
            "fast_generate needs processor=: what load_processor(folder) returns, or a tokenizer"
        )
    check_request(
        model,
        processor,
        prompts,
        num_frames,
        settings,
        num_generations=num_generations,
        batch_size=batch_size,
        rollout_backend=rollout_backend,
        negative_prompt=negative_prompt,
        dtype=dtype,
    )
    _check_weights(model, weights, dtype)
    if student_guidance is not None:
        as_policy(model).require_guidance(student_guidance)
    if getattr(unwrap(model), "is_distilled", False):
        warn_if_guided(settings.strongest, stacklevel=3)
    texts = [prompt for prompt in prompts for _ in range(num_generations)]
    global_state = torch.Generator()
    global_state.set_state(torch.get_rng_state())
    # The caller's autocast must not reach in: dtypes are those of the model and of the rollout's weights.
    with torch.autocast(unwrap(model).device.type, enabled=False):
        avoided = [] if negative_prompt is None else [negative_prompt]
        encoded = encode_text(model, processor, prompts + avoided).told(student_guidance)
        clips = sample_codes(
            model,
            encoded.select(slice(0, len(prompts))).repeat_interleave(num_generations),
            num_frames,
            **asdict(settings),
            seed=int(torch.randint(2**62, (), generator=global_state)) if seed is None else seed,
            sample_ids=sample_ids,
            return_logps=return_logps,
            negative_condition=encoded.select([-1] * len(texts)) if avoided else None,
            batch_size=batch_size,
            rollout_backend=rollout_backend,
            names=[f"prompt {prompt!r}" for prompt in texts],
            weights=weights,
            dtype=dtype,
            prefix=prefix,
        )
        waveforms = decode_codes(model, clips.codes) if decode else None
    if seed is None:  # only now: a call that fails leaves the global state as it was
        torch.set_rng_state(global_state.get_state())
    return replace(clips, waveforms=waveforms, prompts=texts)


def sample_codes(
    model: nn.Module,
    condition: TextCondition,
    num_frames: int,
    *,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    return_logps: bool = False,
    negative_condition: TextCondition | None = None,
    batch_size: int | None = None,
    rollout_backend: str = "fast",
    names: Sequence[str] | None = None,
    weights: RolloutWeights | None = None,
    dtype: torch.dtype | None = None,
    prefix: Tensor | None = None,
    **sampling: Any,
) -> Clips:
    """Sample one clip of codes per row of `condition`.

    The model is only read; its mode, gradients and the global random state stay as they were.

    Args:
        model: the policy, also inside a `PeftModel`, whose active adapters count.
        condition: N rows; repeat a prompt's row for several clips of it. Null rows sample without a prompt.
        num_frames: T.
        seed: of the run.
        sample_ids: which clip of the run each row is [N]; 0 … N − 1 by default. A trainer keeps counting over
            steps and processes. Rows with the same seed and id share their random numbers.
        return_logps: record the log-probability of every code under the distribution it was drawn from.
        negative_condition: N rows in the place of the null prompt.
        batch_size: see `fast_generate`.
        rollout_backend: see `fast_generate`; stock `generate` computes in the caller's autocast, if any.
        names: what an error calls each row [N], such as its prompt.
        weights: a snapshot to sample from; refresh it when the model has changed.
        dtype: of a snapshot taken now.
        prefix: see `fast_generate`; only for the fast backend, and without `return_logps`.
        sampling: `SamplingSettings` by name.

    Returns:
        Clips without waveforms.

    Raises:
        ValueError: no rows, settings out of range, an unknown backend, or more frames than the model can play.
        FloatingPointError: logits that are not finite; names row and step.
        torch.OutOfMemoryError: not even one clip fits.
    """
    settings = SamplingSettings(**sampling)
    _check_clips(model, num_frames, settings, rollout_backend)
    if prefix is not None:
        _check_prefix(model, prefix, len(condition), num_frames, return_logps, rollout_backend)
    if len(condition) == 0:
        raise ValueError("the condition has no rows: there is nothing to sample")
    if negative_condition is not None:
        if len(negative_condition) != len(condition):
            raise ValueError(f"{len(negative_condition)} negative conditions for {len(condition)} clips")
        if not settings.guided:
            raise ValueError("negative_condition needs guidance: set guidance_scale above 1")
    _check_counts(batch_size=batch_size)
    _check_weights(model, weights, dtype)
    if condition.guidance is not None:
        for scale in condition.guidance.aminmax():
            as_policy(model).require_guidance(scale.item())
    sample_ids = range(len(condition)) if sample_ids is None else sample_ids
    names = names or [f"row {row} of the condition" for row in range(len(condition))]
    for kind, given in (("sample_ids", sample_ids), ("names", names)):
        if len(given) != len(condition):
            raise ValueError(f"{len(given)} {kind} for {len(condition)} clips")
    for sample_id in sample_ids:
        require_64_bits("sample id", sample_id)
    require_64_bits("seed", seed)
    snapshot = None
    if rollout_backend == "fast":
        snapshot = weights or RolloutWeights.from_model(model, dtype)
    elif negative_condition is not None:  # stock `generate` wants texts of one length
        longest = max(c.attention_mask.shape[1] for c in (condition, negative_condition))
        condition, negative_condition = condition.pad(longest), negative_condition.pad(longest)
    policy = unwrap(model)
    size = policy.decoder.config.num_codebooks, num_frames, policy.decoder.config.vocab_size

    num_steps = num_decoder_steps(num_frames, delays(model))

    def sample(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        avoided = None if negative_condition is None else negative_condition.select(rows)
        text = condition.select(rows)
        noise = keyed_noise(seed, sample_ids[rows], *size).to(policy.device)
        if snapshot is None:
            played = generate_codes(model, text, num_frames, settings, noise, avoided, names[rows])
            return *played, torch.full((len(text),), num_steps * (1 + settings.guided))
        begun = None if prefix is None else prefix[rows].to(snapshot.device)
        return _sample(snapshot, text, num_frames, settings, noise, avoided, names[rows], begun)

    codes, logps, rows = _batched(model, snapshot, len(condition), num_frames, settings, batch_size, sample)
    if snapshot is not None and weights is None:
        snapshot.loops.clear()  # nobody will use its graphs again
    rate = policy.config.audio_encoder.sampling_rate
    return Clips(
        codes,
        rate,
        logps if return_logps else None,
        condition=condition,
        decoder_rows=rows,
    )


@torch.no_grad()
def decode_codes(model: nn.Module, codes: Tensor, *, batch_size: int | None = None) -> Tensor:
    """Turn codes into audio with the policy's codec.

    Args:
        model: the policy.
        codes: [N, K, T]; stereo has left and right codebooks in turn.
        batch_size: clips at once, halved when memory runs out; by default 16, and on a CPU as few as its caches
            hold.

    Returns:
        Waveforms in float32 on the codec's device, mono [N, L], stereo [N, 2, L].

    Raises:
        ValueError: codes of another shape, or that the codec does not have.
        FloatingPointError: audio that is not finite.
    """
    policy = unwrap(model)
    config, codec = policy.decoder.config, policy.audio_encoder
    if codes.ndim != 3 or codes.shape[1] != config.num_codebooks or 0 in codes.shape:
        raise ValueError(f"codes must have shape [N, {config.num_codebooks}, T], got {tuple(codes.shape)}")
    if batch_size is None:
        batch_size = max(1, _CPU_FRAMES // codes.shape[-1]) if codec.device.type == "cpu" else 16
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    low, high = int(codes.min()), int(codes.max())
    if low < 0 or high >= codec.config.codebook_size:
        raise ValueError(
            f"codes must lie in 0 … {codec.config.codebook_size - 1}, got {low} … {high}: special tokens "
            "and cells of the delay pattern are no codes"
        )
    codes = codes.to(codec.device)
    stereo = config.audio_channels == 2

    def decode(rows: slice) -> Tensor:
        channels = (codes[rows, 0::2], codes[rows, 1::2]) if stereo else (codes[rows],)
        audio = [codec.decode(channel[None], [None]).audio_values.float() for channel in channels]
        return torch.cat(audio, dim=1) if stereo else audio[0][:, 0]

    with torch.autocast(codec.device.type, enabled=False):
        waveforms = torch.cat(in_batches(len(codes), batch_size, decode))
    if not torch.isfinite(waveforms).all():
        raise FloatingPointError(
            "the codec's audio is not finite: its weights (audio_encoder) are broken; copy, download or save the model "
            "again"
        )
    return waveforms


def check_request(
    model: nn.Module,
    processor: Any,
    prompts: Sequence[str],
    num_frames: int,
    settings: SamplingSettings,
    *,
    num_generations: int = 1,
    batch_size: int | None = None,
    rollout_backend: str = "fast",
    negative_prompt: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Raise what `fast_generate` would raise for these arguments, before anything is computed or written."""
    require_prompts(prompts, processor)
    _check_clips(model, num_frames, settings, rollout_backend)
    _check_counts(num_generations=num_generations, batch_size=batch_size)
    _check_dtype(dtype)
    own = unwrap(model).decoder.dtype
    if rollout_backend == "transformers" and dtype not in (None, own):
        raise ValueError(f"dtype={dtype} needs rollout_backend='fast': stock generate computes in {own}")
    if negative_prompt is not None:
        require_prompts([negative_prompt], processor, "negative_prompt: ")
        if not settings.guided:
            raise ValueError(
                f"negative_prompt={negative_prompt!r} needs guidance: set guidance_scale above 1"
            )


def check_backend(rollout_backend: str) -> None:
    """Raise `ValueError` for a backend that does not exist."""
    if rollout_backend not in ROLLOUT_BACKENDS:
        raise ValueError(f"rollout_backend={rollout_backend!r} must be one of {', '.join(ROLLOUT_BACKENDS)}")


def _batched(
    model: nn.Module,
    weights: RolloutWeights | None,
    num_clips: int,
    num_frames: int,
    settings: SamplingSettings,
    batch_size: int | None,
    sample: Callable[[slice], tuple[Tensor, Tensor, Tensor]],
) -> tuple[Tensor, Tensor, Tensor]:
    """All clips, in batches of the size that was asked for, or that fits and has fitted before."""
    sizes = {} if weights is None else weights.batch_sizes
    key = (num_frames, settings.guided, batch_size)
    if key not in sizes:
        dtype = unwrap(model).decoder.dtype if weights is None else weights.dtype
        sizes[key] = batch_size or automatic_batch(model, num_frames, settings.guided, dtype)
    batches = in_batches(num_clips, sizes[key], sample, lambda size: sizes.update({key: size}))
    codes, logps, rows = zip(*batches, strict=True)
    if weights is not None:
        nbytes = sum(loop.nbytes for loop in weights.loops.values())
        if not may_be_kept(nbytes, weights.device):
            weights.loops.clear()
    return torch.cat(codes), torch.cat(logps), torch.cat(rows)


@torch.no_grad()
def _sample(
    weights: RolloutWeights,
    condition: TextCondition,
    num_frames: int,
    settings: SamplingSettings,
    noise: Tensor,
    negative: TextCondition | None,
    names: Sequence[str],
    prefix: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One batch through the loop: codes and log-probabilities [N, K, T], and what each clip took [N]."""
    num_clips = len(condition)
    # The caller's autocast must not reach in: the dtype of the rollout is that of its weights.
    with torch.autocast(weights.device.type, enabled=False):
        try:
            loop = _loop_for(weights, condition, negative, num_frames, settings, prefix is not None)
            rows = _rows_for(loop, num_clips)
            prefix = None if prefix is None else prefix[rows]
            loop.run(noise if loop.num_clips == num_clips else noise[rows], prefix)
        except BaseException:
            weights.loops.clear()  # of no use half-captured, and a smaller batch needs the memory
            raise
    unusable = ~torch.isfinite(loop.totals[:, :num_clips])
    if unusable.any():
        step, clip, _ = unusable.nonzero()[0].tolist()
        raise FloatingPointError(not_finite(names[clip], step))
    codes, logps = (
        revert_delay_pattern(grid[:, :num_clips].permute(1, 2, 0), num_frames, weights.shape.delays)
        for grid in (loop.codes, loop.logps)
    )
    return codes, logps, loop.decoder_rows[:num_clips].cpu()


def _loop_for(
    weights: RolloutWeights,
    condition: TextCondition,
    negative: TextCondition | None,
    num_frames: int,
    settings: SamplingSettings,
    prefixed: bool,
) -> DecodeLoop:
    """A loop for this batch; a GPU keeps the last one with its graphs.

    It serves again for any text that is not longer, and for batches down to half its size (the last one of a call
    is often a little smaller): rows without a clip repeat the first.
    """
    num_clips, mode = len(condition), default_mode(weights.device)
    if mode == "eager":
        return DecodeLoop(weights, condition.cat(negative), num_clips, num_frames, settings, mode, prefixed)
    key = (negative is not None, num_frames, settings, prefixed)
    loop = weights.loops.get(key)
    num_tokens = max(text.attention_mask.shape[1] for text in (condition, negative) if text is not None)
    if loop is not None and num_clips <= loop.num_clips < 2 * num_clips and num_tokens <= loop.num_tokens:
        rows = _rows_for(loop, num_clips)
        texts = condition.select(rows).cat(None if negative is None else negative.select(rows))
        loop.reset(texts.pad(loop.num_tokens))
        return loop
    del loop
    weights.loops.clear()  # two sets of caches would not fit where one just does
    texts = condition.cat(negative).pad(num_tokens + -num_tokens % _TEXT_BUCKET)
    weights.loops[key] = DecodeLoop(weights, texts, num_clips, num_frames, settings, mode, prefixed)
    return weights.loops[key]


def _rows_for(loop: DecodeLoop, num_clips: int) -> list[int]:
    """Which of `num_clips` clips each row of the loop plays."""
    return [*range(num_clips), *[0] * (loop.num_clips - num_clips)]


def _check_dtype(dtype: torch.dtype | None) -> None:
    if dtype is not None:
        require_float("dtype", dtype)


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"{name}={value} must be an integer of at least 1")


def _check_weights(model: nn.Module, weights: RolloutWeights | None, dtype: torch.dtype | None) -> None:
    if weights is None:
        return
    weights.require_fits(model)
    if dtype not in (None, weights.dtype):
        raise ValueError(f"dtype={dtype} has no effect on weights that are {weights.dtype}: leave it out")


def _check_prefix(
    model: nn.Module,
    prefix: Tensor,
    num_clips: int,
    num_frames: int,
    return_logps: bool,
    rollout_backend: str,
) -> None:
    config = unwrap(model).decoder.config
    if prefix.ndim != 3 or prefix.shape[:2] != (num_clips, config.num_codebooks):
        raise ValueError(
            f"prefix must be codes [{num_clips}, {config.num_codebooks}, Tp] of the clips, got {tuple(prefix.shape)}"
        )
    if not 0 < prefix.shape[-1] < num_frames:
        raise ValueError(f"prefix has {prefix.shape[-1]} frames, the clips {num_frames}: it must be shorter")
    if prefix.is_floating_point() or not -1 <= int(prefix.min()) <= int(prefix.max()) < config.vocab_size:
        raise ValueError(f"prefix must hold codes from 0 to {config.vocab_size - 1}: is it of another codec?")
    if return_logps or rollout_backend != "fast":
        raise ValueError("prefix needs rollout_backend='fast', and no return_logps: nobody drew its codes")


def _check_clips(model: nn.Module, num_frames: int, settings: SamplingSettings, rollout_backend: str) -> None:
    """Raise for clips that the model is too short for, and for a schedule of γ that does not fit them."""
    check_backend(rollout_backend)
    _check_counts(num_frames=num_frames)
    config = unwrap(model).decoder.config
    num_steps = num_decoder_steps(num_frames, delays(model))
    seconds = num_frames / frame_rate(model)
    if seconds > MAX_SECONDS:
        raise ValueError(
            f"num_frames={num_frames} is {seconds:.1f} s; MusicGen plays at most {MAX_SECONDS} s at once, "
            f"longer music takes `extend`: ask for at most {int(MAX_SECONDS * frame_rate(model))} frames"
        )
    if num_steps > config.max_position_embeddings:
        raise ValueError(
            f"num_frames={num_frames} needs {num_steps} positions of {config.max_position_embeddings}: ask "
            f"for at most {num_frames - num_steps + config.max_position_embeddings} frames"
        )
    scales = settings.guidance_scale
    if isinstance(scales, tuple) and len(scales) != num_frames:
        raise ValueError(
            f"guidance_scale has {len(scales)} numbers, one per frame, but the clips have {num_frames} frames"
        )
    if settings.adaptive_guidance is not None and rollout_backend != "fast":
        raise ValueError(f"adaptive_guidance needs rollout_backend='fast', not {rollout_backend!r}")
    if isinstance(scales, tuple) and rollout_backend != "fast":
        raise ValueError(
            f"a schedule of guidance_scale needs rollout_backend='fast': rollout_backend={rollout_backend!r} has one γ"
        )
