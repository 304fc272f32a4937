import asyncio

import grpc
import pytest

from kimia.errors import NotFoundError, UnavailableError
from kimia.status import from_rpc_error
from kimia.v1 import kimi_audio_pb2 as pb
from tests.orchestrator.world import ENDLESS, STEADY, TEXT_ONLY, asks, speaks

pytestmark = pytest.mark.unit


async def error_of(call):
    with pytest.raises(grpc.RpcError) as caught:
        await call
    return from_rpc_error(caught.value)


async def test_a_session_tells_what_it_remembers(world):
    await world.begin()
    events = await world.generate(speaks(), asks("what?"), session_id="s")
    session = await world.session("s")
    assert session.session_id == "s"
    assert [message.WhichOneof("content") for message in session.messages] == ["audio", "text", "spoken"]
    heard, said = session.messages[0].audio, session.messages[2].spoken
    assert heard.codes
    assert said.clip.codes
    assert said.transcript.ids
    assert not heard.data
    assert not heard.feature_keys
    assert not heard.source_turn
    assert list(session.turn_ids) == [events[0].turn_id]
    assert session.running_turn_id == ""
    life = session.expire_time.ToMilliseconds() - session.create_time.ToMilliseconds()
    assert 3_590_000 < life < 3_620_000


async def test_a_session_tells_what_is_running(world):
    await world.begin(ENDLESS)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id="s"))
    turn_id = (await stream.read()).event.turn_id
    session = await world.session("s")
    assert session.running_turn_id == turn_id
    assert [message.text.text for message in session.messages] == ["hello"]
    stream.cancel()


async def test_a_session_tells_how_much_sound_was_stored(world):
    await world.begin()
    async with world.call(session_id="s") as call:
        await call.speak(4)
        assert (await world.session("s")).next_audio_index == 4


async def test_deleting_a_session_leaves_nothing_of_it(world):
    await world.begin(STEADY)
    await world.generate(speaks(), session_id="s")
    async with world.call(session_id="s") as call:
        await call.speak(3, salt=2)
        await call.send(commit=pb.Commit())
        await call.event("audio")
        await call.speak(2, salt=3)
        await world.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        assert isinstance(await call.error(), NotFoundError)

    async def free():
        return not world.rows_used()

    await world.until_async(free)
    assert [key for key in await world.keys("") if key.split(":")[1] in ("turn", "session", "idem", "blob")] == []
    assert set((await world.reserved()).values()) == {0}
    assert isinstance(await error_of(world.stub.GetSession(pb.GetSessionRequest(session_id="s"))), NotFoundError)


@pytest.mark.parametrize("method", ["GetSession", "DeleteSession"])
@pytest.mark.parametrize("tenant", ["", "other"])
async def test_sessions_that_are_not_there_or_of_another_tenant(world, method, tenant):
    await world.begin()
    if tenant:
        await world.generate(session_id="s", options=TEXT_ONLY)
    request = getattr(pb, f"{method}Request")(session_id="s", caller={"tenant": tenant})
    assert isinstance(await error_of(getattr(world.stub, method)(request)), NotFoundError)


async def test_requests_are_refused_while_the_process_stops(world):
    host = await world.begin()
    await host.servicer.drain(1)
    error = await error_of(world.stub.GetSession(pb.GetSessionRequest(session_id="s")))
    assert isinstance(error, UnavailableError)
    assert error.retry_after > 0


async def test_a_running_request_may_end_while_the_process_stops(world):
    host = await world.begin(STEADY)
    stream = world.stub.Generate(pb.GenerateRequest(messages=[asks()], session_id="s"))
    events = [(await stream.read()).event]
    draining = asyncio.create_task(host.servicer.drain(10))
    while (response := await stream.read()) is not grpc.aio.EOF:
        events.append(response.event)
    await draining
    assert events[-1].HasField("done")
