"""One process against three: what is started, what is compared, how it is shown."""

import json
from contextlib import contextmanager

import pytest

from benchmarks import calls, colocated
from tests.benchmarks.test_calls import made
from tests.benchmarks.test_hearing import BROKEN, late, turn

pytestmark = pytest.mark.unit


def test_the_host_takes_the_place_of_three_processes(monkeypatch):
    started = []

    @contextmanager
    def up(words, environment):
        started.append((words, environment["KIMIA_ROWS"]))
        yield

    monkeypatch.setattr(calls, "up", up)
    for more in ([], ["--colocated"]):
        with calls._service(calls.parse(["run", "--model", "DIR", "--capacity", "4", *more])):
            pass
    assert started == [
        (["--model", "DIR", "--replicas", "tokenizer=1", "llm=1", "detokenizer=1"], "4"),
        (["--model", "DIR", "--colocated", "--replicas", "colocated=1"], "4"),
    ]


def test_pairs_are_measured_and_compared(monkeypatch, tmp_path, capsys):
    asked = []

    def measured(args):
        asked.append((args.callers, args.colocated))
        report = made([BROKEN, turn("s.2", [[100.5, 1.0]]), late(101.0, 101.25)], keys=False)
        report["processes"] = {"colocated": report["processes"]["llm"]} if args.colocated else report["processes"]
        report["gap_ms"]["p99"] = 50.0 if args.colocated else 100.0
        return report

    monkeypatch.setattr(calls, "measure", measured)
    out = tmp_path / "out.json"
    colocated.main(["--model", "DIR", "--callers", "1", "4", "--pairs", "2", "--out", str(out)])
    assert asked == [(callers, host) for callers in (1, 1, 4, 4) for host in (False, True)]
    found = json.loads(out.read_text())
    assert found["callers"]["4"]["ratios"]["gap p99, ms"] == 0.5
    assert found["callers"]["4"]["pairs"][1]["host"]["stages: cores"] == 0.25
    assert "gap p99, ms                          100.0        50.0     0.50" in capsys.readouterr().out


def test_a_figure_that_a_run_lacks_has_no_ratio():
    pair = {"host": {"a": 1.0, "b": None, "c": 1.0}, "processes": {"a": 2.0, "b": 1.0, "c": 0.0}}
    assert colocated.ratios([pair]) == {"a": 0.5, "b": None, "c": None}
