"""What both clients must do in a call; each test module runs these with its own client."""

import asyncio
from dataclasses import replace

import pytest

from kimia.client import (
    AsyncKimia,
    AudioChunk,
    Kimia,
    TextDelta,
    TurnCancelled,
    TurnDone,
    TurnFailed,
    TurnStarted,
)
from kimia.errors import InternalError, NotFoundError, ParameterError, StateError, UnavailableError
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.audio_pb2 import ENCODING_MULAW
from kimia.v1.turn_pb2 import Failure
from tests.client.scripted import FAST, REST, TURN, WHOLE, Drop, audio, done, read, ready, received, started, text

SECOND = "session.second"
PIECE = bytes(3200)  # 100 ms at 16 kHz


class AsyncioCall:
    """A call of the client for asyncio."""

    def __init__(self, service, options=FAST, **settings) -> None:
        self.kimia = AsyncKimia(service.target, options=options)
        self.call = self.kimia.converse(**settings)

    async def __aenter__(self):
        try:
            await self.call.__aenter__()
        except BaseException:
            await self.kimia.aclose()
            raise
        return self

    async def __aexit__(self, *error) -> None:
        await self.call.__aexit__(*error)
        await self.kimia.aclose()

    async def turn(self) -> list:
        return [event async for event in self.call.turn()]

    async def rest(self) -> list:
        return [event async for event in self.call]

    async def answer(self):
        return await self.call.answer()


class BlockingCall:
    """A call of the blocking client; what blocks runs in a thread."""

    def __init__(self, service, options=FAST, **settings) -> None:
        self.kimia = Kimia(service.target, options=options)
        self.call = self.kimia.converse(**settings)

    async def __aenter__(self):
        try:
            await asyncio.to_thread(self.call.__enter__)
        except BaseException:
            self.kimia.close()
            raise
        return self

    async def __aexit__(self, *error) -> None:
        await asyncio.to_thread(self.call.__exit__, *error)
        self.kimia.close()

    async def turn(self) -> list:
        return await asyncio.to_thread(lambda: list(self.call.turn()))

    async def rest(self) -> list:
        return await asyncio.to_thread(lambda: list(self.call))

    async def answer(self):
        return await asyncio.to_thread(self.call.answer)


def kinds(requests: list) -> list[str]:
    """What was sent, by name."""
    return [request.WhichOneof("content") for request in requests]


def indices(events: list, kind: type) -> list[int]:
    return [event.index for event in events if isinstance(event, kind)]


class CallCases:
    """Mixed into a test class with `dial`, AsyncioCall or BlockingCall."""

    async def test_a_turn(self, service) -> None:
        service.converse = [[read(1), ready(), read(3), received(0), *WHOLE, REST]]
        async with self.dial(service, input_rate=8000, input_encoding="mulaw", seed=3) as phone:
            assert phone.call.session_id == "session"
            phone.call.send_audio(bytes(800))
            phone.call.send_text("And?")
            phone.call.commit("text", max_new_tokens=5)
            events = await phone.turn()
            phone.call.finish()
            assert await phone.rest() == []
        assert isinstance(events[0], TurnStarted)
        assert isinstance(events[-1], TurnDone)
        config, sound, words, commit = service.heard[0]
        assert (config.config.input_format.encoding, config.config.input_format.sample_rate) == (ENCODING_MULAW, 8000)
        assert config.config.options.seed == 3
        assert (sound.audio.index, sound.audio.data, words.text.text) == (0, bytes(800), "And?")
        assert commit.commit.options.max_new_tokens == 5
        assert commit.commit.idempotency_key

    async def test_an_answer(self, service) -> None:
        service.converse = [[read(1), ready(), read(1), *WHOLE, REST]]
        async with self.dial(service) as phone:
            phone.call.say("On its way.", seed=9)
            answer = await phone.answer()
        assert (answer.text, len(answer.pcm), answer.session_id) == ("t0 t1 ", 40, "session")
        assert 0 < answer.times.first_text <= answer.times.total
        say = service.heard[0][1].say
        assert (say.text, say.options.seed, bool(say.idempotency_key)) == ("On its way.", 9, True)

    async def test_sound_is_cut_into_pieces(self, service) -> None:
        service.converse = [[read(1), ready(5), read(3), REST]]
        async with self.dial(service) as phone:
            phone.call.send_audio(PIECE + PIECE + bytes(2))
            phone.call.finish()
            await phone.rest()
        pieces = [request.audio for request in service.heard[0][1:]]
        assert [piece.index for piece in pieces] == [5, 6, 7]
        assert [len(piece.data) for piece in pieces] == [3200, 3200, 2]

    async def test_what_is_not_acknowledged_is_sent_again(self, service) -> None:
        service.converse = [
            [read(1), ready(), read(4), received(0), Drop()],
            [read(1), ready(2), REST],
        ]
        async with self.dial(service) as phone:
            phone.call.send_audio(PIECE * 4)
            phone.call.finish()
            await phone.rest()
        assert [request.audio.index for request in service.heard[1][1:]] == [2, 3]

    async def test_a_second_connection_names_the_session_only(self, service) -> None:
        history = [{"role": "assistant", "message_type": "text", "content": "Good day."}]
        service.converse = [[read(1), ready(), Drop()], [read(1), ready(), REST]]
        async with self.dial(service, chats=history) as phone:
            phone.call.finish()
            await phone.rest()
        first, second = (heard[0].config for heard in service.heard)
        assert (first.session_id, len(first.messages)) == ("", 1)
        assert (second.session_id, len(second.messages)) == ("session", 0)
        assert first.input_format == second.input_format

    async def test_a_commit_that_was_not_answered_is_sent_again_with_its_key(self, service) -> None:
        service.converse = [
            [read(1), ready(), read(2), received(0), Drop()],
            [read(1), ready(1), read(1), *WHOLE, REST],
        ]
        async with self.dial(service) as phone:
            phone.call.send_audio(PIECE)
            phone.call.commit()
            assert len(await phone.turn()) == len(WHOLE)
        assert kinds(service.heard[1]) == ["config", "commit"]
        assert service.heard[1][1] == service.heard[0][2]

    async def test_text_is_sent_again_until_something_after_it_is_confirmed(self, service) -> None:
        service.converse = [
            [read(1), ready(), read(3), received(0), Drop()],
            [read(1), ready(1), read(1), *WHOLE, REST],
        ]
        async with self.dial(service) as phone:
            phone.call.send_text("before")
            phone.call.send_audio(PIECE)
            phone.call.send_text("after")
            phone.call.finish()
            await phone.rest()
        assert [request.text.text for request in service.heard[1][1:]] == ["after"]

    @pytest.mark.parametrize("cut", range(1, len(WHOLE)))
    async def test_a_turn_goes_on_after_a_lost_connection(self, service, cut) -> None:
        service.converse = [[read(1), ready(), read(2), *WHOLE[:cut], Drop()], [read(1), ready(0), REST]]
        service.resume = [[Drop()], WHOLE[1:]]
        async with self.dial(service) as phone:
            phone.call.send_text("Hello?")
            phone.call.commit()
            events = await phone.turn()
            phone.call.finish()
            assert await phone.rest() == []
        assert indices(events, TextDelta) == [0, 1]
        assert indices(events, AudioChunk) == [0, 1]
        assert isinstance(events[-1], TurnDone)
        assert service.requests[0].turn_id == TURN
        assert kinds(service.heard[1]) == ["config"]

    async def test_a_turn_that_both_streams_tell_is_told_once(self, service) -> None:
        service.converse = [[read(1), ready(), read(1), *WHOLE[:2], Drop()], [read(1), ready(), *WHOLE, REST]]
        service.resume = [WHOLE]
        async with self.dial(service) as phone:
            phone.call.commit()
            events = await phone.turn()
            phone.call.finish()
            events += await phone.rest()
        assert len(events) == len(WHOLE)

    async def test_a_turn_that_cannot_be_resumed_fails_alone(self, service) -> None:
        second = [started(SECOND), text(0, turn_id=SECOND), done(turn_id=SECOND)]
        service.converse = [
            [read(1), ready(), read(1), *WHOLE[:2], Drop()],
            [read(1), ready(), read(1), *second, REST],
        ]
        service.resume = [[NotFoundError("the turn has expired")]]
        async with self.dial(service) as phone:
            phone.call.commit()
            events = await phone.turn()
            assert isinstance(events[-1], TurnFailed)
            assert isinstance(events[-1].error, NotFoundError)
            phone.call.say("Again.")
            assert (await phone.answer()).turn_id == SECOND

    async def test_a_failed_turn_does_not_end_the_call(self, service) -> None:
        failed = pb.TurnEvent(turn_id=TURN, failed=Failure(code=13, reason="GAVE_UP", message="gave up"))
        service.converse = [
            [read(1), ready(), read(1), started(), failed, read(1), started(SECOND), done(turn_id=SECOND), REST]
        ]
        async with self.dial(service) as phone:
            phone.call.commit()
            with pytest.raises(InternalError, match="gave up"):
                await phone.answer()
            phone.call.commit()
            assert (await phone.answer()).turn_id == SECOND

    async def test_barge_in(self, service) -> None:
        cancelled = pb.TurnEvent(turn_id=TURN, cancelled=pb.TurnCancelled(heard_codes=3))
        service.converse = [[read(1), ready(), read(1), *WHOLE[:3], read(3), cancelled, REST]]
        async with self.dial(service) as phone:
            phone.call.commit()
            waiting = asyncio.create_task(phone.turn())
            while not phone.call.state.turns:
                await asyncio.sleep(0.001)
            phone.call.playback(80)
            phone.call.cancel()
            phone.call.cancel(heard_ms=240)
            events = await waiting
        assert events[-1] == TurnCancelled(TURN, 3)
        heard, stop, told = service.heard[0][2:]
        assert (heard.playback.turn_id, heard.playback.heard_ms) == (TURN, 80)
        assert stop.cancel.turn_id == TURN
        assert not stop.cancel.HasField("heard_ms")
        assert told.cancel.heard_ms == 240

    async def test_clear(self, service) -> None:
        service.converse = [[read(1), ready(), REST]]
        async with self.dial(service) as phone:
            phone.call.clear()
            phone.call.finish()
            await phone.rest()
        assert kinds(service.heard[0]) == ["config", "clear"]

    async def test_a_gap_ends_the_call(self, service) -> None:
        service.converse = [[read(1), ready(), read(1), started(), audio(1), REST]]
        async with self.dial(service) as phone:
            phone.call.commit()
            with pytest.raises(InternalError, match=r"audio 0 .* is missing"):
                await phone.turn()
            with pytest.raises(InternalError, match=r"audio 0 .* is missing"):
                phone.call.commit()

    async def test_a_refused_call(self, service) -> None:
        service.converse = [[read(1), NotFoundError("no such session")]]
        with pytest.raises(NotFoundError):
            async with self.dial(service, session="unknown"):
                pytest.fail("the call was refused")

    async def test_a_refusal_in_the_middle_ends_the_call_for_good(self, service) -> None:
        service.converse = [[read(1), ready(), read(1), StateError("nothing was collected")]]
        async with self.dial(service) as phone:
            phone.call.commit()
            with pytest.raises(StateError, match="nothing was collected"):
                await phone.turn()
            with pytest.raises(StateError, match="nothing was collected"):
                phone.call.send_text("more")

    async def test_attempts_are_bounded(self, service) -> None:
        service.converse = [[read(1), ready(), Drop()]] * FAST.attempts
        async with self.dial(service) as phone:
            with pytest.raises(UnavailableError):
                await phone.rest()
        assert service.converse == []

    async def test_a_service_that_hangs_up_is_called_again(self, service) -> None:
        service.converse = [[read(1), ready()], [read(1)], [read(1), ready(), read(1), *WHOLE, REST]]
        async with self.dial(service) as phone:
            phone.call.commit()
            assert len(await phone.turn()) == len(WHOLE)

    async def test_the_end_of_the_call_in_the_middle_of_a_turn(self, service) -> None:
        service.converse = [[read(1), ready(), REST]]
        async with self.dial(service) as phone:
            phone.call.finish()
            with pytest.raises(StateError, match="before the turn"):
                await phone.turn()
            with pytest.raises(StateError, match="was finished"):
                phone.call.send_audio(PIECE)

    async def test_a_call_that_was_not_entered(self, service) -> None:
        phone = self.dial(service)
        with pytest.raises(StateError, match="context manager"):
            phone.call.send_text("hello")

    async def test_half_a_sample_is_refused(self, service) -> None:
        service.converse = [[read(1), ready(), REST]]
        async with self.dial(service) as phone:
            with pytest.raises(ParameterError, match="whole samples"):
                phone.call.send_audio(b"\0")

    async def test_nobody_there(self, service) -> None:
        service.target = "127.0.0.1:1"
        with pytest.raises(UnavailableError):
            async with self.dial(service, replace(FAST, attempts=2)):
                pytest.fail("nobody is there")
