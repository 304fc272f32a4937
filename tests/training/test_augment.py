"""Augmentation: repeatable, bounded, and what a phone line does to a wave."""

import numpy as np
import pytest

from training.augment import GENTLE, Chances, augmented, mu_law_8k, noise, resampled

pytestmark = pytest.mark.unit

TIMES = np.arange(16000) / 16000


def tone(frequency):
    return (0.5 * np.sin(2 * np.pi * frequency * TIMES)).astype(np.float32)


def loudest(wave):
    """Frequency in Hz of the strongest line."""
    return np.abs(np.fft.rfft(wave)).argmax() * 16000 / len(wave)


def test_the_same_generator_gives_the_same_wave():
    first, again = (augmented(np.random.default_rng(3), tone(440)) for _ in range(2))
    np.testing.assert_array_equal(first.wave, again.wave)
    assert first.pace == again.pace


def test_a_wave_stays_finite_and_below_full_scale():
    rng = np.random.default_rng(0)
    loud = Chances(gain_db=(20.0, 20.0))
    for _ in range(10):
        changed = augmented(rng, tone(440), loud)
        assert changed.wave.dtype == np.float32
        assert np.isfinite(changed.wave).all()
        assert np.abs(changed.wave).max() <= 1.0


def test_a_faster_pace_is_shorter_and_higher():
    faster = resampled(tone(440), 1.25)
    assert len(faster) == 12800
    assert loudest(faster) == pytest.approx(550, abs=2)


def test_gentle_changes_keep_the_timing():
    rng = np.random.default_rng(1)
    for _ in range(10):
        changed = augmented(rng, tone(440), GENTLE)
        assert changed.pace == 1.0
        assert len(changed.wave) == 16000


def test_a_phone_line_keeps_the_voice_band_and_cuts_above_4_khz():
    low, high = mu_law_8k(tone(440)), mu_law_8k(tone(6000))
    assert len(low) == 16000
    inner = slice(1000, -1000)
    assert np.abs(low - tone(440))[inner].max() < 0.02  # mu-law's steps near half scale
    assert np.abs(high)[inner].max() < 0.01


def test_silence_stays_silence_through_the_line():
    assert not mu_law_8k(np.zeros(1600, np.float32)).any()


def test_noise_has_unit_power():
    assert noise(np.random.default_rng(0), 16000).std() == pytest.approx(1.0, abs=1e-3)


def test_silence_can_be_augmented():
    assert np.isfinite(augmented(np.random.default_rng(0), np.zeros(1600, np.float32)).wave).all()
