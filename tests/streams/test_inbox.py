"""One blocked read wakes every feed, and no pointer that is lost hangs a turn."""

import asyncio
import time

import pytest

from kimia.errors import NotFoundError
from kimia.stage import LLM
from kimia.streams import keys
from kimia.streams.inbox import Inbox
from kimia.streams.jobs import Jobs
from kimia.streams.journal import Journal, Playback
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.turn_pb2 import Chunk, Failure, Step, Turn

pytestmark = pytest.mark.unit

NEVER = 60.0  # seconds: a feed that never looks for itself within a test


class Writer:
    """An orchestrator and an llm worker in one: opens turns for a reader and publishes steps."""

    def __init__(self, wire, reader):
        self.wire = wire
        self.journal = Journal(wire)
        self.jobs = Jobs(wire, LLM, "worker")
        self.reader = reader
        self.claims = {}

    async def begin(self):
        session = keys.new_session_id()
        turn = Turn(id=keys.new_turn_id(session), session_id=session, route=[LLM.number])
        opened = await self.journal.open_turn(turn, self.reader)
        await self.journal.submit(turn, opened.token)
        (self.claims[turn.id],) = await self.jobs.sweep(1)
        return turn.id

    async def publish(self, turn_id, index, final=False):
        await self.jobs.publish(self.claims[turn_id], Chunk(index=index, final=final, step=Step(text_id=index)))


@pytest.fixture(params=[1, 3], ids=["one partition", "three partitions"])
async def wire(request, journal_url):
    wire = await Wire.connect(journal_url, options=WireOptions(partitions=request.param, lease=NEVER))
    yield wire
    await wire.aclose()


@pytest.fixture
async def writer(wire):
    writer = Writer(wire, "me")
    await writer.jobs.prepare()
    return writer


@pytest.fixture
async def inbox(wire, writer):
    async with Inbox(wire, "me", look=NEVER) as inbox:
        yield inbox


async def indices(feed, log="tokens", start=0):
    return [chunk.index async for chunk in feed.chunks(log, start)]


async def test_what_was_written_before_is_read_too(inbox, writer):
    turn = await writer.begin()
    for index in range(3):
        await writer.publish(turn, index, final=index == 2)
    with inbox.feed(turn) as feed:
        assert await indices(feed) == [0, 1, 2]
        assert await indices(feed, start=2) == [2]


async def test_the_first_look_at_a_turn_is_one_round_trip(inbox, writer, monkeypatch):
    turn = await writer.begin()
    await writer.publish(turn, 0)
    trips, plain = [], inbox._look_up_once

    async def noted(requests):
        trips.append([log for _, log, _ in requests])
        return await plain(requests)

    monkeypatch.setattr(inbox, "_look_up_once", noted)
    with inbox.feed(turn) as feed:
        assert (await anext(feed.chunks("tokens"))).index == 0
    assert trips == [[None, "tokens"]]  # its head first: nothing follows the end


async def test_what_came_just_before_the_end_is_read(inbox, writer, monkeypatch):
    turn = await writer.begin()
    plain = inbox.head

    async def late(turn_id):
        await asyncio.sleep(0.05)  # the log has been read
        await writer.publish(turn, 0)
        await writer.journal.cancel(turn)
        return await plain(turn_id)

    monkeypatch.setattr(inbox, "head", late)
    with inbox.feed(turn) as feed:
        assert [chunk.index async for chunk in feed.chunks("tokens")] == [0]


async def test_chunks_come_as_they_are_written(inbox, writer):
    turn = await writer.begin()
    with inbox.feed(turn) as feed:
        chunks = feed.chunks("tokens")
        for index in range(20):
            waiting = asyncio.create_task(anext(chunks))
            await asyncio.sleep(0)
            await writer.publish(turn, index, final=index == 19)
            assert (await waiting).index == index
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_many_turns_and_logs_are_followed_at_once(inbox, writer):
    turns = [await writer.begin() for _ in range(12)]
    feeds = [inbox.feed(turn) for turn in turns]
    reads = [asyncio.create_task(indices(feed, start=start)) for feed in feeds for start in (0, 1)]
    silent = [asyncio.create_task(indices(feed, "audio")) for feed in feeds]
    for index in range(4):
        await asyncio.gather(*(writer.publish(turn, index, final=index == 3) for turn in turns))
    assert await asyncio.gather(*reads) == [[0, 1, 2, 3], [1, 2, 3]] * 12
    assert await asyncio.gather(*silent) == [[]] * 12  # these logs are not on the route: the end of the turn ends them
    for feed in feeds:
        feed.close()
    assert inbox._feeds == {}


async def test_who_follows_a_turn_drops_it_when_its_deadline_has_passed_and_it_has_not_begun(inbox, writer):
    waits, runs = [Turn(id=f"{name}.1", session_id=name, route=[LLM.number]) for name in ("waits", "runs")]
    for turn in (runs, waits):
        turn.deadline.FromMicroseconds(round(1e6 * (time.time() + 100)))
        opened = await writer.journal.open_turn(turn, "me")
        await writer.journal.submit(turn, opened.token)
        if turn is runs:
            (writer.claims[turn.id],) = await writer.jobs.sweep(1)
        turn.deadline.seconds = 1
        partition = keys.partition_of(turn.session_id, writer.wire.options.partitions)
        late = {"deadline": 1, "turn": turn.SerializeToString()}
        await writer.wire.journal.hset(keys.head(partition, turn.id), mapping=late)
    with inbox.feed(waits.id) as feed:
        head = await feed.ended()
        assert (head.state, head.failure.reason) == ("error", "DEADLINE_EXCEEDED")
        assert await indices(feed) == []
    with inbox.feed(runs.id) as feed:
        read = asyncio.create_task(indices(feed))
        for index in range(2):
            await asyncio.sleep(0)
            await writer.publish(runs.id, index, final=index == 1)
        assert await read == [0, 1]
        assert (await feed.ended()).state == "done"


@pytest.mark.parametrize("ending", ["cancelled", "error", "done"])
async def test_a_terminal_state_ends_everything(inbox, writer, ending):
    turn = await writer.begin()
    with inbox.feed(turn) as feed:
        read, ended = asyncio.create_task(indices(feed)), asyncio.create_task(feed.ended())
        await writer.publish(turn, 0)
        if ending == "cancelled":
            await writer.journal.cancel(turn)
        elif ending == "error":
            await writer.jobs.fail(writer.claims[turn], Failure(reason="X"))
        else:
            await writer.publish(turn, 1, final=True)
        assert (await ended).state == ending
        assert await read == ([0, 1] if ending == "done" else [0])
        assert (await feed.ended()).state == ending


async def test_a_turn_that_is_gone_is_told(inbox):
    with inbox.feed(keys.new_turn_id("nobody")) as feed:
        with pytest.raises(NotFoundError):
            await feed.ended()
        with pytest.raises(NotFoundError):
            await indices(feed)


async def test_two_feeds_of_one_turn_are_both_woken(inbox, writer):
    turn = await writer.begin()
    with inbox.feed(turn) as one, inbox.feed(turn) as two:
        reads = [asyncio.create_task(indices(feed)) for feed in (one, two)]
        await asyncio.sleep(0)
        await writer.publish(turn, 0, final=True)
        assert await asyncio.gather(*reads) == [[0], [0]]


async def test_pointers_to_others_turns_are_passed_over(inbox, writer):
    other, turn = await writer.begin(), await writer.begin()
    with inbox.feed(turn) as feed:
        read = asyncio.create_task(indices(feed))
        await writer.publish(other, 0, final=True)
        await writer.publish(turn, 0, final=True)
        assert await read == [0]


async def test_however_many_are_woken_they_read_through_few_connections(inbox, wire, writer):
    turns = [await writer.begin() for _ in range(150)]
    feeds = [inbox.feed(turn) for turn in turns]
    reads = [asyncio.create_task(indices(feed, log)) for feed in feeds for log in ("tokens", "audio")]
    await asyncio.sleep(0)
    await writer.jobs.publish_all([(writer.claims[turn], Chunk(final=True)) for turn in turns])
    assert await asyncio.gather(*reads) == [[0], []] * 150
    assert len(await wire.journal.client_list()) < 20


async def asleep(feed):
    """Until every reader of the feed waits for a pointer."""
    async with asyncio.timeout(5):
        while not feed._waiting or any(bell._look or bell._rung.is_set() for bell in feed._waiting):
            await asyncio.sleep(0.001)
        await asyncio.sleep(0.01)


async def lose_pointers(wire, *names):
    for partition in wire.partitions:
        for name in names:
            await wire.journal.delete(keys.inbox(partition, name))


async def test_a_position_wakes_the_worker_that_holds_the_turn(wire, writer):
    turn = await writer.begin()
    async with Inbox(wire, "worker", look=NEVER) as inbox:
        with inbox.feed(turn) as feed:
            positions = feed.playback()
            for said in (1.0, 2.0, 3.5):
                await writer.journal.note_playback(turn, Playback(said, 0.0))
                async with asyncio.timeout(5):
                    while (await anext(positions)).heard != said:  # one may be told twice
                        pass


async def test_a_lost_pointer_costs_a_delay_only(wire, writer):
    async with Inbox(wire, "nobody's", look=0.02) as inbox:  # pointers go to the inbox of "me"
        turn = await writer.begin()
        with inbox.feed(turn) as feed:
            read, ended = asyncio.create_task(indices(feed)), asyncio.create_task(feed.ended())
            await asyncio.sleep(0)
            await writer.publish(turn, 0)
            await writer.publish(turn, 1, final=True)
            assert await read == [0, 1]
            assert (await ended).state == "done"


async def test_after_a_lost_connection_everybody_looks(wire, writer):
    async with Inbox(wire, "me", look=NEVER) as inbox:
        turn = await writer.begin()
        with inbox.feed(turn) as feed:
            read = asyncio.create_task(indices(feed))
            await asleep(feed)
            writer.reader = "nobody"
            await writer.journal.take_reader(turn, "nobody")  # the pointer goes elsewhere: it is lost
            await writer.publish(turn, 0, final=True)
            await wire.journal.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            async with asyncio.timeout(5):
                assert await read == [0]


async def test_a_full_batch_may_have_lost_some(wire, writer, monkeypatch):
    monkeypatch.setattr("kimia.streams.inbox.BATCH", 2)
    async with Inbox(wire, "me", look=NEVER) as inbox:
        turns = [await writer.begin() for _ in range(2)]
        with inbox.feed(turns[0]) as feed:
            read = asyncio.create_task(indices(feed))
            await asleep(feed)
            await writer.journal.take_reader(turns[0], "nobody")
            await writer.publish(turns[0], 0, final=True)
            partition = keys.partition_of(keys.session_of(turns[1]), wire.options.partitions)
            async with wire.journal.pipeline() as pipe:
                for _ in range(4):
                    pipe.xadd(keys.inbox(partition, "me"), {"t": turns[1], "l": "tokens", "n": 1})
                await pipe.execute()
            async with asyncio.timeout(5):
                assert await read == [0]


async def test_closing_leaves_no_task(wire):
    before = asyncio.all_tasks()
    async with Inbox(wire, "me"):
        assert len(asyncio.all_tasks()) == len(before) + len(wire.partitions)
        await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before
