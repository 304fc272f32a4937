"""What is kept of a turn, for how long, and what is made of it."""

import asyncio

import pytest

from kimia.errors import NotFoundError, StateError
from kimia.streams import keys
from kimia.v1.turn_pb2 import Caller, Chunk, InputAudio
from orchestrator import copies as module
from orchestrator.copies import Kept, TurnCopy
from orchestrator.turn import Turns

pytestmark = pytest.mark.unit

CALLER = Caller(tenant="t")
HOUR = 3600.0  # seconds


@pytest.fixture
async def turns(world):
    turns = Turns(world.wire, world.inbox)
    yield turns
    await turns.aclose()


def pieces(*indices):
    return [Chunk(index=index, input=InputAudio(data=b"s")) for index in indices]


async def changed(turns, monkeypatch):
    """The journal has another history from now on."""
    await turns.copies.repaired()

    async def history():
        return "another"

    monkeypatch.setattr(turns.journal, "history", history)


async def test_values_are_kept_while_somebody_holds_them(monkeypatch):
    monkeypatch.setattr(module, "KEPT_SECONDS", 0.01)
    held = {"held"}
    kept = Kept(lambda name: name in held)
    kept.keep("held", 1)
    kept.keep("other", 2)
    async with asyncio.timeout(5):
        while kept.get("other"):
            await asyncio.sleep(0.001)
    assert kept.items() == [("held", 1)]
    held.clear()
    async with asyncio.timeout(5):
        while kept.items():
            await asyncio.sleep(0.001)


def test_input_that_is_sent_again_is_kept_once():
    copy = TurnCopy(None, 1)
    for some in (pieces(2, 3), pieces(3, 4), pieces(2)):
        copy.add(some)
    assert [chunk.index for chunk in copy.input] == [2, 3, 4]


async def test_nothing_is_repaired_while_the_history_is_the_same(turns):
    await turns.copies.repaired()
    calls = []

    async def call():
        calls.append(1)
        raise NotFoundError("gone")

    with pytest.raises(NotFoundError):
        await turns.copies.surely(call)
    assert len(calls) == 1


async def test_a_history_is_new_for_a_while_in_a_process_that_begins_and_after_every_change(turns, monkeypatch):
    assert await turns.copies.is_new(HOUR)
    turns.copies._history_since -= HOUR
    assert not await turns.copies.is_new(HOUR)
    await changed(turns, monkeypatch)
    assert await turns.copies.is_new(HOUR)


async def test_a_turn_that_another_process_took_over_is_left_alone(turns, world, monkeypatch):
    opened = await turns.open("s", CALLER)
    await changed(turns, monkeypatch)
    token = await world.journal.take_reader(opened.turn_id, "other")
    assert await turns.copies.repaired()
    assert turns.copies.turns.get(opened.turn_id) is None
    assert (await world.journal.head(opened.turn_id)).reader_token == token


async def test_a_taking_over_that_was_lost_is_repeated(turns, world, monkeypatch):
    opened = await turns.open("s", CALLER)
    await changed(turns, monkeypatch)
    old = {"reader": "other", "reader_token": 1}
    await world.wire.journal.hset(keys.head("{0}", opened.turn_id), mapping=old)
    await turns.append(opened, pieces(0))  # fenced, which is found out
    head = await world.journal.head(opened.turn_id)
    assert (head.reader, head.next["input"]) == (world.inbox.owner, 1)


async def test_lost_input_and_a_lost_cancellation_are_written_again(turns, world, monkeypatch):
    opened = await turns.open("s", CALLER)
    await turns.append(opened, pieces(0, 1))
    cancelled = await turns.open("s", CALLER)
    await turns.cancel(cancelled.turn_id)
    await changed(turns, monkeypatch)
    await world.wire.journal.flushall()
    await turns.append(opened, pieces(2))
    assert [chunk.index for chunk in await world.journal.read(opened.turn_id, "input")] == [0, 1, 2]
    assert (await world.journal.head(cancelled.turn_id)).state == "cancelled"


async def test_records_come_back_unless_there_is_a_newer_one(turns, world, monkeypatch):
    for session_id in ("lost", "newer"):
        await turns.records.begin(session_id, CALLER)
        await turns.records.change(session_id, lambda record: record.turn_ids.append(f"{record.id}.1"))
    await changed(turns, monkeypatch)
    await world.wire.journal.delete(keys.session("{0}", "lost"))
    await world.wire.journal.hset(keys.session("{0}", "newer"), "version", 9)
    assert (await turns.records.load("lost", "t")).turn_ids == ["lost.1"]
    assert (await world.journal.load_session("newer"))[1] == 9


async def test_deleted_sessions_are_not_written_again(turns, world, monkeypatch):
    await turns.records.begin("s", CALLER)
    opened = await turns.open("s", CALLER)
    await turns.delete("s")
    await changed(turns, monkeypatch)
    await world.wire.journal.flushall()
    with pytest.raises(NotFoundError):
        await turns.append(opened, pieces(0))
    assert await world.keys("s") == ["{0}:gone:s"]


async def test_who_was_fenced_off_stays_so(turns, world):
    opened = await turns.open("s", CALLER)
    await turns.reopen(opened.turn_id, CALLER, ())
    with pytest.raises(StateError):
        await turns.append(opened, pieces(0))
