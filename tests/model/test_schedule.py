"""The cuts as numbers: how far speech goes with so many codes, and that it takes no torch to know."""

import subprocess
import sys
from itertools import pairwise

import pytest

from kimia.errors import ParameterError
from kimia.model.chunking import ChunkPlanner
from kimia.model.schedule import LOW_LATENCY, SCHEDULES, UPSTREAM, default_name, find_schedule

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("schedule", "codes", "spoken"),
    [
        (LOW_LATENCY, 9, 0),
        (LOW_LATENCY, 10, 4),
        (LOW_LATENCY, 21, 4),
        (LOW_LATENCY, 22, 16),
        (LOW_LATENCY, 46, 40),
        (LOW_LATENCY, 83, 77),
        (LOW_LATENCY, 120, 114),
        (UPSTREAM, 30, 0),
        (UPSTREAM, 31, 9),
        (UPSTREAM, 61, 27),
        (UPSTREAM, 91, 69),
    ],
)
def test_speech_goes_as_far_as_whole_pushes(schedule, codes, spoken):
    assert schedule.spoken(codes) == spoken


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_speech_grows_with_the_very_code_that_completes_a_push(schedule):
    planner = ChunkPlanner(schedule)
    pushed = [planner.feed(code) is not None for code in range(200)]
    grown = [after > before for before, after in pairwise(map(schedule.spoken, range(201)))]
    assert grown == pushed


def test_schedules_are_found_by_name():
    assert find_schedule("upstream") is UPSTREAM
    assert find_schedule("") is SCHEDULES[default_name()] is LOW_LATENCY
    with pytest.raises(ParameterError, match="low-latency, upstream"):
        find_schedule("fast")


def test_no_torch_is_needed():
    code = "import sys, kimia.model.chunking, kimia.model.schedule; print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
