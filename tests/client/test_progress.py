"""One turn as the client has received it."""

import pytest

from kimia.client import AudioChunk, TextDelta, TurnDone, TurnFailed
from kimia.client.progress import TurnProgress
from kimia.errors import CapacityError, InternalError, StateError, TurnCancelledError
from kimia.status import to_failure
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.turn_pb2 import Caller
from tests.client.scripted import TURN, WHOLE, audio, done, started, text

pytestmark = pytest.mark.unit


class Clock:
    """Seconds that pass one by one."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1.0
        return self.now


def told(*events: pb.TurnEvent) -> TurnProgress:
    progress = TurnProgress(Clock())
    for event in events:
        progress.accept(event)
    return progress


def test_a_whole_turn() -> None:
    progress = TurnProgress()
    events = [progress.accept(event) for event in WHOLE]
    assert None not in events
    answer = progress.answer()
    assert (answer.text, answer.pcm, answer.seed) == ("t0 t1 ", progress.pcm, 7)


def test_times_are_counted_from_the_beginning() -> None:
    times = told(*WHOLE).times
    assert (times.started, times.first_text, times.first_audio, times.total) == (1.0, 2.0, 3.0, 4.0)


def test_what_was_received_is_not_given_again() -> None:
    progress = told(*WHOLE[:4])
    assert [progress.accept(event) for event in WHOLE[:4]] == [None] * 4
    assert (progress.text, len(progress.pcm)) == ("t0 t1 ", 20)


def test_nothing_comes_after_the_end() -> None:
    progress = told(*WHOLE)
    assert progress.accept(text(2)) is None
    assert progress.accept(done()) is None


@pytest.mark.parametrize("late", [text(3), audio(2)])
def test_a_gap(late) -> None:
    with pytest.raises(InternalError) as raised:
        told(*WHOLE[:4]).accept(late)
    assert raised.value.reason == "STREAM_GAP"


def test_another_turn_in_the_stream() -> None:
    with pytest.raises(InternalError, match="in the stream of turn"):
        told(started()).accept(text(0, turn_id="session.other"))


def test_events_of_a_newer_service_are_skipped() -> None:
    assert told(started()).accept(pb.TurnEvent(turn_id=TURN)) is None


def test_resume_requests() -> None:
    caller = Caller(tenant="acme")
    assert told(started()).resume_request(caller) == pb.ResumeRequest(caller=caller, turn_id=TURN)
    request = told(*WHOLE[:3]).resume_request(caller)
    assert (request.last_text_index, request.last_audio_index) == (0, 0)
    again = TurnProgress.resumed(TURN, 4, None).resume_request(caller)
    assert (again.last_audio_index, again.HasField("last_text_index")) == (4, False)


def test_a_resumed_turn_goes_on_behind_its_indices() -> None:
    progress = TurnProgress.resumed(TURN, last_audio=0, last_text=0)
    events = [progress.accept(event) for event in WHOLE]
    assert [event for event in events if isinstance(event, (TextDelta, AudioChunk))] == [
        TextDelta(TURN, 1, "t1 "),
        AudioChunk(TURN, 1, WHOLE[4].audio.data),
    ]


def test_an_answer_needs_its_end() -> None:
    with pytest.raises(StateError, match="has not ended"):
        told(*WHOLE[:-1]).answer()


def test_turns_without_an_answer_raise() -> None:
    error = CapacityError("full", retry_after=1.0)
    failed = told(started(), pb.TurnEvent(turn_id=TURN, failed=to_failure(error)))
    assert isinstance(failed.end, TurnFailed)
    with pytest.raises(CapacityError, match="full"):
        failed.answer()
    cancelled = told(started(), pb.TurnEvent(turn_id=TURN, cancelled=pb.TurnCancelled()))
    with pytest.raises(TurnCancelledError):
        cancelled.answer()


def test_an_end_without_a_beginning() -> None:
    progress = told(done("late"))
    assert isinstance(progress.end, TurnDone)
    assert progress.answer().text == "late"
