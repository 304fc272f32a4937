import asyncio
import time

import grpc
import pytest

from kimia.errors import (
    CapacityError,
    DeadlineError,
    NotFoundError,
    RequestError,
    StateError,
    UnavailableError,
    UnsupportedError,
)
from kimia.runtime import server
from kimia.runtime.fake import read_pcm
from kimia.runtime.pacing import sound_seconds
from kimia.runtime.settings import Settings
from kimia.status import from_rpc_error
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_MULAW, AudioFormat
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT, TurnOptions
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub
from kimia.v1.turn_pb2 import Failure
from orchestrator import turn as turn_module
from orchestrator.call import Call
from orchestrator.desk import Limits
from orchestrator.memory import answer_of
from tests.client.proxy import Proxy
from tests.orchestrator.world import (
    ENDLESS,
    FORMAT,
    NATIVE,
    PIECE,
    STEADY,
    TEXT_ONLY,
    Line,
    asks,
    indices,
    kinds,
    known,
    pcm_of,
    sound,
    speaks,
    text_of,
)
from tests.runtime.workers import SECONDS, eventually

pytestmark = pytest.mark.unit


# ---- silence ----------------------------------------------------------------------------------------------------

IDLE = Limits(idle_seconds=0.5)


async def is_idle(call):
    error = await call.error()
    assert (type(error), error.reason) == (DeadlineError, "IDLE")
    assert "0.5 s" in str(error)


async def test_a_silent_call_is_ended_and_its_rows_are_free(world):
    await world.begin(limits=IDLE)
    async with world.call(session_id="s") as call:
        await call.speak(3)
        await is_idle(call)
    await world.afterwards()
    assert set((await world.reserved()).values()) == {0}
    async with world.call(session_id="s") as call:  # the session stays, with what was sent
        assert (await call.ready()).next_audio_index == 3
        assert kinds(await call.answer(options=TEXT_ONLY))[-1] == "done"


async def test_a_call_that_is_never_configured_is_ended(world):
    await world.begin(limits=IDLE)
    await is_idle(Line(world.stub.Converse()))


async def test_every_message_is_a_sign_of_life(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.ready()
        [serving] = world.hosts[0].servicer._calls
        before = serving._idle_at
        await call.send(playback=pb.Playback(heard_ms=0))
        await eventually(lambda: serving._idle_at > before)


async def test_a_long_answer_is_no_silence(world):
    await world.begin(ENDLESS, limits=IDLE)
    async with world.call(session_id="s") as call:
        await call.speak(2)
        await call.send(commit=pb.Commit())
        await call.event("started")
        await asyncio.sleep(2 * IDLE.idle_seconds)
        await call.send(cancel=pb.Cancel())
        await call.event("cancelled")
        await is_idle(call)


async def test_an_answer_that_another_connection_tells_is_no_silence(world):
    await world.begin(ENDLESS, limits=IDLE)
    async with world.call(session_id="s") as call:
        await call.speak(2)
        await call.send(commit=pb.Commit())
        await call.event("started")
    async with world.call(session_id="s") as call:
        await call.ready()
        await asyncio.sleep(2 * IDLE.idle_seconds)
        await call.send(cancel=pb.Cancel())
        await call.event("cancelled")
        await is_idle(call)


async def test_a_client_that_is_gone_without_a_word_keeps_no_row(world, monkeypatch):
    """Its line is a black hole: no end of the connection is ever seen, only pings that nobody answers."""
    monkeypatch.setattr(server, "PING_TIMEOUT_SECONDS", 0.5)
    host = await world.begin(window=0.3, settings=Settings(listen="127.0.0.1:0", keepalive_seconds=1))
    async with Proxy(host.target) as proxy, grpc.aio.insecure_channel(proxy.address) as channel:
        call = Line(KimiAudioStub(channel).Converse())
        await call.send(config=pb.CallConfig(session_id="s", input_format=FORMAT))
        await call.ready()
        await asyncio.sleep(2)  # pings are answered: longer than a dead client would last
        assert set((await world.reserved()).values()) == {1}
        proxy.silence()

        async def free():
            return set((await world.reserved()).values()) == {0}

        await world.until_async(free)
        call.stream.cancel()


# ---- deadlines --------------------------------------------------------------------------------------------------


async def test_the_deadline_of_a_call_is_that_of_its_turns(world):
    await world.begin()
    call = Line(world.stub.Converse(timeout=30))
    await call.send(config=pb.CallConfig(session_id="s", input_format=FORMAT))
    await call.send(say=pb.Say(text="hello"))
    spec = await world.spec((await call.event("started")).turn_id)
    assert 0 < spec.deadline.ToNanoseconds() / 1e9 - time.time() < 31
    call.stream.cancel()


# ---- turns ------------------------------------------------------------------------------------------------------


async def test_a_call_is_ready_with_its_session_and_formats(world):
    await world.begin()
    async with world.call(
        options=TurnOptions(output_format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000))
    ) as call:
        ready = await call.ready()
    assert ready.session_id
    assert ready.next_audio_index == 0
    assert ready.output_format.encoding == ENCODING_MULAW
    async with world.call(session_id="mine") as call:
        ready = await call.ready()
    assert (ready.session_id, ready.output_format) == ("mine", NATIVE)


async def test_sound_is_stored_and_answered(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.speak(5)
        events = await call.answer()
    assert kinds(events)[0] == "started"
    assert kinds(events)[-1] == "done"
    assert indices(events, "text") == list(range(len(indices(events, "text"))))
    assert indices(events, "audio") == list(range(len(indices(events, "audio"))))
    assert read_pcm(pcm_of(events))
    assert events[-1].done.text == text_of(events)
    log = await world.journal.read(events[0].turn_id, "input")
    assert [chunk.input.clip_end for chunk in log] == [False] * 5 + [True]
    assert log[-1].final


async def test_sound_that_comes_together_is_stored_together(world):
    host = await world.begin()
    ready = asyncio.Event()

    async def requests():
        yield pb.ConverseRequest(config=pb.CallConfig(session_id="s", input_format=FORMAT))
        await ready.wait()
        for index in range(5):
            yield pb.ConverseRequest(audio=pb.CallerAudio(index=index, data=sound(1, salt=index)))
        yield pb.ConverseRequest(commit=pb.Commit())

    told = []
    async for response in Call(host.desk, lambda: SECONDS).responses(requests()):
        told.append(response)
        ready.set()
    assert [response.audio_received.index for response in told if response.HasField("audio_received")] == [4]
    log = await world.journal.read(told[-1].event.turn_id, "input")
    assert [chunk.input.data for chunk in log] == [*(sound(1, salt=index) for index in range(5)), b""]


async def test_the_second_turn_knows_the_first_and_encodes_only_what_is_new(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.speak(5, salt=1)
        first = await call.answer()
        await call.speak(7, salt=2)
        second = await call.answer(options=TEXT_ONLY)
    spec = await world.spec(second[0].turn_id)
    assert [message.WhichOneof("content") for message in spec.messages] == ["audio", "spoken", "audio"]
    assert known(spec)[0][1] > 0
    assert known(spec)[2] == (0, 0)
    assert list(spec.messages[1].spoken.clip.codes) == [code for _, code in read_pcm(pcm_of(first))]
    encoded = await world.journal.read(second[0].turn_id, "encoded")
    assert {chunk.encoded.clip for chunk in encoded} == {spec.messages[2].audio.number} == {0}


async def test_text_and_sound_keep_their_order(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="first this:"))
        await call.speak(2)
        await call.send(text=pb.CallerText(text="then that:"))
        await call.speak(2, salt=4)
        events = await call.answer(options=TEXT_ONLY)
    spec = await world.spec(events[0].turn_id)
    assert [message.WhichOneof("content") for message in spec.messages] == ["text", "audio", "text", "audio"]
    log = await world.journal.read(events[0].turn_id, "input")
    assert [(chunk.input.clip, chunk.input.clip_end) for chunk in log] == [
        (0, False),
        (0, False),
        (0, True),
        (1, False),
        (1, False),
        (1, True),
    ]


async def test_the_next_question_is_collected_during_the_answer(world):
    await world.begin(STEADY)
    async with world.call(session_id="s") as call:
        await call.speak(3)
        await call.send(commit=pb.Commit())
        await call.event("started")
        await call.speak(4, salt=2)
        await call.event("done")
        second = await call.answer(options=TEXT_ONLY)
    spec = await world.spec(second[0].turn_id)
    assert len(spec.messages) == 3


async def test_a_text_is_said_in_between(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.speak(2)
        await call.send(say=pb.Say(text="one moment please"))
        said = await call.turn()
        answered = await call.answer(options=TEXT_ONLY)
    assert text_of(said) == "one moment please"
    spec = await world.spec(answered[0].turn_id)
    assert [message.WhichOneof("content") for message in spec.messages] == ["spoken", "audio"]


async def test_options_of_the_call_and_of_the_commit(world):
    await world.begin()
    async with world.call(options=TurnOptions(seed=4, max_new_tokens=10)) as call:
        await call.send(text=pb.CallerText(text="hello"))
        events = await call.answer(options=TurnOptions(max_new_tokens=12))
    assert events[0].started.seed == 4
    assert events[-1].done.usage.steps == 12


async def test_a_conversation_before_the_call(world):
    await world.begin()
    async with world.call(session_id="s", messages=[speaks(3), asks("and this?")]) as call:
        await call.send(text=pb.CallerText(text="go on"))
        first = await call.answer(options=TEXT_ONLY)
        await call.send(text=pb.CallerText(text="and now?"))
        second = await call.answer(options=TEXT_ONLY)
    spec = await world.spec(first[0].turn_id)
    assert [message.WhichOneof("content") for message in spec.messages] == ["audio", "text", "text"]
    assert list(spec.route) == [1, 2]
    assert list((await world.spec(second[0].turn_id)).route) == [2]


async def test_a_conversation_before_the_call_belongs_to_a_new_session(world):
    await world.begin()
    await world.generate(session_id="s", options=TEXT_ONLY)
    async with world.call(session_id="s", messages=[asks()]) as call:
        error = await call.error()
    assert isinstance(error, RequestError)
    assert error.field == "config.messages"


async def test_clear_gives_up_what_was_collected(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.speak(3)
        await call.send(clear=pb.Clear())
        await call.speak(2, salt=3)
        events = await call.answer(options=TEXT_ONLY)
        assert call.next_audio == 5
    log = await world.journal.read(events[0].turn_id, "input")
    assert sum(len(chunk.input.data) for chunk in log) == 2 * PIECE
    assert (await world.session("s")).next_audio_index == 5


async def test_a_failed_turn_does_not_end_the_call(world):
    await world.begin(STEADY)
    async with world.call(session_id="s") as call:
        await call.send(say=pb.Say(text="as long as it takes to fail"))
        await world.journal.fail((await call.event("started")).turn_id, Failure(code=13, reason="BROKEN"))
        failed = await call.turn()
        await call.send(text=pb.CallerText(text="hello"))
        answered = await call.answer(options=TEXT_ONLY)
    assert failed[-1].failed.reason == "BROKEN"
    assert answered[-1].HasField("done")
    assert len((await world.spec(answered[0].turn_id)).messages) == 1


async def test_a_call_ends_when_the_client_has_said_all_and_its_turn_has_ended(world):
    await world.begin(STEADY)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="hello"))
        await call.send(commit=pb.Commit(options=TEXT_ONLY))
        await call.stream.done_writing()
        events = await call.turn()
        assert await call.read() is None
    assert events[-1].HasField("done")

    async def released():
        return set((await world.reserved()).values()) == {0}

    await world.until_async(released)


# ---- barge-in ---------------------------------------------------------------------------------------------------


async def interrupted(world, call, chunks=3, **cancel):
    """A turn that is cancelled after so many pieces of speech."""
    await call.send(text=pb.CallerText(text="tell me a long story"))
    await call.send(commit=pb.Commit())
    turn_id = (await call.event("started")).turn_id
    for _ in range(chunks):
        await call.event("audio")
    await call.send(cancel=pb.Cancel(**cancel))
    return turn_id, await call.event("cancelled")


async def test_barge_in_cuts_the_history_to_what_was_heard(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        turn_id, cancelled = await interrupted(world, call, heard_ms=800)
        assert cancelled.cancelled.heard_codes == 10
        await call.send(text=pb.CallerText(text="stop"))
        await call.send(commit=pb.Commit())
        second = (await call.event("started")).turn_id
    tokens = await world.journal.read(turn_id, "tokens")
    spec = await world.spec(second)
    assert spec.messages[1] == answer_of(tokens, 10).message
    assert len(spec.messages[1].spoken.clip.codes) == 10
    assert spec.messages[2].text.text == "stop"


async def test_barge_in_frees_the_rows(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        await interrupted(world, call)

        async def free():
            return not world.rows_used()

        await world.until_async(free)


BRIEF = TurnOptions(output_type=OUTPUT_TYPE_TEXT, max_new_tokens=5)


async def paced(world, call):
    """A turn that is parked in both stages, since its caller has heard nothing of it yet."""
    await call.send(text=pb.CallerText(text="tell me a long story"))
    await call.send(commit=pb.Commit())
    await call.send(playback=pb.Playback())

    async def parked():
        return world.rows_used() == 0 and sum(worker._rows.parked for worker in world.running) == 2

    await world.until_async(parked)
    return (await call.event("started")).turn_id


async def test_what_the_caller_says_of_its_playback_paces_the_turn(world):
    await world.begin(ENDLESS)
    async with world.call() as call:
        turn_id = await paced(world, call)
        given = sum(map(sound_seconds, await world.journal.read(turn_id, "audio")))
        await call.send(playback=pb.Playback(heard_ms=5000, age_ms=1000))
        playback = await heard_at_least(world, turn_id, 5.0)
        assert playback.age >= 1.0

        async def more():
            return sum(map(sound_seconds, await world.journal.read(turn_id, "audio"))) >= max(given, 9.0)

        await world.until_async(more)


async def heard_at_least(world, turn_id, seconds):
    async with asyncio.timeout(10):
        while True:
            playback = await world.journal.playback(turn_id)
            if playback and playback.heard >= seconds:
                return playback
            await asyncio.sleep(0.005)


async def test_a_cancel_ends_a_parked_turn_and_nothing_of_it_follows(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        turn_id = await paced(world, call)
        await call.send(cancel=pb.Cancel(heard_ms=1200))
        cancelled = await call.event("cancelled")
        assert cancelled.cancelled.heard_codes == 15
        await eventually(lambda: not any(worker._rows.used or worker._rows.parked for worker in world.running))
        await call.send(text=pb.CallerText(text="and now?"))
        second = await call.answer(options=BRIEF)
        spec = await world.spec(second[0].turn_id)
    told = [event.turn_id for event in events_of(call)]
    assert turn_id not in told[told.index(second[0].turn_id) :]
    assert spec.messages[1] == answer_of(await world.journal.read(turn_id, "tokens"), 15).message


async def test_after_a_cancel_was_told_no_byte_of_the_turn_follows(world):
    """While both stages compute and the client's queue is full of speech."""
    await world.begin(ENDLESS)
    async with world.call() as call:
        for _ in range(3):
            turn_id, cancelled = await interrupted(world, call, chunks=5, heard_ms=400)
            assert cancelled.turn_id == turn_id
            before = await world.journal.read(turn_id, "audio")
            await call.send(text=pb.CallerText(text="and now?"))
            answered = await call.answer(options=BRIEF)
            assert {event.turn_id for event in answered} == {answered[0].turn_id}
            assert await world.journal.read(turn_id, "audio") == before


async def test_playback_says_what_was_heard(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        for _ in range(3):
            await call.event("audio")
        await call.send(playback=pb.Playback(heard_ms=480))
        await call.send(cancel=pb.Cancel())
        assert (await call.event("cancelled")).cancelled.heard_codes == 6


async def test_nobody_hears_more_than_was_sent(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        turn_id, cancelled = await interrupted(world, call, heard_ms=10_000_000)
        sent = sum(len(event.audio.data) for event in events_of(call)) // 2 // 1920
    codes = cancelled.cancelled.heard_codes
    assert codes >= 6 + 12 + 24
    assert sent <= codes <= sum(len(chunk.speech.pcm) for chunk in await world.journal.read(turn_id, "audio")) // 3840


def events_of(call):
    return [response.event for response in call.seen if response.HasField("event")]


async def test_cancel_after_the_end_cuts_what_is_remembered(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="hello"))
        await call.answer()
        await call.send(playback=pb.Playback(heard_ms=400))
        await call.send(cancel=pb.Cancel())
        assert (await call.event("cancelled")).cancelled.heard_codes == 5
        await call.send(text=pb.CallerText(text="wait"))
        second = await call.answer(options=TEXT_ONLY)
    spec = await world.spec(second[0].turn_id)
    assert len(spec.messages[1].spoken.clip.codes) == 5


async def test_cancel_with_nothing_to_cancel_is_answered(world):
    await world.begin()
    async with world.call() as call:
        await call.send(cancel=pb.Cancel())
        event = await call.event("cancelled")
        assert (event.turn_id, event.cancelled.heard_codes) == ("", 0)


async def test_commit_right_behind_cancel(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        await call.event("audio")
        await call.send(text=pb.CallerText(text="no, this"))
        await call.send(cancel=pb.Cancel(heard_ms=80))
        await call.send(commit=pb.Commit())
        await call.event("cancelled")
        second = (await call.event("started")).turn_id
    assert (await world.spec(second)).messages[2].text.text == "no, this"


# ---- lost connections -------------------------------------------------------------------------------------------


async def test_what_was_stored_before_the_connection_was_lost_is_answered(world):
    await world.begin()
    await world.host()
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="listen:"))
        await call.speak(3)
        await call.send(text=pb.CallerText(text="lost"))
    async with world.call(host=1, session_id="s") as call:
        ready = await call.ready()
        assert ready.next_audio_index == 3
        call.next_audio = 3
        await call.send(audio=pb.CallerAudio(index=2, data=bytes(PIECE)))  # not sure whether it had arrived
        await call.speak(2, salt=5)
        events = await call.answer(options=TEXT_ONLY)
    spec = await world.spec(events[0].turn_id)
    assert [message.WhichOneof("content") for message in spec.messages] == ["text", "audio"]
    log = await world.journal.read(events[0].turn_id, "input")
    assert sum(bool(chunk.input.data) for chunk in log) == 5


async def test_a_turn_goes_on_and_is_resumed_beside_the_new_call(world):
    await world.begin(STEADY)
    await world.host()
    async with world.call(session_id="s") as call:
        await call.speak(3)
        await call.send(commit=pb.Commit())
        turn_id = (await call.event("started")).turn_id
        await call.event("audio")
    received = events_of(call)
    async with world.call(host=1, session_id="s") as call:
        await call.ready()
        last_audio, last_text = indices(received, "audio")[-1], indices(received, "text")[-1]
        rest = await world.resume(turn_id, last_audio, last_text, host=1)
        await call.send(text=pb.CallerText(text="next"))
        second = await call.answer(options=TEXT_ONLY)
    whole = await world.resume(turn_id)
    assert pcm_of(received + rest) == pcm_of(whole)
    assert text_of(received + rest) == text_of(whole)
    assert len((await world.spec(second[0].turn_id)).messages) == 3


async def test_a_commit_that_is_sent_again_follows_its_turn(world):
    await world.begin(STEADY)
    await world.host()
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="hello"))
        await call.send(commit=pb.Commit(idempotency_key="k"))
        turn_id = (await call.event("started")).turn_id
    for host in (1, 0):
        async with world.call(host=host, session_id="s") as call:
            await call.send(text=pb.CallerText(text="hello"))
            events = await call.answer(idempotency_key="k")
        assert events[0].turn_id == turn_id
        assert events[-1].HasField("done")
        assert indices(events, "audio") == list(range(len(indices(events, "audio"))))
    assert len((await world.session("s")).messages) == 2


async def test_what_was_heard_is_known_after_the_connection_was_lost(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        for _ in range(2):
            await call.event("audio")
        await call.send(playback=pb.Playback(heard_ms=320))
        await call.send(audio=pb.CallerAudio(index=0, data=bytes(PIECE)))
        await call.until(lambda _: True, "audio_received")

    async def noted():
        return (await world.journal.load_session("s"))[0].heard_ms == 320

    await world.until_async(noted)
    async with world.call(session_id="s") as call:
        await call.send(cancel=pb.Cancel())
        assert (await call.event("cancelled")).cancelled.heard_codes == 4


async def test_a_running_turn_of_an_earlier_call_must_end_first(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        await call.event("started")
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="next"))
        await call.send(commit=pb.Commit())
        assert isinstance(await call.error(), StateError)


async def test_nothing_is_followed_for_a_client_that_vanished_as_its_turn_began(world, monkeypatch):
    await world.begin(ENDLESS)
    turns, vanish = world.hosts[0].desk.turns, asyncio.Event()
    follow = turns.follow_started

    async def followed(*args):
        following = await follow(*args)
        vanish.set()
        try:
            await asyncio.sleep(SECONDS)
        except asyncio.CancelledError:  # lost, as redis-py loses one that comes with an answer
            return following
        raise AssertionError("not cancelled")

    monkeypatch.setattr(turns, "follow_started", followed)
    async with world.call(session_id="s") as call:
        await call.ready()
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        await vanish.wait()
    await world.afterwards()
    assert world.hosts[0].inbox._feeds == {}
    assert [task for task in asyncio.all_tasks() if "_told" in repr(task.get_coro())] == []


async def test_rows_stay_reserved_for_a_client_that_may_come_back(world):
    await world.begin(rows=1)
    async with world.call(session_id="s") as call:
        await call.ready()
    async with world.call(session_id="other") as call:
        assert isinstance(await call.error(), CapacityError)
    async with world.call(session_id="s") as call:
        await call.ready()


async def test_rows_of_a_client_that_does_not_come_back_are_given_to_others(world):
    await world.begin(rows=1, window=0.1)
    async with world.call(session_id="s") as call:
        await call.ready()

    async def free():
        return set((await world.reserved()).values()) == {0}

    await world.until_async(free)


async def test_a_process_that_stops_lets_its_calls_go_between_turns(world):
    host = await world.begin(STEADY)
    async with world.call(session_id="idle") as idle, world.call(session_id="busy") as busy:
        await idle.ready()
        await busy.send(text=pb.CallerText(text="hello"))
        await busy.send(commit=pb.Commit())
        await busy.event("started")
        draining = asyncio.create_task(host.servicer.drain(10))
        assert isinstance(await idle.error(), UnavailableError)
        await busy.event("done")
        assert isinstance(await busy.error(), UnavailableError)
        await draining
    async with world.call(session_id="idle") as call:
        assert isinstance(await call.error(), UnavailableError)


# ---- refused ----------------------------------------------------------------------------------------------------

WRONG = {
    "audio before config": ([{"audio": pb.CallerAudio(data=bytes(PIECE))}], StateError, "audio"),
    "config twice": ([{"config": pb.CallConfig(input_format=FORMAT)}] * 2, StateError, "config"),
    "a file": (
        [{"config": pb.CallConfig(input_format=AudioFormat(encoding=ENCODING_FILE))}],
        RequestError,
        "config.input_format.encoding",
    ),
    "endpointing": (
        [{"config": pb.CallConfig(input_format=FORMAT, server_endpointing=True)}],
        UnsupportedError,
        "config.server_endpointing",
    ),
    "a wrong session": (
        [{"config": pb.CallConfig(input_format=FORMAT, session_id="a b")}],
        RequestError,
        "config.session_id",
    ),
    "a wrong tenant": (
        [{"config": pb.CallConfig(input_format=FORMAT, caller={"tenant": "a b"})}],
        RequestError,
        "config.caller.tenant",
    ),
}
WRONG |= {
    name: ([{"config": pb.CallConfig(input_format=FORMAT)}, *messages], kind, field)
    for name, (messages, kind, field) in {
        "commit of nothing": ([{"commit": pb.Commit()}], StateError, "commit"),
        "a gap": ([{"audio": pb.CallerAudio(index=1, data=bytes(PIECE))}], RequestError, "audio.index"),
        "half a sample": ([{"audio": pb.CallerAudio(data=bytes(3))}], RequestError, "audio.data"),
        "too much": ([{"audio": pb.CallerAudio(data=bytes(65538))}], RequestError, "audio.data"),
        "speculate": ([{"speculate": pb.Speculate()}], UnsupportedError, "speculate"),
        "confirm": ([{"confirm": pb.Confirm()}], UnsupportedError, "confirm"),
        "retract": ([{"retract": pb.Retract()}], UnsupportedError, "retract"),
        "wrong options": (
            [{"text": pb.CallerText(text="a")}, {"commit": pb.Commit(options=TurnOptions(preset="x"))}],
            RequestError,
            "commit.options.preset",
        ),
        "a second turn": (
            [{"text": pb.CallerText(text="a")}, {"commit": pb.Commit()}, {"say": pb.Say(text="b")}],
            StateError,
            "say",
        ),
        "nothing": ([{}], RequestError, "content"),
    }.items()
}


@pytest.mark.parametrize("name", WRONG)
async def test_a_wrong_order_ends_the_call_with_its_reason(world, name):
    messages, kind, field = WRONG[name]
    await world.begin(ENDLESS)
    call = Line(world.stub.Converse())
    for message in messages:
        await call.send(**message)
    error = await call.error()
    assert type(error) is kind
    assert error.field == field
    call.stream.cancel()


async def test_sound_has_a_limit(world):
    await world.begin(limits=Limits(turn_bytes=3 * PIECE))
    async with world.call() as call:
        await call.speak(3)
        await call.send(audio=pb.CallerAudio(index=3, data=bytes(PIECE)))
        assert (await call.error()).field == "audio.data"


async def test_without_capacity_no_call_begins(world):
    await world.host()
    async with world.call(session_id="s") as call:
        error = await call.error()
    assert isinstance(error, CapacityError)
    assert error.retry_after > 0
    assert await world.keys("s:") == []


async def test_ids_that_are_none_name_their_field(world):
    await world.begin()
    async with world.call(session_id="a b") as call:
        assert (await call.error()).field == "config.session_id"
    async with world.call() as call:
        await call.send(cancel=pb.Cancel(turn_id="x" * 200))
        assert (await call.error()).field == "cancel.turn_id"


async def test_the_session_of_another_tenant_is_not_found(world):
    await world.begin()
    await world.generate(session_id="s", options=TEXT_ONLY)
    async with world.call(session_id="s", caller={"tenant": "other"}) as call:
        assert isinstance(await call.error(), NotFoundError)


async def test_a_session_deleted_during_its_call_ends_it(world):
    await world.begin(ENDLESS)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        await call.event("audio")
        await world.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        assert isinstance(await call.error(), NotFoundError)


async def test_rows_of_a_call_that_its_own_mistake_has_ended_are_free_at_once(world):
    await world.begin(rows=1)
    async with world.call(session_id="s") as call:
        await call.ready()
        await call.send(commit=pb.Commit())
        assert isinstance(await call.error(), StateError)

    async def free():
        return set((await world.reserved()).values()) == {0}

    await world.until_async(free)


async def test_rows_of_a_turn_that_goes_on_stay_reserved_after_a_mistake(world):
    await world.begin(ENDLESS, rows=1)
    async with world.call(session_id="s") as call:
        await call.send(text=pb.CallerText(text="tell me"))
        await call.send(commit=pb.Commit())
        await call.event("started")
        await call.send(commit=pb.Commit())
        assert isinstance(await call.error(), StateError)
    await world.afterwards()
    assert set((await world.reserved()).values()) == {1}


async def test_a_request_beside_a_call_leaves_the_rows_of_the_call(world):
    await world.begin(rows=1)
    async with world.call(session_id="s") as call:
        await call.ready()
        await world.generate(session_id="s")
        await world.afterwards(calls=1)
        assert set((await world.reserved()).values()) == {1}
        await call.send(text=pb.CallerText(text="next"))
        assert kinds(await call.answer())[-1] == "done"


async def test_another_tenant_does_not_touch_the_rows_of_a_call(world):
    await world.begin(rows=1)
    async with world.call(session_id="s") as call:
        await call.ready()
        before = await world.wire.journal.hgetall("{ledger}:session:s")
        with pytest.raises(grpc.RpcError) as caught:
            await world.generate(session_id="s", caller={"tenant": "other"})
        assert isinstance(from_rpc_error(caught.value), NotFoundError)
        async with world.call(session_id="s", caller={"tenant": "other"}) as other:
            assert isinstance(await other.error(), NotFoundError)
        assert await world.wire.journal.hgetall("{ledger}:session:s") == before


# ---- a process that dies ----------------------------------------------------------------------------------------


async def dies_before_submitting(turns, monkeypatch):
    """A process whose turns are claimed and never submitted."""

    async def die(*_):
        raise asyncio.CancelledError

    monkeypatch.setattr(turns, "_submit", die)
    monkeypatch.setattr(turn_module, "STARTING_SECONDS", 0.05)


async def test_a_turn_that_was_claimed_is_submitted_by_the_next_process(world, monkeypatch):
    host = await world.begin()
    await world.host()
    await dies_before_submitting(host.desk.turns, monkeypatch)
    async with world.call(session_id="s") as call:
        await call.speak(3)
        await call.send(commit=pb.Commit(idempotency_key="k"))

        async def claimed():
            return bool((await world.journal.load_session("s"))[0].running_turn_id)

        await world.until_async(claimed)
    async with world.call(host=1, session_id="s") as call:
        assert (await call.ready()).next_audio_index == 3
        events = await call.answer(idempotency_key="k")
    assert events[-1].HasField("done")
    log = await world.journal.read(events[0].turn_id, "input")
    assert sum(bool(chunk.input.data) for chunk in log) == 3
    assert [chunk.final for chunk in log] == [False, False, False, True]


async def test_it_is_submitted_even_if_nobody_asks_for_it(world, monkeypatch):
    host = await world.begin()
    await world.host()
    await dies_before_submitting(host.desk.turns, monkeypatch)
    async with world.call(session_id="s") as call:
        await call.ready()
        await call.send(text=pb.CallerText(text="hello"))
        await call.send(commit=pb.Commit(options=TEXT_ONLY))

        async def claimed():
            return bool((await world.session("s")).running_turn_id)

        await world.until_async(claimed)
    async with world.call(host=1, session_id="s") as call:
        await call.ready()

        async def answered():
            return len((await world.hosts[1].stub.GetSession(pb.GetSessionRequest(session_id="s"))).messages) == 2

        await world.until_async(answered)
