"""Sound events that a phone line hears beside speech, synthesised with NumPy: no recordings, no licences.

Each is drawn from the generator that is given: pitches, lengths, rhythm and level differ from one to the next.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from training.augment import noise
from training.voices import HEARING_RATE

LEAST_SECONDS, MOST_SECONDS = 1.0, 3.0
HEADROOM = 0.9

Sound = Callable[[np.random.Generator, int], np.ndarray]


def _times(samples: int) -> np.ndarray:
    return np.asarray(np.arange(samples) / HEARING_RATE)


def _tone(frequency: float, samples: int) -> np.ndarray:
    return np.asarray(np.sin(2 * np.pi * frequency * _times(samples)))


def _gate(samples: int, period: float, duty: float) -> np.ndarray:
    """1 during the first `duty` of every `period` seconds, with edges of 5 ms."""
    phase = np.mod(_times(samples), period)
    edge = 0.005
    return np.asarray(np.clip(np.minimum(phase / edge, (duty * period - phase) / edge), 0.0, 1.0))


def ring(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A telephone: two tones that warble, in bursts."""
    low = rng.uniform(400, 900)
    warble = 0.5 + 0.5 * np.sign(_tone(rng.uniform(15, 25), samples))
    tones = warble * _tone(low, samples) + (1 - warble) * _tone(low * rng.uniform(1.15, 1.3), samples)
    return np.asarray(tones * _gate(samples, rng.uniform(0.8, 1.4), rng.uniform(0.5, 0.75)))


def beep(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A steady tone, switched on and off."""
    gate = _gate(samples, rng.uniform(0.3, 0.8), rng.uniform(0.3, 0.6))
    return np.asarray(_tone(rng.uniform(800, 2500), samples) * gate)


def knock(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Knuckles on wood: short bursts of noise that ring at a low pitch."""
    wave = np.zeros(samples)
    spacing = rng.uniform(0.18, 0.4)
    length = int(0.12 * HEARING_RATE)
    pitch, fade = rng.uniform(90, 250), np.exp(-_times(length) * rng.uniform(40, 80))
    for start in np.arange(0.05, samples / HEARING_RATE, spacing):
        begin = int(start * HEARING_RATE)
        hit = (_tone(pitch, length) + 0.5 * noise(rng, length)) * fade
        wave[begin : begin + length] += hit[: len(wave) - begin]
    return wave


def music(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A melody of plucked notes from a major scale."""
    wave = np.zeros(samples)
    scale = np.array([0, 2, 4, 5, 7, 9, 11, 12])
    root, beat = rng.uniform(180, 400), rng.uniform(0.16, 0.35)
    length = int(1.5 * beat * HEARING_RATE)
    for begin in range(0, samples, int(beat * HEARING_RATE)):
        pitch = root * 2 ** (rng.choice(scale) / 12)
        note = sum(_tone(pitch * harmonic, length) / harmonic for harmonic in (1, 2, 3))
        wave[begin : begin + length] += (note * np.exp(-_times(length) * 4))[: samples - begin]
    return wave


def hiss(rng: np.random.Generator, samples: int) -> np.ndarray:
    """A noisy line."""
    return noise(rng, samples)


def silence(rng: np.random.Generator, samples: int) -> np.ndarray:
    """Next to nothing: a line's own faint noise."""
    return 0.001 * noise(rng, samples)


SOUNDS: dict[str, Sound] = {
    "ring": ring,
    "beep": beep,
    "knock": knock,
    "music": music,
    "noise": hiss,
    "silence": silence,
}


def sound(kind: str, rng: np.random.Generator) -> np.ndarray:
    """One event of a kind in SOUNDS, (S,) float32 at 16 kHz, 1 to 3 s."""
    samples = int(rng.uniform(LEAST_SECONDS, MOST_SECONDS) * HEARING_RATE)
    wave = SOUNDS[kind](rng, samples)
    level = 1.0 if kind == "silence" else rng.uniform(0.1, HEADROOM) / float(np.abs(wave).max())
    return (level * wave).astype(np.float32)
