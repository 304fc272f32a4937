"""The SDK against the real orchestrator, a real journal and workers with fake stages, over a line that is cut."""

import asyncio
from dataclasses import replace

import pytest

from kimia.client import AsyncKimia, AudioChunk, Kimia, TextDelta, TurnCancelled, TurnDone
from kimia.errors import NotFoundError, RequestError
from kimia.runtime.settings import Settings
from kimia.streams.wire import Wire, WireOptions
from tests.client.proxy import Proxy
from tests.client.scripted import FAST
from tests.client.turns import QUESTION
from tests.orchestrator.world import ENDLESS, STEADY, World, sound

pytestmark = pytest.mark.unit

SECONDS = 20


@pytest.fixture
async def world(valkey_url):
    """A journal without workers and orchestrators yet."""
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=0.5))
    async with World(wire) as world:
        yield world
    await wire.aclose()


def spoken(answer) -> tuple[str, bytes]:
    return answer.text, answer.pcm


async def test_a_turn_whose_line_is_cut_again_and_again(world) -> None:
    host = await world.begin(STEADY)
    other = await world.host()
    async with Proxy(host.target) as proxy, AsyncKimia(proxy.address, options=FAST) as kimia:
        turn = kimia.generate(QUESTION, seed=7)
        count = 0
        async for event in turn:
            count += 1
            if count % 7 == 2 and not isinstance(event, TurnDone):
                await proxy.cut(other.target if proxy.target == host.target else host.target)
        assert proxy.connections > 3
        undisturbed = await kimia.generate(QUESTION, seed=7).collect()
    assert spoken(turn.progress.answer()) == spoken(undisturbed)
    assert len(undisturbed.pcm) > 0


async def test_a_call_whose_line_is_cut_again_and_again(world) -> None:
    host = await world.begin(STEADY)
    other = await world.host()
    said = sound(12)
    async with Proxy(host.target) as proxy, AsyncKimia(proxy.address, options=FAST) as kimia:
        async with asyncio.timeout(SECONDS), kimia.converse(seed=7) as call:
            for start in range(0, len(said), 3200):
                call.send_audio(said[start : start + 3200])
                if start == 16000:
                    await proxy.cut(other.target)
            call.send_text("And now?")
            call.commit()
            count = 0
            async for event in call.turn():
                count += 1
                if count in (1, 5, 11) and not isinstance(event, TurnDone):
                    await proxy.cut(host.target if proxy.target == other.target else other.target)
            disturbed = call.state.last.answer()
            session = await kimia.session(call.session_id)
        async with kimia.converse(seed=7) as call:
            call.send_audio(said)
            call.send_text("And now?")
            call.commit()
            undisturbed = await call.answer()
    assert spoken(disturbed) == spoken(undisturbed)
    assert session.next_audio_index == 12
    assert [message.WhichOneof("content") for message in session.messages] == ["audio", "text", "spoken"]


async def test_a_turn_whose_line_falls_silent_goes_on_elsewhere(world) -> None:
    """No end of the connection is ever seen: only pings that nobody answers."""
    pinged = Settings(listen="127.0.0.1:0", keepalive_seconds=1)
    host, other = await world.begin(STEADY, settings=pinged), await world.host(settings=pinged)
    pinging = (("grpc.keepalive_time_ms", 1000), ("grpc.http2.ping_timeout_ms", 300))
    options = replace(FAST, channel=(*FAST.channel, *pinging))
    async with Proxy(host.target) as proxy, AsyncKimia(proxy.address, options=options) as kimia:
        async with asyncio.timeout(SECONDS):
            turn, count = kimia.generate(QUESTION, seed=7), 0
            async for _ in turn:
                count += 1
                if count == 5:
                    proxy.silence(other.target)
        undisturbed = await kimia.generate(QUESTION, seed=7).collect()
    assert proxy.connections == 2
    assert spoken(turn.progress.answer()) == spoken(undisturbed)


async def test_a_call_of_several_turns(world) -> None:
    host = await world.begin(STEADY)
    async with AsyncKimia(host.target, options=FAST) as kimia, asyncio.timeout(SECONDS):
        async with kimia.converse(output_type="text") as call:
            call.send_text("One.")
            call.commit()
            first = await call.answer()
            call.say("Two.", output_rate=8000, output_encoding="mulaw")
            second = await call.answer()
            call.send_text("Three.")
            call.commit("both")
            third = await call.answer()
            call.finish()
            assert [event async for event in call] == []
        session = await kimia.session(call.session_id)
    assert session.turn_ids == (first.turn_id, second.turn_id, third.turn_id)
    assert (len(first.pcm), second.text, second.encoding, second.sample_rate) == (0, "Two.", "mulaw", 8000)
    assert len(third.pcm) > 0


async def test_barge_in_keeps_what_was_heard(world) -> None:
    host = await world.begin(ENDLESS)
    async with AsyncKimia(host.target, options=FAST) as kimia, asyncio.timeout(SECONDS):
        async with kimia.converse() as call:
            call.send_text("Tell me everything.")
            call.commit()
            events = []
            async for event in call.turn():
                events.append(event)
                if isinstance(event, AudioChunk) and event.index == 0:
                    call.cancel(heard_ms=240)
            assert events[-1] == TurnCancelled(events[0].turn_id, 3)
        session = await kimia.session(call.session_id)
    assert len(session.messages[-1].spoken.clip.codes) == 3


async def test_the_blocking_client(world) -> None:
    host = await world.begin(STEADY)

    def talk() -> tuple:
        with Kimia(host.target, options=FAST) as kimia, kimia.converse(seed=3) as call:
            call.send_audio(sound(5))
            call.commit()
            first = call.answer()
            call.say("Goodbye.")
            kinds = [type(event) for event in call.turn()]
            call.finish()
            rest = list(call)
            kimia.delete_session(call.session_id)
            with pytest.raises(NotFoundError):
                kimia.session(call.session_id)
            return first, kinds, rest

    first, kinds, rest = await asyncio.to_thread(talk)
    assert len(first.pcm) > 0
    assert [kinds.count(kind) > 0 for kind in (TextDelta, AudioChunk, TurnDone)] == [True] * 3
    assert rest == []
    assert [stage.stage for stage in first.latency.stages] == ["tokenizer", "llm", "detokenizer"]


async def test_two_requests_with_one_key_are_one_turn(world) -> None:
    host = await world.begin(STEADY)
    async with AsyncKimia(host.target, options=FAST) as kimia:
        first = await kimia.generate(QUESTION, idempotency_key="key", session="s").collect()
        second = await kimia.generate(QUESTION, idempotency_key="key", session="s").collect()
    assert first.turn_id == second.turn_id
    assert spoken(first) == spoken(second)


async def test_refusals_name_the_field(world) -> None:
    host = await world.begin(STEADY)
    async with AsyncKimia(host.target, options=FAST) as kimia:
        with pytest.raises(RequestError, match="preset"):
            await kimia.generate(QUESTION, preset="slow").collect()
        with pytest.raises(NotFoundError):
            await kimia.resume("no.turn").collect()
