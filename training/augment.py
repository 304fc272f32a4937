"""What happens to a caller's voice on its way to the shop: another throat, another pace, noise, a phone line.

Every change is drawn from the generator that is given, so that a step can be repeated. Waves are float32 at 16 kHz.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import soxr

from training.voices import HEARING_RATE

PHONE_RATE = 8_000  # Hz
MU = 255.0
MOST_PEAK = 0.99
EASY_LENGTH = 4096  # a Fourier transform of a length with large prime factors takes ten times as long


@dataclass(frozen=True)
class Chances:
    """How often, and how much."""

    resample: float = 0.7  # pitch, formants and pace together
    resample_span: float = 0.18  # factors 1 - span .. 1 + span
    noise: float = 0.5
    noise_db: tuple[float, float] = (8.0, 35.0)  # signal to noise
    phone: float = 0.35
    gain_db: tuple[float, float] = (-15.0, 5.0)


CALLER = Chances()
GENTLE = Chances(resample=0.0, noise=0.3, noise_db=(15.0, 35.0), phone=0.25)  # keeps timing and pitch


@dataclass(frozen=True, eq=False)
class Changed:
    """A changed wave, and by what factor it became faster."""

    wave: np.ndarray  # (S,)
    pace: float


def mu_law_8k(wave: np.ndarray) -> np.ndarray:
    """(S,) through an 8 kHz G.711 mu-law line and back, (S,)."""
    narrow = soxr.resample(wave, HEARING_RATE, PHONE_RATE, quality="HQ")
    squeezed = np.sign(narrow) * np.log1p(MU * np.minimum(np.abs(narrow), 1.0)) / np.log1p(MU)
    levels = np.rint(squeezed * 127.5) / 127.5  # 8 bits
    opened = np.sign(levels) * np.expm1(np.abs(levels) * np.log1p(MU)) / MU
    wide = soxr.resample(opened.astype(np.float32), PHONE_RATE, HEARING_RATE, quality="HQ")
    return np.pad(wide[: len(wave)], (0, max(0, len(wave) - len(wide)))).clip(-1.0, 1.0)  # filters overshoot


def resampled(wave: np.ndarray, pace: float) -> np.ndarray:
    """Played `pace` times as fast: pitch and formants rise with it. (S,) -> about S / pace samples."""
    return np.asarray(soxr.resample(wave, pace * HEARING_RATE, HEARING_RATE, quality="HQ"))


def noise(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Noise of unit power and random colour, (S,) float32."""
    drawn = -(-samples // EASY_LENGTH) * EASY_LENGTH
    white = np.fft.rfft(rng.standard_normal(drawn))
    slope = rng.uniform(0.0, 1.0)  # white to pink
    coloured = np.fft.irfft(white / np.maximum(np.arange(len(white)), 1.0) ** (slope / 2), drawn)[:samples]
    return (coloured / max(1e-9, float(coloured.std()))).astype(np.float32)


def _noisy(rng: np.random.Generator, wave: np.ndarray, decibels: float) -> np.ndarray:
    power = float(np.sqrt(np.mean(wave**2))) + 1e-6
    return wave + noise(rng, len(wave)) * np.float32(power * 10 ** (-decibels / 20))


def augmented(rng: np.random.Generator, wave: np.ndarray, chances: Chances = CALLER) -> Changed:
    """A wave (S,) as it might arrive."""
    pace = 1.0
    if rng.random() < chances.resample:
        pace = float(rng.uniform(1 - chances.resample_span, 1 + chances.resample_span))
        wave = resampled(wave, pace)
    if rng.random() < chances.noise:
        wave = _noisy(rng, wave, rng.uniform(*chances.noise_db))
    wave = wave * np.float32(10 ** (rng.uniform(*chances.gain_db) / 20))
    peak = float(np.abs(wave).max())
    wave = wave * np.float32(MOST_PEAK / peak) if peak > MOST_PEAK else wave
    if rng.random() < chances.phone:
        wave = mu_law_8k(wave)
    return Changed(wave.astype(np.float32), pace)
