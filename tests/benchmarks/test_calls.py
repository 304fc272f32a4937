"""The command: a report from what was written down, its tables and picture; and a run of it with a whole service."""

import json

import pytest

from benchmarks import calls
from benchmarks.calls_chart import draw
from benchmarks.hearing import hear
from benchmarks.kills import Death
from benchmarks.service import Use
from benchmarks.watching import MIB, Sample, Watch
from tests.benchmarks.test_hearing import BROKEN, late, turn


def made(records, keys=True):
    """A report as `calls.measure` puts it together."""
    times = [float(at) for at in range(10)]
    watch = Watch(dict, store=[(at, 3 * MIB, 7) for at in times])
    watch.samples["llm"] = [Sample(at, 1, Use(at / 4, 50 * MIB, at / 8)) for at in times]
    setting = calls._setting(calls.parse(["soak", "--load", "2.0", "--capacity", "4"]))
    stalls = {"worst_ms": 3.0, **{f"over_{limit}_ms": 0 for limit in calls.LIMITS}}
    report = {"machine": {"cores": 2, "date": "2026-11-28"}, "setting": setting, "seconds": 120.0, "stalls": stalls}
    report |= hear(records, [(101.0, 101.5)], 0.0, [Death(101.0, "llm")])
    report |= {"processes": watch.report(), "store": watch.data(), "memory": calls._memory(watch, 0.0)}
    turns = {"keys": 2, "for_ever": 1, "longest_ttl_seconds": 9, "examples": ["{0}:turn:s.1"]}
    return report | ({"keys": {"kinds": {"turn": turns}, "left": 2, "after_seconds": 1.0}} if keys else {})


@pytest.mark.unit
@pytest.mark.parametrize("records", [[], [BROKEN, turn("s.2", [[100.5, 1.0]]), late(101.0, 101.25)]])
def test_a_report_can_be_read_and_seen(records, tmp_path, capsys):
    report = made(records, keys=bool(records))
    calls.show(report)
    draw(report, tmp_path / "calls.svg")
    shown = capsys.readouterr().out
    assert "<svg" in (tmp_path / "calls.svg").read_text(encoding="utf-8")
    assert "llm                 0.250    0.125        1" in shown
    assert ("2 keys left" in shown) == bool(records)
    if records:
        assert "underrun 1.500 s of 3 s of speech: machine 0.500, callers 0.000, unexplained 1.000" in shown
        assert "continuity 50.00 %" in shown


@pytest.mark.unit
def test_load_is_in_capacities():
    assert calls.callers_of(calls.parse(["run", "--load", "2.0", "--capacity", "40"])) == 80
    assert calls.callers_of(calls.parse(["run"])) == 32
    assert calls.callers_of(calls.parse(["run", "--callers", "3"])) == 3


@pytest.mark.e2e  # starts a whole service: by hand
@pytest.mark.timeout(300)
def test_a_run_of_the_whole(tmp_path):
    out, plot = tmp_path / "calls.json", tmp_path / "calls.svg"
    calls.main(["run", "--callers", "2", "--minutes", "0.1", "--out", str(out), "--plot", str(plot)])
    report = json.loads(out.read_text(encoding="utf-8"))
    assert report["calls"]["admitted"] == 2
    assert report["calls"]["failed"] == report["calls"]["refused_at_start"] == 0
    assert report["answers"] >= 2
    assert report["voice_to_voice_ms"]["n"] == report["answers"]
    assert set(report["processes"]) == {"store", "tokenizer", "llm", "detokenizer", "orchestrator", "callers.1"}
    assert report["store"]["greatest_mib"] > 0
    assert "<svg" in plot.read_text(encoding="utf-8")
