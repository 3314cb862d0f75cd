"""The delay pattern: between the codes of a clip and the steps of the decoder that samples them.

Codebook k is decoded d_k steps late, so that the codes of one frame see each other (arXiv 2306.05284).
`delays` is d, one number per codebook; a model without a pattern has (0,). For d = (0, 1, 2, 3), MusicGen's,
and T = 3 frames, with `#` for the start column and `.` for a cell that holds no code:

    input position   0   1   2   3   4   5   6        decoder step s    0   1   2   3   4   5
    codebook 0       #  a0  a1  a2   .   .   .        codebook 0       a0  a1  a2   .   .   .
    codebook 1       #   .  b0  b1  b2   .   .        codebook 1        .  b0  b1  b2   .   .
    codebook 2       #   .   .  c0  c1  c2   .        codebook 2        .   .  c0  c1  c2   .
    codebook 3       #   .   .   .  d0  d1  d2        codebook 3        .   .   .  d0  d1  d2

Left: what `apply_delay_pattern` returns, S + 1 columns; `#` and `.` are the padding token. The decoder reads
the first S of them, and its output at step s predicts column s + 1. Right: those S = T + max(d) outputs; the
code of frame t and codebook k is predicted at step t + d_k. The other K·max(d) cells are junk: they are
dropped or poisoned, and never zeroed, so that an off-by-one fails loudly.

In stereo the pairs (left, right) share a delay: d = (0, 0, 1, 1, 2, 2, 3, 3).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

INVALID_CODE = -1
"""Stands in integer grids where there is no code: every embedding table and `gather` rejects it."""


def num_decoder_steps(num_frames: int, delays: Sequence[int]) -> int:
    """Decoder steps that `num_frames` frames take, S = T + max(d).

    Args:
        num_frames: T.
        delays: d, one per codebook [K].

    Returns:
        S; `generate` calls it `max_new_tokens`.

    Raises:
        ValueError: T < 1, no delays, or a negative one.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    if not delays or min(delays) < 0:
        raise ValueError(f"delays must hold a number of steps ≥ 0 per codebook, got {tuple(delays)}")
    return num_frames + max(delays)


def valid_cells(num_frames: int, delays: Sequence[int], device=None) -> Tensor:
    """Which cells of the decoder's grid hold a code.

    Args:
        num_frames: T.
        delays: d, one per codebook [K].
        device: where to put the mask.

    Returns:
        Boolean mask [K, S]; K·T cells are true.

    Raises:
        ValueError: see `num_decoder_steps`.
    """
    steps = torch.arange(num_decoder_steps(num_frames, delays), device=device)
    frame = steps - torch.tensor(delays, device=device)[:, None]
    return (frame >= 0) & (frame < num_frames)


def apply_delay_pattern(codes: Tensor, pad_token_id: int | None, delays: Sequence[int]) -> Tensor:
    """Write codes, or values of codes, onto the decoder's grid, start column included.

        out[n, k, 1 + t + d_k] = codes[n, k, t]

    Args:
        codes: [N, K, T]. Integers, or floats such as advantages.
        pad_token_id: what the start column and the cells without a code hold in decoder input ids. None
            poisons them instead: NaN for floats, `INVALID_CODE` for integers.
        delays: d, one per codebook [K].

    Returns:
        [N, K, S + 1], in the dtype of `codes`. The decoder's inputs are `[..., :-1]`, its targets `[...,
        1:]`.

    Raises:
        ValueError: wrong number of dimensions, no frames, another number of delays than codebooks, or a
            padding token for floats.
    """
    if codes.ndim != 3:
        raise ValueError(f"codes must have shape [N, K, T], got {tuple(codes.shape)}")
    if codes.is_floating_point() and pad_token_id is not None:
        raise ValueError(
            f"pad_token_id={pad_token_id} is for integers, got {codes.dtype}: pass None, which poisons"
        )
    num_rows, num_codebooks, num_frames = codes.shape
    _require_one_per_codebook(delays, num_codebooks)
    num_steps = num_decoder_steps(num_frames, delays)
    fill = _poison(codes) if pad_token_id is None else pad_token_id
    grid = codes.new_full((num_rows, num_codebooks, num_steps + 1), fill)
    for codebook, delay in enumerate(delays):
        grid[:, codebook, 1 + delay : 1 + delay + num_frames] = codes[:, codebook]
    return grid


def revert_delay_pattern(values: Tensor, num_frames: int, delays: Sequence[int]) -> Tensor:
    """Read codes, logits or any value per code off the decoder's grid.

        out[n, k, t] = values[n, k, t + d_k]

    Args:
        values: [N, K, S] or [N, K, S, V], outputs of the S decoder steps (no start column).
        num_frames: T. When the decoder has not finished, so that S is smaller than `num_decoder_steps`, the
            codes that are not there yet come back poisoned: NaN for floats, `INVALID_CODE` for integers.
        delays: d, one per codebook [K].

    Returns:
        [N, K, T] or [N, K, T, V]; gradients flow.

    Raises:
        ValueError: wrong number of dimensions, another number of delays than codebooks, or more steps than T
            frames take.
    """
    if values.ndim not in (3, 4):
        raise ValueError(f"values must have shape [N, K, S] or [N, K, S, V], got {tuple(values.shape)}")
    num_codebooks, steps = values.shape[1:3]
    _require_one_per_codebook(delays, num_codebooks)
    expected = num_decoder_steps(num_frames, delays)
    if steps > expected:
        raise ValueError(
            f"{steps} decoder steps are more than the {expected} that {num_frames} frames take with delays="
            f"{tuple(delays)}: drop the start column, or fix num_frames"
        )
    if steps < expected:
        missing = values.new_full((*values.shape[:2], expected - steps, *values.shape[3:]), _poison(values))
        values = torch.cat([values, missing], dim=2)
    return torch.stack([values[:, k, delay : delay + num_frames] for k, delay in enumerate(delays)], dim=1)


def _require_one_per_codebook(delays: Sequence[int], num_codebooks: int) -> None:
    if len(delays) != num_codebooks:
        raise ValueError(f"{num_codebooks} codebooks need one delay each, got delays={tuple(delays)}")


def _poison(values: Tensor) -> float | int:
    return float("nan") if values.is_floating_point() else INVALID_CODE
