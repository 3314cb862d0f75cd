"""Rules without a network, on sounds whose truth is known; and the judge's interface."""

import math

import numpy as np
import pytest
import torch

from diverse_cfg.acoustics import validity
from diverse_cfg.assets import nano_path
from diverse_cfg.nano.attributes import KEYS, key_correlations, parse_prompt
from diverse_cfg.nano.judge import AttributeJudge
from diverse_cfg.nano.rules import classify, median_pitches, onset_counts, pitches, rule_adherence
from diverse_cfg.policies.loading import load_policy, load_processor
from diverse_cfg.policies.sampler.rollout import fast_generate

RATE = 16_000


def melody(midi, seconds=3.0, decay=6.0):
    """Plucked notes of equal length with four harmonics."""
    audio = np.zeros(int(seconds * RATE))
    length = len(audio) // len(midi)
    for index, pitch in enumerate(midi):
        time = np.arange(length) / RATE
        f = 440 * 2 ** ((pitch - 69) / 12)
        note = sum(np.sin(2 * np.pi * f * h * time) / h for h in range(1, 5)) * np.exp(-decay * time)
        audio[index * length : (index + 1) * length] = 0.2 * note * np.minimum(1, time * 400)
    return torch.from_numpy(audio).float()


@pytest.mark.parametrize("midi", [45, 57, 69, 84, 90])
def test_pitch_of_a_tone_within_ten_cents(midi):
    """Catches octave errors and a lag that is off by one."""
    found = pitches(melody([midi], decay=0.5)[None], RATE)
    cents = 1200 * np.log2(found[np.isfinite(found)] / (440 * 2 ** ((midi - 69) / 12)))
    assert np.isfinite(found).mean() > 0.8
    assert np.median(np.abs(cents)) < 10
    assert (np.abs(cents) < 50).mean() > 0.95


def test_noise_and_silence_have_no_pitch():
    noise = 0.1 * torch.randn(1, 2 * RATE, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(pitches(noise, RATE)).mean() < 0.05
    assert np.isnan(median_pitches(torch.zeros(1, RATE), RATE)).all()


@pytest.mark.parametrize("count", [3, 8, 15])
def test_onsets_are_counted(count):
    """Catches a doubled or missed first note."""
    scale = [60, 62, 64, 65, 67, 69, 71, 72]
    assert abs(onset_counts(melody([scale[i % 8] for i in range(count)])[None], RATE)[0] - count) <= 1


def test_key_and_classes_of_a_scale():
    """Catches a chroma whose C is another pitch class."""
    for shift, key in ((0, "C major"), (2, "D major"), (8, "A flat major")):
        notes = [60, 64, 67, 72, 71, 69, 67, 65, 64, 62, 60, 67, 60, 64]
        found = classify(melody([n + shift for n in notes])[None], RATE)
        assert tuple(KEYS)[found["key"][0]] == key
        assert found["tempo"][0] == 2  # fast: 14 notes in three seconds


def test_key_correlations_equal_numpy_corrcoef():
    weights = np.random.default_rng(0).random(12)
    major = np.array([6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88])
    want = [np.corrcoef(np.roll(major, k), weights)[0, 1] for k in range(12)]
    assert np.allclose(key_correlations(weights)[:12], want)


def test_prompts_name_their_attributes():
    """Catches "low" found in "slow", and a minor key read as major."""
    named = parse_prompt("a slow melody in F sharp minor on an organ")
    assert named == {"instrument": "organ", "tempo": "slow", "key": "F sharp minor"}
    assert parse_prompt("lo-fi beats to relax to") == {}


def test_adherence_is_nan_where_the_prompt_is_silent():
    clip = melody([60, 64, 67, 72, 71, 69, 67, 65, 64, 62, 60, 67, 60, 64])
    scores = rule_adherence(clip.repeat(2, 1), RATE, ["a fast melody in C major", "a piano"])
    assert scores["tempo"][0] == 1.0
    assert scores["key"][0] == 1.0
    assert scores["mean"][0] == 1.0
    assert np.isnan(scores["register"][0])
    assert np.isnan(scores["mean"][1])
    with pytest.raises(ValueError, match="one prompt per clip"):
        rule_adherence(clip[None], RATE, ["a", "b"])


def test_broken_audio_is_not_valid():
    """Catches a validity that silence, noise, clipping, a constant or NaN passes."""
    good = melody([60, 64, 67])
    noise = 0.1 * torch.randn(len(good), generator=torch.Generator().manual_seed(0))
    broken = [
        torch.zeros_like(good),
        noise,
        (40 * good).clamp(-1, 1),
        good * 1e-4,
        torch.full_like(good, torch.nan),
    ]
    report = validity(torch.stack([good, *broken]), RATE)
    assert report["valid"].tolist() == [True] + [False] * 5
    assert report["level_dbfs"][0] == pytest.approx(10 * np.log10(good.square().mean().item()), abs=1e-3)


@pytest.mark.parametrize(("tail", "dying"), [(0.0, False), (0.38, False), (0.4, True), (1.0, True)])
def test_a_clip_dies_that_ends_in_silence(tail, dying):
    """Catches a rest in the middle that counts as an end, and a tail that is one frame short."""
    clip = 0.1 * torch.ones(3 * RATE)
    clip[RATE : 2 * RATE] = 0
    clip[len(clip) - round(tail * RATE) :] = 0
    assert validity(clip[None], RATE)["dying"].tolist() == [dying]
    other = torch.full_like(clip, 0.1)
    assert not validity(torch.stack([clip, other])[None], RATE)["dying"].any(), "its other channel sounds on"


def coloured_noise(exponent, seconds=3, low=0.0, high=math.inf):
    """Noise at −20 dBFS whose amplitude falls as frequency to the exponent, between two frequencies."""
    spectrum = torch.fft.rfft(torch.randn(seconds * RATE, generator=torch.Generator().manual_seed(1)))
    hertz = torch.fft.rfftfreq(seconds * RATE, 1 / RATE)
    spectrum *= hertz.clamp_min(hertz[1]) ** -exponent * ((hertz >= low) & (hertz <= high))
    noise = torch.fft.irfft(spectrum)
    return 0.1 * noise / noise.square().mean().sqrt()


def test_noise_of_any_colour_offsets_and_hum_are_not_valid():
    """Catches a flatness of the whole spectrum, which only white noise has, and power that nobody hears."""
    time = torch.arange(3 * RATE) / RATE
    broken = {
        "pink": coloured_noise(0.5),
        "brown": coloured_noise(1),
        "above 40 Hz": coloured_noise(1, low=40),
        "band": coloured_noise(0, low=1000, high=2000),
        "offset": torch.full_like(time, 0.1),
        "hum": 0.1 * torch.sin(2 * math.pi * 20 * time),
    }
    found = dict(zip(broken, validity(torch.stack(list(broken.values())), RATE)["valid"], strict=True))
    assert not any(found.values()), found
    good = melody([60, 64, 67])
    assert validity((good + 0.3 * good.std())[None], RATE)["valid"].all()  # a small offset is no harm


def test_every_channel_that_can_be_heard_must_be_sound():
    """Catches a mean over channels: one clipped channel hides in it, and opposite channels vanish."""
    good = melody([60, 64, 67])
    silence = torch.zeros_like(good)
    pairs = [(good, good), (good, -good), (good, silence), (good, (40 * good).clamp(-1, 1))]
    pairs += [((40 * good).clamp(-1, 1), silence), (good, coloured_noise(1)), (silence, silence)]
    report = validity(torch.stack([torch.stack(pair) for pair in pairs]), RATE)
    assert report["valid"].tolist() == [True] * 3 + [False] * 4
    assert report["level_dbfs"][0] == pytest.approx(validity(good[None], RATE)["level_dbfs"].item(), abs=1e-4)


def test_clips_of_the_nano_base_are_valid():
    """Catches thresholds that music fails."""
    prompts = [
        f"a {tempo} melody on a {name}" for tempo in ("slow", "fast") for name in ("piano", "violin", "flute")
    ]
    clips = fast_generate(
        load_policy(nano_path()),
        prompts,
        processor=load_processor(nano_path()),
        num_frames=50,
        guidance_scale=3.0,
    )
    report = validity(clips.waveforms, RATE)
    assert report["valid"].all(), report
    assert report["noisiness"].max() < 0.35 and report["subsonic_fraction"].max() < 0.4


def test_judge_is_saved_and_loaded(tmp_path):
    """Catches a judge whose batch statistics or classes are lost on disk."""
    torch.manual_seed(0)
    judge = AttributeJudge()
    clips = torch.stack([melody([60, 64, 67]), melody([72] * 12)])
    judge.train()
    judge(clips)  # moves the batch statistics
    judge.save_pretrained(tmp_path)
    loaded = AttributeJudge.from_pretrained(tmp_path)
    judge.eval()
    with torch.no_grad():
        for name, logits in judge(clips).items():
            assert torch.allclose(loaded(clips)[name], logits, atol=2e-2)
    scores = loaded.adherence(clips, RATE, ["a slow piano", "a fast flute in C major"])
    assert set(scores) == {"instrument", "tempo", "register", "key", "mean"}
    assert np.isnan(scores["register"]).all()
    with pytest.raises(FileNotFoundError, match=r"judge\.json"):
        AttributeJudge.from_pretrained(tmp_path / "nothing")
    for name, content in (("judge.json", b"[1]"), ("judge.json", b"{"), ("model.safetensors", b"<html>")):
        kept = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"{name}.*again$"):
            AttributeJudge.from_pretrained(tmp_path)
        (tmp_path / name).write_bytes(kept)
