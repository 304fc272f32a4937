"""Sound events: every kind sounds, differs from draw to draw, and can be told apart."""

import numpy as np
import pytest

from training.sounds import SOUNDS, sound

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("kind", SOUNDS)
def test_a_sound_is_bounded_and_repeatable(kind):
    wave = sound(kind, np.random.default_rng(1))
    assert wave.dtype == np.float32
    assert 16000 <= len(wave) <= 48000
    assert 0 < np.abs(wave).max() < 1
    np.testing.assert_array_equal(wave, sound(kind, np.random.default_rng(1)))
    assert not np.array_equal(wave, sound(kind, np.random.default_rng(2)))


def flatness(wave):
    """1 for white noise, near 0 for tones."""
    power = np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2 + 1e-12
    return np.exp(np.log(power).mean()) / power.mean()


def test_noise_is_flat_and_tones_are_not():
    flat = {kind: np.median([flatness(sound(kind, np.random.default_rng(n))) for n in range(8)]) for kind in SOUNDS}
    assert min(flat["noise"], flat["silence"]) > 5 * max(flat["ring"], flat["beep"], flat["music"])


def test_silence_is_far_below_everything_else():
    levels = {kind: max(np.abs(sound(kind, np.random.default_rng(n))).max() for n in range(5)) for kind in SOUNDS}
    assert all(levels[kind] > 10 * levels["silence"] for kind in SOUNDS if kind != "silence")
