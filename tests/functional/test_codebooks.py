"""The delay pattern, against loops and against transformers."""

from types import SimpleNamespace

import pytest
import torch

from diverse_cfg.functional.codebooks import (
    INVALID_CODE,
    apply_delay_pattern,
    num_decoder_steps,
    revert_delay_pattern,
    valid_cells,
)
from diverse_cfg.policies.musicgen.model import codebook_delays
from tests import oracles

MONO, STEREO = codebook_delays(4), codebook_delays(8, 2)
LAYOUTS = pytest.mark.parametrize("delays", [MONO, STEREO])
PAD = 2048


def test_delays_are_the_published_ones():
    """Catches stereo delayed like eight mono codebooks, and a step count that is off by one."""
    assert MONO == (0, 1, 2, 3)
    assert STEREO == (0, 0, 1, 1, 2, 2, 3, 3)
    assert num_decoder_steps(500, MONO) == 503  # 10 s of MusicGen
    assert num_decoder_steps(500, STEREO) == 503


@LAYOUTS
@pytest.mark.parametrize("num_frames", [1, 2, 9])
def test_apply_matches_the_loop(delays, num_frames):
    """Catches any cell in the wrong place, also for clips shorter than the delays."""
    codes = torch.randint(PAD, (3, len(delays), num_frames))
    grid = apply_delay_pattern(codes, PAD, delays)
    expected = [oracles.delayed_grid(row, PAD, delays == STEREO) for row in codes.tolist()]
    assert grid.tolist() == expected
    assert grid.shape[-1] == num_decoder_steps(num_frames, delays) + 1


@LAYOUTS
def test_apply_matches_transformers(delays):
    """Catches a pattern that agrees with our reading of the paper but not with the decoder that runs it."""
    from transformers import MusicgenForCausalLM

    num_frames, num_codebooks = 11, len(delays)
    codes = torch.randint(PAD, (2, num_codebooks, num_frames))
    grid = apply_delay_pattern(codes, PAD, delays)
    channels = 2 if delays == STEREO else 1
    decoder = SimpleNamespace(num_codebooks=num_codebooks, config=SimpleNamespace(audio_channels=channels))
    prompt = torch.cat([torch.full((2, num_codebooks, 1), PAD), codes], dim=-1).flatten(0, 1)
    _, theirs = MusicgenForCausalLM.build_delay_pattern_mask(decoder, prompt, PAD, max_length=grid.shape[-1])
    assert torch.equal(grid.flatten(0, 1), theirs)


@LAYOUTS
def test_revert_undoes_apply(delays):
    """Catches a revert that is shifted against apply, for codes, values per code and logits."""
    codes = torch.randint(PAD, (2, len(delays), 7))
    grid = apply_delay_pattern(codes, PAD, delays)
    assert torch.equal(revert_delay_pattern(grid[..., 1:], 7, delays), codes)
    values = torch.randn(2, len(delays), 7)
    on_grid = apply_delay_pattern(values, None, delays)[..., 1:]
    assert torch.equal(revert_delay_pattern(on_grid, 7, delays), values)
    logits = on_grid[..., None] * torch.tensor([1.0, -2.0, 3.0])
    assert torch.equal(
        revert_delay_pattern(logits, 7, delays), values[..., None] * torch.tensor([1.0, -2.0, 3.0])
    )


@LAYOUTS
def test_cells_without_a_code_are_poisoned(delays):
    """Catches zeros (or a valid code) in cells that nothing may read."""
    mask = valid_cells(5, delays)
    values = apply_delay_pattern(torch.randn(2, len(delays), 5), None, delays)
    assert torch.equal(values[..., 1:].isnan(), ~mask.expand(2, -1, -1))
    codes = apply_delay_pattern(torch.randint(9, (2, len(delays), 5)), None, delays)
    assert torch.equal(codes[..., 1:] == INVALID_CODE, ~mask.expand(2, -1, -1))
    assert bool((codes[..., 0] == INVALID_CODE).all()) and bool(values[..., 0].isnan().all())
    assert int(mask.sum()) == len(delays) * 5
    assert int((~mask).sum()) == len(delays) * 3  # 12 of 4 · (T + 3) in mono
    with pytest.raises(IndexError):
        torch.nn.Embedding(9, 2)(codes)


def test_unfinished_decoding_is_poisoned():
    """Catches an unfinished clip whose last codes look real."""
    codes = torch.randint(9, (1, 4, 5))
    partial = apply_delay_pattern(codes, 9, MONO)[..., 1:7]  # 6 of 8 steps
    assert revert_delay_pattern(partial, 5, MONO)[0, :, -1].tolist() == [*codes[0, :2, -1].tolist(), -1, -1]
    logits = torch.randn(1, 4, 6, 3)
    missing = revert_delay_pattern(logits, 5, MONO).isnan().all(dim=-1)
    assert missing[0].tolist() == [[False] * 5, [False] * 5, [False] * 4 + [True], [False] * 3 + [True] * 2]


def test_gradient_reaches_real_cells_only():
    """Catches a gradient into the junk outputs of the decoder."""
    logits = torch.randn(1, 4, 6, 2, requires_grad=True)
    revert_delay_pattern(logits, 3, MONO).sum().backward()
    assert torch.equal(logits.grad[0].sum(-1) > 0, valid_cells(3, MONO))


def test_bad_input_is_named():
    """Catches a start column that was left on, float padding, and layouts that do not exist."""
    with pytest.raises(ValueError, match=r"9 decoder steps are more than the 8 .* drop the start column"):
        revert_delay_pattern(torch.zeros(1, 4, 9), 5, MONO)
    with pytest.raises(ValueError, match="pad_token_id=2048 is for integers"):
        apply_delay_pattern(torch.zeros(1, 4, 5), PAD, MONO)
    with pytest.raises(ValueError, match=r"\[N, K, T\], got \(4, 5\)"):
        apply_delay_pattern(torch.zeros(4, 5, dtype=torch.long), PAD, MONO)
    with pytest.raises(ValueError, match=r"\[N, K, S\] or \[N, K, S, V\], got \(4, 5\)"):
        revert_delay_pattern(torch.zeros(4, 5), 2, MONO)
    with pytest.raises(ValueError, match="audio_channels must be 1 or 2, got 3"):
        codebook_delays(6, 3)
    with pytest.raises(ValueError, match="num_codebooks=5 does not fit audio_channels=2"):
        codebook_delays(5, 2)
    with pytest.raises(ValueError, match="4 codebooks need one delay each"):
        apply_delay_pattern(torch.zeros(1, 4, 5, dtype=torch.long), PAD, STEREO)
    with pytest.raises(ValueError, match=r"steps ≥ 0 per codebook, got \(0, -1\)"):
        num_decoder_steps(3, (0, -1))
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        num_decoder_steps(0, MONO)
