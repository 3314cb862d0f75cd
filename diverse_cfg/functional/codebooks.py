"""MusicGen's delay pattern: between the codes of a clip and the steps of its decoder.

Codebook k is decoded d_k steps late, so that the codes of one frame see each other (arXiv 2306.05284).
Mono, K = 4, T = 3 frames (d = 0, 1, 2, 3). `#` is the start column, `.` a cell that holds no code:

    input position   0   1   2   3   4   5   6        decoder step s    0   1   2   3   4   5
    codebook 0       #  a0  a1  a2   .   .   .        codebook 0       a0  a1  a2   .   .   .
    codebook 1       #   .  b0  b1  b2   .   .        codebook 1        .  b0  b1  b2   .   .
    codebook 2       #   .   .  c0  c1  c2   .        codebook 2        .   .  c0  c1  c2   .
    codebook 3       #   .   .   .  d0  d1  d2        codebook 3        .   .   .  d0  d1  d2

Left: what `apply_delay_pattern` returns, S + 1 columns; `#` and `.` are the padding token. The decoder reads
the first S of them, and its output at step s predicts column s + 1. Right: those S = T + max(d) outputs; the
code of frame t and codebook k is predicted at step t + d_k. The other K·max(d) cells are junk: they are
dropped or poisoned, and never zeroed, so that an off-by-one fails loudly.

Stereo has K = 8 and the pairs (left, right) share a delay: d = 0, 0, 1, 1, 2, 2, 3, 3 and S = T + K/2 − 1.
"""

import torch
from torch import Tensor

INVALID_CODE = -1
"""Stands in integer grids where there is no code: every embedding table and `gather` rejects it."""


def codebook_delays(num_codebooks: int, audio_channels: int = 1) -> list[int]:
    """Delay of each codebook in decoder steps, d_k = k (mono) or k // 2 (stereo).

    Args:
        num_codebooks: K, over both channels for stereo.
        audio_channels: 1 or 2.

    Returns:
        K delays.

    Raises:
        ValueError: other channel counts, or an odd K for stereo.
    """
    if audio_channels not in (1, 2):
        raise ValueError(f"audio_channels must be 1 or 2, got {audio_channels}")
    if num_codebooks < 1 or num_codebooks % audio_channels:
        raise ValueError(
            f"num_codebooks={num_codebooks} does not fit audio_channels={audio_channels}: "
            "stereo has one codebook per channel in every pair"
        )
    return [codebook // audio_channels for codebook in range(num_codebooks)]


def num_decoder_steps(num_frames: int, num_codebooks: int, audio_channels: int = 1) -> int:
    """Decoder steps S that `num_frames` frames take: T + K − 1 (mono) or T + K/2 − 1 (stereo).

    Args:
        num_frames: T.
        num_codebooks: K.
        audio_channels: 1 or 2.

    Returns:
        S; `generate` calls it `max_new_tokens`.

    Raises:
        ValueError: T < 1, or K and channels do not fit.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return num_frames + max(codebook_delays(num_codebooks, audio_channels))


def valid_cells(num_frames: int, num_codebooks: int, audio_channels: int = 1, device=None) -> Tensor:
    """Which cells of the decoder's grid hold a code.

    Args:
        num_frames: T.
        num_codebooks: K.
        audio_channels: 1 or 2.
        device: where to put the mask.

    Returns:
        Boolean mask [K, S]; K·T cells are true.

    Raises:
        ValueError: T < 1, or K and channels do not fit.
    """
    num_steps = num_decoder_steps(num_frames, num_codebooks, audio_channels)
    delays = torch.tensor(codebook_delays(num_codebooks, audio_channels), device=device)[:, None]
    frame = torch.arange(num_steps, device=device) - delays
    return (frame >= 0) & (frame < num_frames)


def apply_delay_pattern(codes: Tensor, pad_token_id: int | None, audio_channels: int = 1) -> Tensor:
    """Write codes, or values of codes, onto the decoder's grid, start column included.

        out[n, k, 1 + t + d_k] = codes[n, k, t]

    Args:
        codes: [N, K, T]. Integers, or floats such as advantages.
        pad_token_id: what the start column and the cells without a code hold in decoder input ids. None
            poisons them instead: NaN for floats, `INVALID_CODE` for integers.
        audio_channels: 1 or 2 (pairs of codebooks share a delay).

    Returns:
        [N, K, S + 1], in the dtype of `codes`. The decoder's inputs are `[..., :-1]`, its targets `[...,
        1:]`.

    Raises:
        ValueError: wrong number of dimensions, no frames, K and channels do not fit, or a padding token for
            floats.
    """
    if codes.ndim != 3:
        raise ValueError(f"codes must have shape [N, K, T], got {tuple(codes.shape)}")
    if codes.is_floating_point() and pad_token_id is not None:
        raise ValueError(
            f"pad_token_id={pad_token_id} is for integers, got {codes.dtype}: pass None, which poisons"
        )
    num_rows, num_codebooks, num_frames = codes.shape
    num_steps = num_decoder_steps(num_frames, num_codebooks, audio_channels)
    fill = _poison(codes) if pad_token_id is None else pad_token_id
    grid = codes.new_full((num_rows, num_codebooks, num_steps + 1), fill)
    for codebook, delay in enumerate(codebook_delays(num_codebooks, audio_channels)):
        grid[:, codebook, 1 + delay : 1 + delay + num_frames] = codes[:, codebook]
    return grid


def revert_delay_pattern(values: Tensor, num_frames: int, audio_channels: int = 1) -> Tensor:
    """Read codes, logits or any value per code off the decoder's grid.

        out[n, k, t] = values[n, k, t + d_k]

    Args:
        values: [N, K, S] or [N, K, S, V], outputs of the S decoder steps (no start column).
        num_frames: T. When the decoder has not finished, so that S is smaller than `num_decoder_steps`, the
            codes that are not there yet come back poisoned: NaN for floats, `INVALID_CODE` for integers.
        audio_channels: 1 or 2.

    Returns:
        [N, K, T] or [N, K, T, V]; gradients flow.

    Raises:
        ValueError: wrong number of dimensions, K and channels do not fit, or more steps than T frames take.
    """
    if values.ndim not in (3, 4):
        raise ValueError(f"values must have shape [N, K, S] or [N, K, S, V], got {tuple(values.shape)}")
    num_codebooks, steps = values.shape[1:3]
    expected = num_decoder_steps(num_frames, num_codebooks, audio_channels)
    if steps > expected:
        raise ValueError(
            f"{steps} decoder steps are more than the {expected} that {num_frames} frames of {num_codebooks} "
            f"codebooks take (audio_channels={audio_channels}): drop the start column, or fix num_frames"
        )
    if steps < expected:
        missing = values.new_full((*values.shape[:2], expected - steps, *values.shape[3:]), _poison(values))
        values = torch.cat([values, missing], dim=2)
    delays = codebook_delays(num_codebooks, audio_channels)
    return torch.stack([values[:, k, delay : delay + num_frames] for k, delay in enumerate(delays)], dim=1)


def _poison(values: Tensor) -> float | int:
    return float("nan") if values.is_floating_point() else INVALID_CODE
