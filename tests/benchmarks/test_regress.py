"""What the gate of ratios holds and what it lets through, with times that are told instead of measured."""

import json

import pytest

from benchmarks import regress

pytestmark = pytest.mark.unit


@pytest.fixture
def told(monkeypatch):
    """`timed` gives what the side itself says it took."""
    monkeypatch.setattr(regress, "timed", lambda side: side())


def pair(plain, fast, work=1):
    return (lambda: plain), (lambda: next(fast)), work


def test_a_ratio_is_the_median_of_its_pairs(told) -> None:
    assert regress.ratio(pair(10.0, iter([5.0, 100.0, 2.0]), 2), 3) == 4.0


def test_a_fifth_is_held_and_more_is_lost(told, capsys) -> None:
    steady = {"decode": (pair(8.1, iter([1.0] * 9)), 1), "flow": (pair(7.9, iter([1.0] * 9)), 1)}
    assert regress.compare(steady, {"decode": 10.0, "flow": 10.0}) == 1
    assert capsys.readouterr().out == "held  decode: 8.10, baseline 10.00\nLOST  flow: 7.90, baseline 10.00\n"


def test_a_press_that_passes_loses_nothing(told) -> None:
    pressed = pair(10.0, iter([9.0, 3.0, 1.0]))
    assert regress.held("decode", pressed, 1, 10.0) == (10.0, True)


def test_a_baseline_of_other_names_is_no_baseline(told, capsys) -> None:
    assert regress.compare({"decode": (pair(1.0, iter([1.0])), 1)}, {"other": 1.0}) == 1
    assert "--write" in capsys.readouterr().out


def test_the_committed_baseline_is_what_is_measured(tmp_path) -> None:
    baseline = json.loads(regress.BASELINE.read_text())
    assert regress.measures(tmp_path).keys() == baseline.keys()
    assert all(ratio > 1 for ratio in baseline.values())
