"""Kills by seed, and what callers heard of them."""

import signal
import subprocess
import sys
from collections import Counter

import pytest

from benchmarks.hearing import hear
from benchmarks.kills import PARTS, Death, draw, killing
from tests.benchmarks.test_hearing import turn

pytestmark = pytest.mark.unit


def test_kills_are_a_function_of_their_seed_and_spread_over_time_and_parts():
    kills = draw(7, 100, 3.0)
    assert kills == draw(7, 100, 3.0) != draw(8, 100, 3.0)
    assert Counter(kill.part for kill in kills) == dict.fromkeys(PARTS, 20)
    assert [int(kill.at // 3) for kill in kills] == list(range(100))


def test_the_process_that_is_drawn_dies_and_no_other():
    command = [sys.executable, "-c", "input()"]
    names = ("llm.1", "llm.2", "store")
    processes = {name: subprocess.Popen(command, stdin=subprocess.PIPE) for name in names}
    pids = {name: process.pid for name, process in processes.items()}
    try:
        with killing(draw(1, 2, 0.0, ["llm"]), lambda: pids) as deaths:
            codes = [processes[name].wait(10) for name in names[:2]]
        assert codes == [-signal.SIGKILL] * 2  # the second kill finds one only
        assert sorted(death.name for death in deaths) == ["llm.1", "llm.2"]
        assert processes["store"].poll() is None
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


def test_a_part_of_which_nothing_lives_is_waited_for_but_not_for_ever():
    with killing(draw(1, 1, 0.0, ["llm"]), lambda: {"store": 1}) as deaths:
        pass
    assert deaths == []


@pytest.mark.parametrize(
    ("arrivals", "row", "wait", "underrun"),
    [
        ([[103.0, 1.0]], "before speech", 1500.0, 0.0),
        ([[101.0, 1.0], [104.0, 1.0]], "lead not built", 3000.0, 2.0),
        ([[101.0, 6.0], [104.0, 1.0]], "lead built", 3000.0, 0.0),
    ],
)
def test_answers_under_way_are_told_apart_by_what_their_callers_had_in_hand(arrivals, row, wait, underrun):
    over = turn("s.2", [[100.5, 1.0]])
    report = hear([turn("s.1", arrivals), over], [], 0.0, [Death(101.5, "llm.1")])["deaths"]
    assert {name: found["wait_ms"]["n"] for name, found in report.items() if found["wait_ms"]["n"]} == {row: 1}
    assert report[row]["wait_ms"]["worst"] == wait
    assert report[row]["underrun_seconds"] == report[row]["unexplained_seconds"] == underrun


def test_an_underrun_belongs_to_the_last_death_before_it():
    answer = turn("s.1", [[101.0, 1.0], [104.0, 1.0], [108.0, 1.0]])
    deaths = [Death(101.5, "llm.1"), Death(105.5, "store")]
    heard = hear([answer], [], 100.0, deaths)
    assert heard["timeline"]["deaths"] == [[1.5, "llm.1"], [5.5, "store"]]
    report = heard["deaths"]["lead not built"]
    assert report["wait_ms"]["n"] == 2
    assert report["underrun_seconds"] == 2.0 + 3.0


def test_who_interrupts_the_silence_after_a_death_has_heard_it():
    answer = turn("s.1", [[101.0, 1.0]], end="cancelled", interrupted=103.0, ended=103.5)
    report = hear([answer], [], 0.0, [Death(101.5, "llm.1")])["deaths"]["lead not built"]
    assert report["wait_ms"]["n"] == 0
    assert report["underrun_seconds"] == 1.0
