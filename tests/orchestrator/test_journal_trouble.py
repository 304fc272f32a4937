"""The journal is killed, loses writes, changes to a replica: callers hear everything once, as if nothing had been."""

import asyncio
from contextlib import asynccontextmanager
from itertools import zip_longest

import pytest

from kimia.client import AsyncKimia
from kimia.runtime.fake import FakeTiming
from kimia.streams import keys
from kimia.streams.wire import Wire, WireOptions
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.conversation_pb2 import TurnOptions
from tests.client.proxy import Proxy
from tests.client.scripted import FAST
from tests.orchestrator.world import World, indices, kinds, pcm_of, sound, speaks, text_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

SEEDED = TurnOptions(seed=7)
TALKING = FakeTiming(steps=50, step_seconds=0.02, realtime_factor=0.05)
SECONDS = 60  # no test waits longer, however busy the machine


@asynccontextmanager
async def wired(url, partitions=1, lease=0.5):
    """Connections to the journal."""
    wire = await Wire.connect(url, options=WireOptions(partitions=partitions, lease=lease))
    try:
        yield wire
    finally:
        await wire.aclose()


@asynccontextmanager
async def served(url, partitions=1, lease=0.5, **settings):
    """Workers and an orchestrator."""
    async with wired(url, partitions, lease) as wire, World(wire) as world:
        await world.begin(TALKING, **settings)
        yield world


@asynccontextmanager
async def service(target, **settings):
    """The same, on a line to the journal that can be moved to another server."""
    async with Proxy(target) as line, served(f"redis://{line.address}/0", **settings) as world:
        yield world, line


def said(events):
    assert indices(events, "text") == list(range(len(indices(events, "text"))))
    assert indices(events, "audio") == list(range(len(indices(events, "audio"))))
    return kinds(events)[-1], text_of(events), pcm_of(events)


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


def commands(store):
    """Writes that a server has made, its expiry apart."""
    with store.client() as client:
        return int(client.info("persistence")["rdb_changes_since_last_save"])


class Caller:
    """Asks one question and hears the answer."""

    def __init__(self, world, session):
        self.session = session
        self.events = []
        request = pb.GenerateRequest(messages=[speaks()], options=SEEDED, session_id=session)
        self.answered = asyncio.create_task(self._listen(world.stub.Generate(request)))

    async def _listen(self, stream):
        async with asyncio.timeout(SECONDS):
            async for response in stream:
                self.events.append(response.event)
        return said(self.events)


async def callers(world, *counts, sessions=()):
    """Callers who have heard so many events of their answers."""
    found = [Caller(world, session or keys.new_session_id()) for session, _ in zip_longest(sessions, counts)]
    await until(lambda: all(len(one.events) >= count for one, count in zip(found, counts, strict=True)))
    assert not any(one.answered.done() for one in found)
    return found


async def agree(world, found, undisturbed):
    """Every caller has heard the same to its end, and every session remembers it."""
    for caller in found:
        assert await caller.answered == undisturbed
        record = await world.session(caller.session)
        assert [message.WhichOneof("content") for message in record.messages] == ["audio", "spoken"]
        assert record.running_turn_id == ""


@pytest.mark.parametrize("appendfsync", ["always", "everysec"])
async def test_it_is_killed_and_started_again(stores, appendfsync):
    store = stores.new(appendfsync=appendfsync).start()
    async with service(store.address) as (world, _):
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        found = await callers(world, 1, 5, 12)
        store.kill()
        await asyncio.to_thread(store.start)
        await agree(world, found, undisturbed)


async def test_turns_that_were_lost_altogether_are_made_again(stores):
    """As with `everysec` when the machine dies: what was not on its disk is gone."""
    store = stores.new().start()
    async with service(store.address) as (world, _):
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        size = store.written()
        found = await callers(world, 1, 5, 12)
        store.kill()
        store.lose(size)
        await asyncio.to_thread(store.start)
        await agree(world, found, undisturbed)


async def test_a_replica_is_promoted_that_lacks_the_last_writes(stores):
    master = stores.new().start()
    replica = stores.replica(master)
    async with service(master.address) as (world, line):
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        found = await callers(world, 3)
        replica.say("REPLICAOF", "NO", "ONE")  # it gets nothing more, and is what will be promoted
        before = commands(master)
        found += [*await callers(world, 3, 12)]
        assert commands(master) - before > 50
        await line.cut(replica.address)
        await agree(world, found, undisturbed)


async def test_sound_that_was_acknowledged_and_lost_is_written_again(stores):
    """The caller is still speaking: the turn's head, its input and the session's record are gone."""
    master = stores.new().start()
    async with service(master.address) as (world, line):
        replica = stores.replica(master)
        async with world.call(session_id="s") as call:
            await call.ready()
            replica.say("REPLICAOF", "NO", "ONE")
            await call.speak(3)
            await call.speak(2, salt=2)
            await line.cut(replica.address)
            await call.speak(4, salt=3)
            answer = said(await call.answer(options=SEEDED))
        assert (await world.session("s")).next_audio_index == 9
        async with world.call(session_id="t") as call:
            for pieces, salt in ((3, 1), (2, 2), (4, 3)):
                await call.speak(pieces, salt)
            undisturbed = said(await call.answer(options=SEEDED))
    assert answer == undisturbed


async def test_sound_is_sent_again_by_the_client_when_its_orchestrator_dies_with_the_journal(stores):
    """Nobody but the client has what was acknowledged and lost."""
    master = stores.new().start()
    replica = stores.replica(master)
    pieces = [sound(1, salt=at) for at in range(12)]
    async with service(master.address, lease=5) as (world, line):
        dying, other = world.hosts[0], await world.host()
        async with Proxy(dying.target) as way, AsyncKimia(way.address, options=FAST) as kimia:
            async with kimia.converse(seed=7) as call:
                await acknowledged(call, pieces[:5])
                replica.say("REPLICAOF", "NO", "ONE")
                await acknowledged(call, pieces[5:10])
                await dying.desk.turns.copies.aclose()  # it writes nothing again
                await line.cut(replica.address)
                await way.cut(other.target)
                await acknowledged(call, pieces[10:])
                call.commit()
                disturbed = await call.answer()
                session = await kimia.session(call.session_id)
            undisturbed = await answered(kimia, pieces)
    assert session.next_audio_index == 12
    assert (disturbed.text, disturbed.pcm) == (undisturbed.text, undisturbed.pcm)


async def test_a_call_that_comes_back_is_not_refused_by_a_journal_that_knows_no_workers_yet(stores):
    """The journal came back empty, the call's orchestrator is dead, and the workers are late."""
    master, empty = stores.new().start(), stores.new().start()
    pieces = [sound(1, salt=at) for at in range(12)]
    async with (
        Proxy(master.address) as line,
        wired(f"redis://{line.address}/0", lease=SECONDS) as wire,
        service(master.address) as (world, line_of_workers),
    ):
        dying, other = [await world.host(wire=wire) for _ in range(2)]
        async with Proxy(dying.target) as way, AsyncKimia(way.address, options=FAST) as kimia:
            async with kimia.converse(seed=7) as call:
                await acknowledged(call, pieces[:10])
                await dying.desk.turns.copies.aclose()
                await line.cut(empty.address)
                await way.cut(other.target)
                await until(lambda: scripts(empty))  # the call has asked for its rows, and there are none
                await line_of_workers.cut(empty.address)
                await acknowledged(call, pieces[10:])
                call.commit()
                disturbed = await call.answer()
            undisturbed = await answered(kimia, pieces)
    assert (disturbed.text, disturbed.pcm) == (undisturbed.text, undisturbed.pcm)


def scripts(store):
    """Scripts that a server has run since it was started."""
    with store.client() as client:
        return client.info("commandstats").get("cmdstat_eval", {}).get("calls", 0)


async def answered(kimia, pieces):
    """The answer to a question that nothing disturbs."""
    async with kimia.converse(seed=7) as call:
        await acknowledged(call, pieces)
        call.commit()
        return await call.answer()


async def acknowledged(call, pieces):
    """The client's sound is said to be stored. Raises what has ended the call."""
    for piece in pieces:
        call.send_audio(piece)

    def confirmed():
        call._raise_failure()
        return call.state._said and all(said.confirmed for said in call.state._said)

    await until(confirmed)


async def test_what_was_deleted_stays_deleted(stores):
    master = stores.new().start()
    async with service(master.address) as (world, line):
        await world.generate(speaks(), options=SEEDED, session_id="s")
        replica = stores.replica(master)
        replica.say("REPLICAOF", "NO", "ONE")
        await world.stub.DeleteSession(pb.DeleteSessionRequest(session_id="s"))
        await line.cut(replica.address)

        async def gone():
            return set(await world.keys("s")) & {"{0}:session:s", "{0}:gone:s"} == {"{0}:gone:s"}

        await world.until_async(gone)


async def test_sentinels_promote_the_replica(stores):
    master = stores.new().start()
    replica = stores.replica(master)
    sentinel = stores.new().watch(master, "calls")
    await until(lambda: sentinel.say("SENTINEL", "REPLICAS", "calls"))
    async with served(f"redis+sentinel://127.0.0.1:1,{sentinel.address}/calls/0") as world:
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        found = await callers(world, 1, 5, 12)
        master.kill()
        await agree(world, found, undisturbed)
        assert replica.say("ROLE")[0] == "master"
