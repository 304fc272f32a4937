"""Drawing for many rows at once against the plain sampler."""

import math
from itertools import product

import pytest
import torch

from kimia.errors import NumericsError
from kimia.model.drawing import FEW, Draws, Recent
from kimia.model.sampler import TrackSampling, choose, distribution

pytestmark = pytest.mark.unit

VOCABULARY = 90
ROWS = [
    TrackSampling(),
    TrackSampling(0.7, 3),
    TrackSampling(1.3, 0, 1.5, 2),  # the whole vocabulary, which is more than FEW
    TrackSampling(0.0, 5, 1.9, 0),
    TrackSampling(0.9, FEW, 1.1, 5),
    TrackSampling(0.9, 5, 0.5, 0),  # below 1: no penalty
    TrackSampling(1.1, 200, 3.0, 4),
    TrackSampling(2.0, 1),
]


def told(sampling: TrackSampling, history: list[int]) -> Recent:
    recent = Recent(sampling)
    for token in history:
        recent.add(token)
    return recent


def drawn(logits, tracks, histories, numbers) -> list[list[int | None]]:
    recent = [[told(*each) for each in zip(*track, strict=True)] for track in zip(tracks, histories, strict=True)]
    return Draws(tracks, logits.shape[-1]).draw(logits.clone(), recent, numbers)


def chosen(row, sampling, history, number) -> int | None:
    try:
        return choose(row[None], [sampling], [history], [number])[0]
    except NumericsError:
        return None


@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("levels", [3, 10, 100_000])
def test_each_row_and_track_draws_what_the_plain_sampler_draws(levels, columns):
    """Few levels: many equal logits, within and across the border of the candidates."""
    generator = torch.Generator().manual_seed(levels)
    for _ in range(20):
        logits = torch.randint(-levels, levels, (2, len(ROWS), VOCABULARY), generator=generator) * (6 / levels)
        if columns:
            logits = logits.transpose(1, 2).contiguous().transpose(1, 2)
        histories = torch.randint(0, VOCABULARY, (2, len(ROWS), 9), generator=generator).tolist()
        numbers = torch.rand(2, len(ROWS), generator=generator, dtype=torch.float64).tolist()
        tracks = [ROWS, ROWS[::-1]]
        found = drawn(logits, tracks, histories, numbers)
        for track, row in product(range(2), range(len(ROWS))):
            assert found[track][row] == chosen(
                logits[track, row], tracks[track][row], histories[track][row], numbers[track][row]
            )


def test_the_number_decides_at_the_border():
    logits = torch.tensor([[[0.125, 0.5, 0.25, 0.125]]]).log()
    sampling = TrackSampling(1.0, 4)
    _, probabilities = distribution(logits[0], [sampling])
    sums = probabilities[0].cumsum(-1).tolist()
    for number in (0.0, *(math.nextafter(at, side) for at in sums[:3] for side in (0, 1)), math.nextafter(1, 0)):
        assert drawn(logits, [[sampling]], [[[]]], [[number]]) == [[chosen(logits[0, 0], sampling, [], number)]]


def test_ids_without_probability_are_never_drawn():
    logits = torch.tensor([[[0.0, -math.inf, 0.0, -math.inf, -1e30]]])
    sampling = TrackSampling(0.1, 4)
    assert drawn(logits, [[sampling]], [[[]]], [[1.0]]) == [[2]]


@pytest.mark.parametrize("broken", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_whose_logits_are_no_numbers_takes_nobody_with_it(broken, dtype):
    logits = torch.tensor([[[0.0, 1.0, 0.5], [0.0, broken, 0.5], [-math.inf] * 3, [0.0, 0.25, 3.0]]], dtype=dtype)
    for sampling in (TrackSampling(), TrackSampling(1e-5, 2), TrackSampling(1e-5, 0)):
        assert drawn(logits, [[sampling] * 4], [[[]] * 4], [[0.1] * 4]) == [[1, None, None, 2]]


@pytest.mark.parametrize(
    ("window", "history", "ids"),
    [
        (3, [1, 2, 3], None),  # as long as the window: none
        (3, [1, 2, 3, 4], {2, 3, 4}),
        (0, [], None),
        (0, [5, 5, 6], {5, 6}),
        (0, list(range(200)), set(range(200))),
    ],
)
def test_what_counts_as_repeated(window, history, ids):
    found = told(TrackSampling(repetition_window=window), history).ids()
    assert (None if found is None else set(found.tolist())) == ids
