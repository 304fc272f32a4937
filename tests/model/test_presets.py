"""The two schedules, and refusal of impossible ones."""

import math
from dataclasses import replace

import pytest

from kimia.errors import ParameterError
from kimia.model.crossfade import OverlapSeam, ReleaseSeam
from kimia.model.presets import LOW_LATENCY, PRESETS, UPSTREAM, find_preset
from kimia.model.schedule import SCHEDULES

pytestmark = pytest.mark.unit

CUTS = ("name", "commits", "look_ahead", "waits_for_next", "held")


def test_upstream_pushes_thirty_tokens_and_always_looks_ahead():
    assert [UPSTREAM.push_size(index) for index in range(4)] == [30, 30, 30, 30]
    assert (UPSTREAM.look_ahead, UPSTREAM.ode_points, UPSTREAM.kv_window) == (12, 30, 900)
    assert UPSTREAM.max_positions == 4096


def test_low_latency_grows_and_then_repeats():
    assert [LOW_LATENCY.push_size(index) for index in range(6)] == [10, 12, 24, 37, 37, 37]


def test_the_quirks_of_the_release_live_in_upstream_only():
    assert isinstance(UPSTREAM.seam, ReleaseSeam)
    assert isinstance(LOW_LATENCY.seam, OverlapSeam)
    assert UPSTREAM.prompt_padding == 0.0
    assert LOW_LATENCY.prompt_padding == pytest.approx(math.log(1e-5))


def test_low_latency_seam_sees_only_the_chunk_before():
    """So that two committed mels are enough to rebuild it."""
    assert LOW_LATENCY.seam.hold + LOW_LATENCY.seam.context <= 4 * min(LOW_LATENCY.commits)


@pytest.mark.parametrize(
    "change",
    [
        {"commits": ()},
        {"commits": (6, 0)},
        {"look_ahead": -1},
        {"kv_window": 0},
        {"ode_points": 1},
        {"solver": "rk4"},
    ],
)
def test_impossible_presets_are_refused(change):
    with pytest.raises(ParameterError):
        replace(LOW_LATENCY, **change)


def test_the_schedules_of_the_wire_and_of_the_model_are_the_same():
    assert {name: [getattr(preset, field) for field in CUTS] for name, preset in PRESETS.items()} == {
        name: [getattr(schedule, field) for field in CUTS] for name, schedule in SCHEDULES.items()
    }


def test_presets_are_found_by_name():
    assert find_preset("") is LOW_LATENCY
    assert all(find_preset(name) is preset for name, preset in PRESETS.items())
    with pytest.raises(ParameterError, match="low-latency, upstream"):
        find_preset("fast")
