"""The benchmark of the pipeline, as a smoke run with a handful of turns."""

import json

import pytest

from benchmarks import pipeline
from benchmarks.fleet import ZERO, Plan, Timing, run, running
from benchmarks.load import Load, Results, drive, floor, percentiles
from benchmarks.wire import Counts, traffic

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]  # starts whole services: by hand

TURNS, CALLERS = 4, 2


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Transport and features at the smallest scale, as the command writes them."""
    folder = tmp_path_factory.mktemp("bench")
    words = ["--modes", "zero", "--callers", "1", "--rewrite-callers", "2", "--turns", str(TURNS), "--repeats", "2"]
    found = {}
    for part in ("transport", "features"):
        out, plot = folder / f"{part}.json", folder / f"{part}.svg"
        pipeline.main([part, *words, "--out", str(out), "--plot", str(plot)])
        found |= json.loads(out.read_text(encoding="utf-8"))
        assert "<svg" in plot.read_text(encoding="utf-8")
    return found


def test_every_turn_is_counted_and_stalls_stand_beside(report):
    alone = report["transport"]["zero"]["undisturbed"]["1"]
    assert alone["turns"] == TURNS
    assert alone["added_ms"]["first_audio"]["p50"] > 0
    assert alone["added_ms"]["first_audio"]["p99"] is None  # of four turns it would say nothing
    assert alone["stalls"]["ticks"] > 0
    assert set(alone["cpu_ms_per_turn"]) == {"valkey", "tokenizer", "llm", "detokenizer", "orchestrator", "client"}


def test_the_moments_of_a_turn_come_in_their_order(report):
    marks = list(report["transport"]["zero"]["undisturbed"]["1"]["waterfall_ms"])
    order = ["turn opened", "turn submitted", "tokenizer claimed", "llm claimed", "llm first", "detokenizer first"]
    assert [mark for mark in marks if mark in order] == order
    assert marks[-1] == "client has total"


def test_the_store_was_rewritten_meanwhile(report):
    disturbed = report["transport"]["zero"]["during_aof_rewrites"]["2"]
    assert disturbed["turns"] == TURNS
    assert disturbed["rewriting"]["longest_fork_ms"] > 0


def test_features_are_weighed_on_both_ways(report):
    second = report["features"]["blob_server"]["lengths"]["1 s"]
    content = second["put"]["message_bytes"]
    assert content > 12 * 5120 * 2
    assert second["put"]["redis_bytes"] > content
    assert second["get"]["redis_bytes"] > content
    assert second["grpc"]["redis_bytes"] < content / 10


def test_both_replicas_serve_and_logs_are_weighed():
    timing = Timing(step_seconds=0.001, realtime_factor=0.05)
    with running(Plan(timing, {"detokenizer": 2}, {"detokenizer": 1})) as fleet:
        results = run(drive(fleet.address, Load(2, 8, 30.0)))
        report = run(pipeline._messages(fleet, Load(2, 4, 30.0)))
    assert results.turns == 8
    assert len(results.workers["detokenizer"]) == 2
    assert report["logs"]["tokens"]["messages"] == pytest.approx(40 / report["speech_seconds_of_a_turn"])
    assert report["redis"]["bytes_sent"] > report["logs"]["audio"]["bytes"]
    assert report["redis"]["pointers"] > report["logs"]["tokens"]["messages"]


def test_the_floor_knows_the_stages_times():
    least = run(floor(Timing(clip_seconds=0.1, prefill_seconds=0.1, realtime_factor=0.01), repeats=1))
    assert run(floor(ZERO, repeats=1))["total"] < least["first_text"] < least["first_audio"] < least["total"]


def test_percentiles_need_turns_enough():
    assert percentiles([1.0] * 99) == {"p50": 1.0, "p99": None, "p99.9": None}
    assert percentiles([1.0] * 1000) == {"p50": 1.0, "p99": 1.0, "p99.9": 1.0}


def test_what_was_added_is_above_the_floor():
    times = {"started": [1.0], "first_text": [10.0], "first_audio": [30.0], "total": [50.0]}
    results = Results(seconds=2.0, times=times, turn_ids=["s.1"])
    summary = results.summary({"first_text": 1.0, "first_audio": 2.0, "total": 3.0})
    assert {moment: found["p50"] for moment, found in summary["added_ms"].items()} == {
        "first_text": 9.0,
        "first_audio": 28.0,
        "total": 47.0,
    }
    assert summary["turns_per_second"] == 0.5


def test_traffic_is_a_difference_per_second():
    before, after = Counts(100, 50, {"xadd": 10}, 5), Counts(300, 150, {"xadd": 30, "get": 2}, 25)
    assert traffic(before, after, 2.0) == {
        "bytes_received": 100.0,
        "bytes_sent": 50.0,
        "pointers": 10.0,
        "calls": {"xadd": 10.0, "get": 1.0},
    }
