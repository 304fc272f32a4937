"""What the trainers' tests share: the micro configs, and clips of tones that stand for speech."""

import pytest

from training.config import micro_configs
from training.smoke import tones


@pytest.fixture(scope="session")
def configs():
    return micro_configs()


@pytest.fixture
def tone_clips():
    """Eight clips in two voices."""
    voices = ("hibari", "flite-slt")
    return [tones(voices[n % 2], "yes" if n % 3 else "no", 6 + n % 4, n) for n in range(8)]
