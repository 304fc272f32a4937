"""What the trainers' tests share: the micro configs, and clips of tones that stand for speech."""

import numpy as np
import pytest

from training.config import micro_configs
from training.corpus import TOKEN_SAMPLES, Clip, Item


@pytest.fixture(scope="session")
def configs():
    return micro_configs()


def tone_clip(voice, text, tokens, seed=0):
    """A clip whose pitch glides: no speech, but with something to hear in every frame."""
    rng = np.random.default_rng(seed)
    times = np.arange(tokens * TOKEN_SAMPLES) / 24000
    wave = 0.3 * np.sin(2 * np.pi * times * (200 + 400 * rng.random() * times)) + 0.01 * rng.standard_normal(len(times))
    return Clip(Item("train", voice, text), (wave * 2**15).astype(np.int16))


@pytest.fixture
def tone_clips():
    """Eight clips in two voices."""
    voices = ("hibari", "flite-slt")
    return [tone_clip(voices[n % 2], "yes" if n % 3 else "no", 6 + n % 4, n) for n in range(8)]
