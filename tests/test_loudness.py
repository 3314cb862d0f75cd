"""Loudness against the standard's own coefficients and reference signals (ITU-R BS.1770-4)."""

import math

import numpy as np
import pytest

from diverse_cfg.acoustics import _high_pass, _shelf, loudness, normalised


def tone(sampling_rate=48_000, seconds=2.0, hertz=997.0, amplitude=1.0):
    return amplitude * np.sin(2 * math.pi * hertz * np.arange(int(seconds * sampling_rate)) / sampling_rate)


def test_filters_have_the_standards_coefficients_at_48_khz():
    numerator, denominator = _shelf(48_000)
    np.testing.assert_allclose(numerator, [1.53512485958697, -2.69169618940638, 1.19839281085285], atol=1e-8)
    np.testing.assert_allclose(denominator, [1, -1.69065929318241, 0.73248077421585], atol=1e-8)
    _, denominator = _high_pass(48_000)
    np.testing.assert_allclose(denominator, [1, -1.99004745483398, 0.99007225036621], atol=1e-8)


@pytest.mark.parametrize("sampling_rate", [16_000, 32_000, 48_000])
def test_a_full_scale_tone_in_one_channel_has_minus_3_lufs(sampling_rate):
    """The standard's calibration: 997 Hz at 0 dBFS in one channel reads −3.01."""
    assert loudness(tone(sampling_rate), sampling_rate) == pytest.approx(-3.01, abs=0.05)
    both = np.stack([tone(sampling_rate)] * 2)
    assert loudness(both, sampling_rate) == pytest.approx(0.0, abs=0.05)
    assert loudness(tone(sampling_rate, amplitude=0.1), sampling_rate) == pytest.approx(-23.01, abs=0.05)


def test_silence_around_the_music_does_not_count():
    """Catches an ungated mean: a clip with a pause would be played too loud."""
    music = tone()
    with_pause = np.concatenate([np.zeros(4 * 48_000), music])
    assert loudness(with_pause, 48_000) == pytest.approx(
        loudness(music, 48_000), abs=0.6
    )  # ungated: 4.8 less


def test_bass_is_heard_less():
    assert loudness(tone(hertz=40), 48_000) < loudness(tone(), 48_000) - 3


def test_copies_have_one_loudness():
    for amplitude in (0.01, 0.3):
        assert loudness(normalised(tone(amplitude=amplitude), 48_000), 48_000) == pytest.approx(-23, abs=0.05)


def test_peaks_stay_below_full_scale():
    clicks = np.zeros(48_000)
    clicks[::4800] = 1
    copy = normalised(clicks, 48_000, target=-3)
    assert np.abs(copy).max() == pytest.approx(10 ** (-1 / 20))


def test_silence_stays_silence():
    assert loudness(np.zeros(48_000), 48_000) == -math.inf
    assert not normalised(np.zeros(48_000), 48_000).any()


def test_a_clip_shorter_than_a_block():
    assert math.isfinite(loudness(tone(seconds=0.1), 48_000))


def test_broken_samples_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        normalised(np.array([0.1, np.nan]), 48_000)
