"""The benchmark of the engine runs, and compares equal work."""

import dataclasses

import pytest

from benchmarks.engine import LONG, SHORT, Bench, prompt_of, report
from tests.model.tiny_lm import CONFIG, WIDE, random_lm

pytestmark = pytest.mark.unit


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(random_lm(dataclasses.replace(WIDE, max_positions=8192)), steps=3)


def test_every_number_is_there(bench: Bench) -> None:
    found = report(bench, [1, 2])
    assert found["decode"].keys() == found["context"].keys() == {"1", "2"}
    assert all(numbers["tokens_per_second_ratio"] > 0 for numbers in found["decode"].values())
    assert all(numbers[f"ms_behind_{length}"] > 0 for numbers in found["context"].values() for length in (SHORT, LONG))
    assert found["memory"]["room_grown_megabytes"] == 0


def test_runs_do_not_end_while_they_are_timed(bench: Bench) -> None:
    step, answers = bench.engine(2, prompt_of(9))
    for _ in range(20):
        step()
    assert [answer.tracks.index for answer in answers] == [20 + CONFIG.audio_delay + 1] * 2
    assert not any(answer.over for answer in answers)
    assert not any(answer.waits_for_prefill for answer in answers)
