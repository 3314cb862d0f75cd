"""Takes: what is shown, written and kept of a clip."""

import json
from dataclasses import replace

import numpy as np
import pytest
import soundfile
import torch

from diverse_cfg.acoustics import piano_roll
from diverse_cfg.playing.takes import Take, keep, kept, looks, places, volume, write_take
from diverse_cfg.policies.takes import read_codes
from tests.faults import largest_file
from tests.tiny import tiny_musicgen

RATE = 16_000


def tone(hertz, seconds=1.0):
    return torch.sin(2 * torch.pi * hertz * torch.arange(int(RATE * seconds)) / RATE) * 0.5


def take(id="0a1b2c3d", **changes):
    made = Take(
        id, "a “calm” piano", "λ = 0.5", 7, 2, {"temperature": 1.0, "merge_weight": 0.5}, RATE, 1.0,
        [[1, 2], [3, 4]], [1.0, 0.0], "encoder", 0.5, looks(tone(440), RATE),
    )  # fmt: skip
    return replace(made, **changes)


@pytest.mark.parametrize("note", [36, 60, 69, 93])
def test_a_tone_is_one_row_of_its_roll(note):
    """Catches rows that are not semitones, are upside down, or begin at another note than C2 (36)."""
    roll = piano_roll(tone(440 * 2 ** ((note - 69) / 12)).numpy(), RATE)
    assert np.argmax(roll[:, 96]) == len(roll) - 1 - (note - 36)
    assert roll.min() >= 0 and roll.max() == 1
    assert not piano_roll(np.zeros(RATE), RATE).any()


def test_a_wav_file_says_how_it_was_made(tmp_path):
    """Catches metadata above libsndfile's 2 kB, which no reader shows: neither that text nor those after it."""
    for prompt in ("a “calm” piano", "é" * 5000, '"' * 3000):
        path = write_take(tmp_path, take(prompt=prompt), tone(440))
        with soundfile.SoundFile(path) as file:
            told = json.loads(file.comment)
            assert file.software.startswith("diverse-cfg")
        assert told.pop("prompt").rstrip("…") in prompt
        assert told == {"model": "λ = 0.5", "seed": 7, "take": 3, "temperature": 1.0, "merge_weight": 0.5}


def test_what_is_kept_is_found_again(tmp_path):
    """Catches a kept take that `generate --extend` cannot go on with, and files of others taken for takes."""
    audio, model = write_take(tmp_path, take(), tone(440)), tiny_musicgen()
    folder = tmp_path / "kept"
    folder.mkdir()
    assert kept(folder) == []
    path = keep(folder, take(), audio, model)
    assert path.read_bytes() == audio.read_bytes()
    soundfile.write(folder / "somebody's.wav", np.zeros(9), RATE)
    assert kept(folder) == [take()]
    codes, facts = read_codes(path)
    assert codes.tolist() == take().codes and facts["prompt"] == take().prompt
    path.with_suffix(".safetensors").write_text("{")
    with pytest.raises(ValueError, match="move this file away"):
        kept(folder)


def test_a_full_disk_keeps_nothing_half(tmp_path):
    audio = write_take(tmp_path, take(), tone(440))
    folder = tmp_path / "kept"
    folder.mkdir()
    with largest_file(1000), pytest.raises(OSError, match="cannot be written"):
        keep(folder, take(), audio, tiny_musicgen())
    assert kept(folder) == []


def test_the_map_keeps_distances():
    """Two axes hold all of four points on a great circle: √(2·d) is the distance between them."""
    angles = torch.tensor([0.0, 0.3, 0.9, 1.4]).double()
    points = torch.stack([angles.cos(), angles.sin(), 0 * angles], 1)
    takes = [take(str(index), embedding=(3 * point).tolist()) for index, point in enumerate(points)]
    at = places([*takes, take("elsewhere", encoder="another")], "encoder")
    assert set(at) == {"0", "1", "2", "3"}
    for i in range(4):
        for j in range(4):
            d = 1 - float(points[i] @ points[j])
            assert np.hypot(*(np.array(at[str(i)]) - at[str(j)])) == pytest.approx((2 * d) ** 0.5, abs=1e-3)
    assert at["0"][0] >= 0
    assert places([], "encoder") == {} and places([takes[0]], "encoder") == {"0": (0.0, 0.0)}


def test_loud_takes_are_turned_down_to_one_loudness():
    loud, quiet = tone(440), tone(440) * 0.5
    assert volume(loud, RATE) * 0.5 == pytest.approx(volume(quiet, RATE) * 0.25, abs=1e-3)
    assert volume(torch.zeros(RATE), RATE) == 1
