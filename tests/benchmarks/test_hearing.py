"""The report of what callers have written down."""

import pytest

from benchmarks.hearing import hear

pytestmark = pytest.mark.unit


def turn(turn_id, arrivals, spoken=100.0, end="done", **fields):
    times = {"interrupted": None, "ended": arrivals[-1][0] if arrivals else spoken, "first_audio": 0.25}
    rest = {"reason": "", "worst_frame": 0.001, "process": "0", "caller": 0}
    return (
        {"what": "turn", "turn_id": turn_id, "spoken": spoken, "arrivals": arrivals, "end": end} | times | rest | fields
    )


def late(begin, end, process="0"):
    return {"what": "late", "begin": begin, "end": end, "process": process}


BROKEN = turn("s.1", [[100.5, 1.0], [103.0, 1.0]])  # silent from 101.5 to 103


def silence(report):
    return report["underrun_seconds"]


def test_voice_to_voice_is_from_the_last_frame_to_the_first_piece():
    report = hear([turn("s.1", [[100.5, 1.0], [101.0, 1.0]]), turn("s.2", [], end="failed", reason="gone")], [], 90.0)
    assert report["voice_to_voice_ms"] == {"n": 1, "p50": 500.0, "p95": 500.0, "p99": 500.0, "worst": 500.0}
    assert report["first_audio_ms"]["p50"] == 250.0
    assert report["gap_ms"]["n"] == sum(report["gap_ms"]["counts"]) == 1
    assert report["reserve_ms"]["worst"] == 500.0
    assert report["timeline"]["voice_to_voice"] == [[10.0, 500.0]]
    assert report["turns"] == {"done": 1, "failed": 1, "interrupted": 0}
    assert report["failures"] == ["gone"]


def test_a_silence_without_a_stall_is_a_fault():
    report = hear([BROKEN, turn("s.2", [[100.5, 1.0]])], [(90.0, 100.4)], 0.0)
    assert silence(report) == {
        "total": 1.5,
        "explained_by_machine": 0.0,
        "explained_by_callers": 0.0,
        "unexplained": 1.5,
    }
    assert report["continuity"] == report["continuity_but_for_stalls"] == 0.5
    assert report["underruns"] == [{"at": 101.5, "turn": "s.1", "seconds": 1.5, "unexplained": 1.5}]


def test_the_machine_comes_first_then_the_callers_own_process():
    stalls = [(101.0, 101.5)]
    own, other = late(101.25, 102.5), late(100.5, 103.0, process="1")
    report = hear([BROKEN, own, other], stalls, 0.0)
    assert silence(report) == {
        "total": 1.5,
        "explained_by_machine": 0.5,
        "explained_by_callers": 1.0,
        "unexplained": 0.0,
    }
    assert (report["continuity"], report["continuity_but_for_stalls"]) == (0.0, 1.0)
    assert report["callers"]["late_ticks"] == 2
    assert report["callers"]["worst_tick_ms"] == 2500.0


def test_who_interrupts_a_running_answer_hears_nothing_after_it():
    interrupted = turn("s.1", [[100.5, 1.0], [101.75, 1.0]], end="cancelled", interrupted=101.5, ended=101.875)
    report = hear([interrupted], [], 0.0)
    assert silence(report)["total"] == 0.0
    assert report["barge_in"]["running"] == 1
    assert report["barge_in"]["last_stale_ms"]["p50"] == 250.0
    assert report["barge_in"]["acknowledged_ms"]["p50"] == 375.0


def test_who_interrupts_a_silence_has_heard_it_unless_the_answer_was_over():
    arrivals = [[100.5, 1.0]]
    waiting = turn("s.1", arrivals, end="cancelled", interrupted=102.0, ended=102.0)
    over = turn("s.2", arrivals, end="done", interrupted=102.0, ended=101.0)
    assert silence(hear([waiting], [], 0.0))["total"] == 0.5
    assert silence(hear([over], [], 0.0))["total"] == 0.0
    assert hear([over], [], 0.0)["barge_in"]["running"] == 0


def test_refusals_at_the_start_are_told_from_others_and_the_wait_counts_from_the_first():
    def said(what, caller, begun, at, **fields):
        return {"what": what, "caller": caller, "begun": begun, "at": at, "process": "0"} | fields

    records = [
        said("refused", 1, 10.0, 10.1, admitted=None, reason="full"),
        said("refused", 1, 12.0, 12.1, admitted=None, reason="full"),
        said("admitted", 2, 11.0, 11.5),
        said("admitted", 1, 14.0, 14.5),
        said("refused", 3, 10.0, 20.0, admitted=11.0, reason="full"),
        {"what": "told_to_wait", "caller": 1, "seconds": 2.0},
        said("failed", 2, 11.0, 12.0, admitted=11.5, reason="broken"),
    ]
    calls = hear(records, [], 0.0)["calls"]
    assert (calls["admitted"], calls["refused_at_start"], calls["refused_later"], calls["failed"]) == (2, 2, 1, 1)
    assert calls["waited_for_a_row_seconds"]["n"] == 1
    assert calls["waited_for_a_row_seconds"]["worst"] == 4.5
    assert calls["told_to_wait_seconds"]["p50"] == 2.0


def test_without_any_call_there_is_no_number():
    report = hear([], [], 0.0)
    assert report["voice_to_voice_ms"] == {"n": 0, "p50": None, "p95": None, "p99": None, "worst": None}
    assert report["continuity"] is None
