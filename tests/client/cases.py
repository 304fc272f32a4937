"""What both clients must do with a turn; each test module runs these with its own client."""

from dataclasses import replace

import grpc
import pytest

from kimia.client import AudioChunk, ClientOptions, TextDelta, TurnDone, TurnStarted
from kimia.errors import (
    CapacityError,
    ContextLengthError,
    DeadlineError,
    InternalError,
    NotFoundError,
    RequestError,
    TurnCancelledError,
    UnavailableError,
)
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.turn_pb2 import Failure
from tests.client.scripted import FAST, TURN, WHOLE, Drop, audio, done, started, text
from tests.client.turns import QUESTION, question


class TurnCases:
    """Mixed into a test class that has `events` and `result`, coroutine functions of tests.client.turns."""

    async def test_a_turn_is_given_event_by_event(self, service) -> None:
        service.generate = [WHOLE]
        events = await self.events(service, question)
        assert [type(event) for event in events] == [
            TurnStarted,
            TextDelta,
            AudioChunk,
            TextDelta,
            AudioChunk,
            TurnDone,
        ]
        assert "".join(event.text for event in events if isinstance(event, TextDelta)) == "t0 t1 "
        assert events[0] == TurnStarted(TURN, "session", 7, "s16le", 24000)
        assert events[-1].stop == "audio_eod"

    @pytest.mark.parametrize("cut", range(len(WHOLE)))
    async def test_a_drop_after_any_event_loses_and_repeats_nothing(self, service, cut) -> None:
        service.generate = [[*WHOLE[:cut], Drop()], WHOLE]
        service.resume = [[started(), *WHOLE[max(cut, 1) :]]]
        events = await self.events(service, question)
        assert [type(event) for event in events].count(TurnStarted) == 1
        assert [event.index for event in events if isinstance(event, TextDelta)] == [0, 1]
        assert [event.index for event in events if isinstance(event, AudioChunk)] == [0, 1]
        assert isinstance(events[-1], TurnDone)

    async def test_before_the_first_event_the_same_request_is_sent_again(self, service) -> None:
        service.generate = [[Drop()], WHOLE]
        await self.events(service, question)
        first, second = service.requests
        assert first == second
        assert first.idempotency_key

    async def test_resume_names_what_was_received(self, service) -> None:
        service.generate = [[*WHOLE[:4], Drop()]]
        service.resume = [[*WHOLE[4:]]]
        await self.events(service, question)
        request = service.requests[1]
        assert isinstance(request, pb.ResumeRequest)
        assert (request.turn_id, request.last_text_index, request.last_audio_index) == (TURN, 1, 0)

    async def test_resume_says_when_nothing_was_received(self, service) -> None:
        service.generate = [[started(), Drop()]]
        service.resume = [WHOLE]
        await self.events(service, question)
        assert not service.requests[1].HasField("last_text_index")
        assert not service.requests[1].HasField("last_audio_index")

    async def test_what_comes_twice_is_given_once(self, service) -> None:
        service.generate = [[*WHOLE[:3], *WHOLE[:3], *WHOLE[3:]]]
        assert len(await self.events(service, question)) == len(WHOLE)

    @pytest.mark.parametrize("late", [text(2), audio(2)])
    async def test_a_gap_is_an_error(self, service, late) -> None:
        service.generate = [[*WHOLE[:3], late, done()]]
        with pytest.raises(InternalError, match="is missing") as raised:
            await self.events(service, question)
        assert raised.value.reason == "STREAM_GAP"

    async def test_a_stream_that_ends_early_is_resumed(self, service) -> None:
        service.generate = [WHOLE[:2]]
        service.resume = [WHOLE[2:]]
        assert len(await self.events(service, question)) == len(WHOLE)

    async def test_attempts_are_bounded(self, service) -> None:
        service.generate = [[Drop()]] * FAST.attempts
        with pytest.raises(UnavailableError):
            await self.events(service, question)
        assert service.generate == []

    async def test_progress_renews_the_attempts(self, service) -> None:
        service.generate = [[started(), Drop()]]
        service.resume = [[Drop()], [Drop()], [text(0), Drop()], [Drop()], [Drop()], [audio(0), done()]]
        assert isinstance((await self.events(service, question))[-1], TurnDone)

    async def test_nobody_there(self, service) -> None:
        service.target = "127.0.0.1:1"
        with pytest.raises(UnavailableError):
            await self.events(service, question)

    @pytest.mark.parametrize("code", [grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN])
    async def test_a_code_of_the_transport_is_a_lost_connection(self, service, code) -> None:
        service.generate = [[Drop(code)], WHOLE]
        assert len(await self.events(service, question)) == len(WHOLE)

    @pytest.mark.parametrize(
        "error", [ContextLengthError("too long", 2), InternalError("a stage failed"), NotFoundError("gone")]
    )
    async def test_a_refusal_keeps_its_class_and_is_not_tried_again(self, service, error) -> None:
        service.generate = [[error]]
        with pytest.raises(type(error), match=str(error)):
            await self.events(service, question)

    async def test_no_row_is_free(self, service) -> None:
        service.generate = [[CapacityError("all rows are taken", retry_after=0.01)]]
        with pytest.raises(CapacityError) as raised:
            await self.events(service, question)
        assert raised.value.retry_after == pytest.approx(0.01)

    async def test_patience_waits_for_a_row(self, service) -> None:
        full = [CapacityError("all rows are taken", retry_after=0.01)]
        service.generate = [full, full, WHOLE]
        patient = replace(FAST, patience=1.0)
        assert len(await self.events(service, question, patient)) == len(WHOLE)

    async def test_patience_ends(self, service) -> None:
        service.generate = [[CapacityError("all rows are taken", retry_after=2.0)]]
        with pytest.raises(CapacityError):
            await self.events(service, question, replace(FAST, patience=1.0))

    async def test_the_time_for_an_answer_is_over(self, service) -> None:
        with pytest.raises(DeadlineError):
            await self.events(service, question, replace(FAST, timeout=0.0))

    async def test_a_failed_turn_raises_its_error(self, service) -> None:
        failed = pb.TurnEvent(turn_id=TURN, failed=Failure(code=13, reason="GAVE_UP", message="gave up"))
        service.generate = [[started(), failed]]
        with pytest.raises(InternalError, match="gave up") as raised:
            await self.events(service, question)
        assert raised.value.reason == "GAVE_UP"

    async def test_a_cancelled_turn_raises(self, service) -> None:
        cancelled = pb.TurnEvent(turn_id=TURN, cancelled=pb.TurnCancelled(heard_codes=3))
        service.generate = [[started(), cancelled]]
        with pytest.raises(TurnCancelledError):
            await self.events(service, question)

    async def test_collect(self, service) -> None:
        service.generate = [WHOLE]
        answer = await self.result(service, lambda kimia: question(kimia).collect())
        assert answer.text == "t0 t1 "
        assert answer.pcm == WHOLE[2].audio.data + WHOLE[4].audio.data
        assert (answer.sample_rate, answer.seed, answer.session_id, answer.turn_id) == (24000, 7, "session", TURN)
        assert answer.seconds == pytest.approx(0.4)
        assert 0 <= answer.times.started <= answer.times.first_text <= answer.times.first_audio <= answer.times.total

    async def test_a_user_may_resume(self, service) -> None:
        service.resume = [WHOLE[3:]]
        events = await self.events(service, lambda kimia: kimia.resume(TURN, last_audio=0, last_text=0))
        assert [event.index for event in events[:-1]] == [1, 1]

    async def test_say(self, service) -> None:
        service.generate = [WHOLE]
        await self.events(service, lambda kimia: kimia.say("On its way.", session="abc", seed=3))
        request = service.requests[0]
        assert (request.say, request.session_id, request.options.seed) == ("On its way.", "abc", 3)
        assert not request.messages

    async def test_transcribe(self, service, tmp_path) -> None:
        service.generate = [[started(), text(0, "hello"), done("hello")]]
        (tmp_path / "call.wav").write_bytes(b"RIFF")
        heard = await self.result(service, lambda kimia: kimia.transcribe(tmp_path / "call.wav", batch=True))
        assert heard == "hello"
        assert service.requests[0].messages[1].audio.data == b"RIFF"

    async def test_a_large_message_arrives(self, service) -> None:
        service.generate = [WHOLE]
        clip = {"role": "user", "message_type": "audio", "content": (bytes(8_000_000), 16000)}
        await self.events(service, lambda kimia: kimia.generate([clip]))
        assert len(service.requests[0].messages[0].audio.data) == 8_000_000

    async def test_a_message_that_the_service_finds_too_large(self, service) -> None:
        clip = {"role": "user", "message_type": "audio", "content": (bytes(9_000_000), 16000)}
        tolerant = replace(FAST, max_request_bytes=10_000_000)
        with pytest.raises(RequestError, match="larger than allowed"):
            await self.events(service, lambda kimia: kimia.generate([clip]), tolerant)

    async def test_a_request_that_is_too_large_is_not_sent(self, service) -> None:
        clip = {"role": "user", "message_type": "audio", "content": (bytes(3_000_000), 16000)}
        with pytest.raises(RequestError, match=r"2\.9 MiB .* takes 1\.0"):
            await self.events(service, lambda kimia: kimia.generate([clip]), ClientOptions(max_request_bytes=1 << 20))
        assert service.requests == []

    async def test_session(self, service) -> None:
        service.sessions = [Drop(), pb.GetSessionResponse(session_id="session", turn_ids=[TURN], next_audio_index=4)]
        session = await self.result(service, lambda kimia: kimia.session("session"))
        assert (session.id, session.turn_ids, session.next_audio_index) == ("session", (TURN,), 4)
        assert session.expire_time is None

    async def test_a_session_that_is_not_there(self, service) -> None:
        service.sessions = [NotFoundError("no session of this name")]
        with pytest.raises(NotFoundError):
            await self.result(service, lambda kimia: kimia.delete_session("session"))

    async def test_a_deletion_whose_reply_was_lost_is_done(self, service) -> None:
        service.sessions = [Drop(), NotFoundError("no session of this name")]
        await self.result(service, lambda kimia: kimia.delete_session("session"))
        assert service.sessions == []

    async def test_connect(self, service) -> None:
        await self.result(service, lambda kimia: kimia.connect())

    async def test_connect_says_that_nobody_is_there(self, service) -> None:
        service.target = "127.0.0.1:1"
        with pytest.raises(UnavailableError, match=r"nothing answers at 127\.0\.0\.1:1"):
            await self.result(service, lambda kimia: kimia.connect(timeout=0.05))

    async def test_the_caller_is_named(self, service) -> None:
        service.generate = [WHOLE]
        await self.named(service, "acme")
        assert service.requests[0].caller.tenant == "acme"
        assert service.requests[0].messages[0].text.text == QUESTION[0]["content"]
