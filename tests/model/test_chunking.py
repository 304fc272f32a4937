"""Cuts depend on the preset and the index of the code alone."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia.model.chunking import ChunkPlanner, Push, pushes
from kimia.model.presets import LOW_LATENCY, UPSTREAM

pytestmark = pytest.mark.unit

plans = st.builds(
    lambda commits, look_ahead, waits: replace(
        LOW_LATENCY, commits=tuple(commits), look_ahead=look_ahead, waits_for_next=waits
    ),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(0, 5),
    st.booleans(),
)


def sizes(preset, count: int) -> list[int]:
    return [len(push.tokens) for push in pushes(preset, range(count))]


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, [0]), (1, [1]), (30, [30]), (31, [30, 1]), (60, [30, 30]), (61, [30, 30, 1]), (82, [30, 30, 22])],
)
def test_upstream_slices(count, expected):
    assert sizes(UPSTREAM, count) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [(0, [0]), (9, [9]), (10, [10, 0]), (21, [10, 11]), (22, [10, 12, 0]), (121, [10, 12, 24, 37, 37, 1])],
)
def test_low_latency_slices(count, expected):
    assert sizes(LOW_LATENCY, count) == expected


@pytest.mark.parametrize(("preset", "first"), [(UPSTREAM, 31), (LOW_LATENCY, 10)])
def test_the_code_that_starts_the_audio(preset, first):
    planner = ChunkPlanner(preset)
    made = [planner.feed(code) for code in range(first)]
    assert made[:-1] == [None] * (first - 1)
    assert made[-1] == Push(tuple(range(preset.push_size(0))), final=False)


@given(preset=plans, count=st.integers(0, 80))
def test_every_code_is_pushed_once_in_order_and_one_push_is_final(preset, count):
    made = list(pushes(preset, range(count)))
    assert [code for push in made for code in push.tokens] == list(range(count))
    assert [push.final for push in made] == [False] * (len(made) - 1) + [True]
    assert [len(push.tokens) for push in made[:-1]] == [preset.push_size(index) for index in range(len(made) - 1)]
    if preset.waits_for_next and count:
        assert made[-1].tokens  # the release never ends with an empty slice


@given(preset=plans, count=st.integers(1, 80))
def test_a_longer_turn_begins_with_the_same_cuts(preset, count):
    short, long = sizes(preset, count)[:-1], sizes(preset, count + 30)
    assert long[: len(short)] == short
