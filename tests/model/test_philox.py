"""Draws are frozen for ever: a stored seed must repeat its turn on any machine and version."""

import numpy as np
import pytest

from kimia.errors import ParameterError
from kimia.model.philox import SEED_LIMIT, Track, _first_word, _words, check_seed, normal, uniform, uniforms

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("seed", "track", "step", "expected"),
    [
        (0, Track.TEXT, 0, 0.011546754286331562),
        (0, Track.AUDIO, 0, 0.8133540609793564),
        (7, Track.TEXT, 3, 0.43900223090044976),
        (SEED_LIMIT - 1, Track.AUDIO, 1499, 0.7352053859733048),
    ],
)
def test_frozen_uniforms(seed, track, step, expected):
    assert uniform(seed, track, step) == expected


def test_plain_integers_give_what_numpy_gives():
    keys = np.random.Generator(np.random.PCG64(0)).integers(0, SEED_LIMIT, (300, 2))
    for seed, step in keys.tolist():
        for track in Track:
            assert _first_word(seed, track, step) == int(_words(seed, track, step, 1)[0])


@pytest.mark.parametrize("seed", [0, 7, 0x9E3779B97F4A7C15 >> 1, SEED_LIMIT - 1])
@pytest.mark.parametrize("first", [0, 5, (1 << 40) - 3])
def test_many_numbers_are_those_of_one_at_a_time(seed, first):
    expected = [[uniform(seed, track, first + step) for step in range(9)] for track in (Track.TEXT, Track.AUDIO)]
    assert uniforms(seed, first, 9).tolist() == expected


def test_frozen_normals():
    expected = [[2.2200062, 0.24403457, 1.9815087], [1.2047864, -0.022573028, 0.9131375]]
    np.testing.assert_allclose(normal(7, 2, (2, 3)), expected, rtol=1e-6)


def test_a_longer_draw_starts_with_a_shorter_one():
    long = normal(3, 1, (7, 5)).reshape(-1)
    for rows in range(8):
        short = normal(3, 1, (rows, 5))
        assert short.shape == (rows, 5)
        np.testing.assert_array_equal(short.reshape(-1), long[: short.size])


def test_draws_do_not_depend_on_what_was_drawn_before():
    first = uniform(5, Track.TEXT, 9)
    normal(5, 9, (100,))
    np.random.seed(1)
    assert uniform(5, Track.TEXT, 9) == first


def test_seeds_tracks_and_indices_give_different_numbers():
    numbers = {uniform(seed, track, step) for seed in range(20) for track in Track for step in range(20)}
    assert len(numbers) == 20 * 3 * 20
    assert not np.array_equal(normal(0, 0, (4,)), normal(0, 1, (4,)))


def test_tracks_are_not_correlated():
    streams = np.array([[uniform(1, track, step) for step in range(2000)] for track in Track])
    correlation = np.corrcoef(np.vstack([streams, streams[:, ::-1]]))
    assert np.abs(correlation - np.eye(6)).max() < 0.08


def test_uniforms_fill_the_unit_interval():
    numbers = np.array([uniform(2, Track.AUDIO, step) for step in range(4000)])
    assert 0 <= numbers.min() < 0.01
    assert 0.99 < numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert counts.min() > 320


def test_normals_are_standard_and_finite():
    draws = normal(11, 0, (200_000,))
    assert draws.dtype == np.float32
    assert np.isfinite(draws).all()
    assert abs(float(draws.mean())) < 0.01
    assert abs(float(draws.std()) - 1) < 0.01
    assert abs(float((draws[0::2] * draws[1::2]).mean())) < 0.01  # both halves of Box-Muller


@pytest.mark.parametrize("seed", [-1, SEED_LIMIT, True, 1.0, "1", None])
def test_illegal_seeds(seed):
    with pytest.raises(ParameterError, match="seed must be an integer"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, SEED_LIMIT - 1])
def test_legal_seeds(seed):
    assert check_seed(seed) == seed
