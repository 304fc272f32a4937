"""A turn's randomness as a pure function of (seed, track, index), so that any process can draw it again.

Philox 4x64 in counter mode: the key is (seed, track), the high counter word is the index (a step or a chunk), the
low word runs over the draw. Only the generator's raw 64-bit words are used; the conversions are written out here
because NumPy does not promise that its own distributions stay the same between versions.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from kimia.errors import ParameterError

WORD = (1 << 64) - 1
MULTIPLIERS = 0xD2E7470EE14C6C93, 0xCA5A826395121157  # of Philox 4x64 (Salmon et al., SC 2011)
INCREMENTS = 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B
SEED_LIMIT = 1 << 63  # seeds travel as int64 in protobuf


class Track(IntEnum):
    """What a draw is for: second key word, so that the tracks are independent."""

    TEXT = 0
    AUDIO = 1
    NOISE = 2


def check_seed(seed: int) -> int:
    """Return the seed unchanged, or raise ParameterError unless 0 <= seed < 2**63."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        raise ParameterError(f"seed must be an integer in 0..2**63-1, got {seed!r}")
    return seed


def _words(seed: int, track: Track, index: int, count: int) -> np.ndarray:
    generator = np.random.Philox(
        key=np.array([seed, track], dtype=np.uint64), counter=np.array([0, index, 0, 0], dtype=np.uint64)
    )
    return np.asarray(generator.random_raw(count))


def _unit_interval(words: np.ndarray) -> np.ndarray:
    return (words >> np.uint64(11)) * 2.0**-53  # the 53 bits of a float64 mantissa: [0, 1)


def uniform(seed: int, track: Track, step: int) -> float:
    """The uniform number in [0, 1) of a track at a step."""
    return (_first_word(seed, track, step) >> 11) * 2.0**-53


def _first_word(seed: int, track: int, index: int) -> int:
    """What `_words` gives first, in plain integers: setting NumPy's generator up takes longer than ten rounds."""
    c0, c1, c2, c3 = 1, index, 0, 0  # NumPy counts before it draws
    k0, k1 = seed, track
    for _ in range(10):
        low, high = MULTIPLIERS[0] * c0, MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (high >> 64) ^ c1 ^ k0, high & WORD, (low >> 64) ^ c3 ^ k1, low & WORD
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0


def uniforms(seed: int, first: int, count: int) -> np.ndarray:
    """The numbers of `uniform` for both tracks from step `first` on, (2, count), in one go."""
    words = np.zeros((2, 2, 2, count), dtype=np.uint64)  # (c1 | c3, c0 | c2, track, step)
    words[0, 0] = np.arange(first, first + count, dtype=np.uint64)
    words[1, 0] = 1  # NumPy counts before it draws
    k0, k1 = seed, np.array([[Track.TEXT], [Track.AUDIO]], dtype=np.uint64)
    factors = np.array(MULTIPLIERS, dtype=np.uint64)[:, None, None]
    odd, even = words
    for _ in range(10):
        high = _high(factors, even)[::-1]
        odd, even = (factors * even)[::-1], high ^ odd
        even[0] ^= np.uint64(k0)
        even[1] ^= k1
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, k1 + np.uint64(INCREMENTS[1])
    return _unit_interval(even[0])


def _high(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper 64 bits of a product of 64-bit integers."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    a_high, a_low, b_high, b_low = a >> half, a & low, b >> half, b & low
    one, other = a_high * b_low, a_low * b_high
    carried = (a_low * b_low >> half) + (one & low) + (other & low)
    return a_high * b_high + (one >> half) + (other >> half) + (carried >> half)


def normal(seed: int, chunk: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise of one chunk (Box-Muller over float64).

    A longer draw starts with the numbers of a shorter one.
    """
    count = int(np.prod(shape))
    pairs = -(-count // 2)
    units = _unit_interval(_words(seed, Track.NOISE, chunk, 2 * pairs)).reshape(pairs, 2)
    radius = np.sqrt(-2.0 * np.log1p(-units[:, 0]))  # 1 - u lies in (0, 1], so the logarithm is finite
    angle = 2.0 * np.pi * units[:, 1]
    draws = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).reshape(-1)
    return draws[:count].reshape(shape).astype(np.float32)
