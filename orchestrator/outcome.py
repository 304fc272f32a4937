"""The last event of a turn: what it took, and where the time went on the journal's clock."""

from __future__ import annotations

from google.protobuf.duration_pb2 import Duration

from kimia.runtime import metrics
from kimia.stage import DETOKENIZER, LLM, route_of
from kimia.streams.journal import Head
from kimia.v1.kimi_audio_pb2 import Latency, TurnCancelled, TurnDone, TurnEvent, Usage
from kimia.v1.turn_pb2 import StageReport
from orchestrator.following import Following


def cancelled_event(turn_id: str, heard_codes: int) -> TurnEvent:
    """The turn was stopped; so many codes of its answer are remembered."""
    return TurnEvent(turn_id=turn_id, cancelled=TurnCancelled(heard_codes=heard_codes))


def last_event(following: Following, head: Head, heard_codes: int) -> TurnEvent:
    """How a turn that was read to its end has ended."""
    turn_id = head.turn.id
    if head.state == "done":
        return TurnEvent(turn_id=turn_id, done=done(following, head))
    if head.state == "cancelled":
        return cancelled_event(turn_id, heard_codes)
    return TurnEvent(turn_id=turn_id, failed=head.failure)


def done(following: Following, head: Head) -> TurnDone:
    """The answer is complete."""
    return TurnDone(
        text=following.text,
        stop=following.stop,
        usage=usage(following, head),
        latency=latency(head, following.reports),
    )


def usage(following: Following, head: Head) -> Usage:
    """What a turn took."""
    report = following.reports.get(LLM.name, StageReport())
    return Usage(
        prompt_positions=report.prompt_positions,
        steps=len(following.tokens),
        audio_codes=following.codes if DETOKENIZER in route_of(head.turn) else 0,
        audio_samples=following.sound.samples,
        dropped_messages=report.dropped_messages,
    )


def latency(head: Head, reports: dict[str, StageReport]) -> Latency:
    """Times since the turn was submitted; what has not happened is left out."""
    found = Latency(
        first_text=_since(head, _first(head, LLM.name)),
        first_audio=_since(head, _first(head, DETOKENIZER.name)),
        total=_since(head, head.ended),
    )
    for kind in route_of(head.turn):
        times = head.stages.get(kind.name)
        if times is None:
            continue
        report = reports.get(kind.name, StageReport())
        compute = Duration()
        compute.FromNanoseconds(round(report.compute_seconds * 1e9))
        found.stages.add(
            stage=kind.number,
            queued=_since(head, times.queued),
            claimed=_since(head, times.claimed),
            first=_since(head, times.first),
            done=_since(head, times.done),
            compute=compute,
            worker=report.worker or times.consumer,
            take_overs=times.take_overs,
        )
    return found


def _first(head: Head, stage: str) -> int:
    times = head.stages.get(stage)
    return 0 if times is None else times.first


def _since(head: Head, moment: int) -> Duration | None:
    """From the turn's start; `moment` in microseconds, 0: not reached."""
    if not moment:
        return None
    duration = Duration()
    duration.FromMicroseconds(max(moment - head.submitted, 0))
    return duration


def count(following: Following, head: Head) -> None:
    """Put a turn that was followed from its beginning into the metrics."""
    metrics.TURNS.labels("orchestrator", head.state).inc()
    metrics.UNDERRUN.inc(following.waited)
    for metric, stage in ((metrics.FIRST_TEXT, LLM.name), (metrics.FIRST_AUDIO, DETOKENIZER.name)):
        first = _first(head, stage)
        if first:
            metric.observe(max(first - head.submitted, 0) / 1e6)
