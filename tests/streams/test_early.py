"""Hints are given once, in order, and never for ever."""

import asyncio

import pytest

from kimia.streams import early as module
from kimia.streams import keys
from kimia.streams.early import Early
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.turn_pb2 import Turn

pytestmark = pytest.mark.unit


@pytest.fixture(params=[1, 3])
async def wire(journal_url, request):
    wire = await Wire.connect(journal_url, options=WireOptions(partitions=request.param, turn_ttl=60))
    yield wire
    await wire.aclose()


@pytest.fixture
async def early(wire):
    early = Early(wire)
    yield early
    await early.aclose()


def hint(session="s", number=0):
    return Turn(id=f"{session}.{number}", session_id=session)


async def test_each_is_taken_once_and_in_order(early):
    turns = [hint(number=number) for number in range(3)]
    for turn in turns:
        await early.offer(turn)
    assert [await early.take(5) for _ in turns] == turns
    assert await early.take(0.01) is None


async def test_who_waits_is_woken_whatever_the_partition(early):
    waiting = asyncio.create_task(early.take(5))
    for session in ("a", "b", "c"):
        await asyncio.sleep(0)
        await early.offer(hint(session))
        assert await waiting == hint(session)
        waiting = asyncio.create_task(early.take(5))
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    await early.offer(hint("d"))
    assert await early.take(5) == hint("d")  # nothing was lost with whoever stopped waiting


async def test_two_workers_share_them(wire, early):
    other = Early(wire)
    for number in range(4):
        await early.offer(hint(number=number))
    taken = [await taker.take(5) for taker in (early, other, early, other)]
    assert sorted(turn.id for turn in taken) == [f"s.{number}" for number in range(4)]
    await other.aclose()


async def test_there_is_a_bound_and_an_end(wire, early, monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    for number in range(5):
        await early.offer(hint(number=number))
    name = keys.early(keys.partition_of("s", wire.options.partitions), "tokenizer")
    assert await wire.journal.llen(name) == 2
    assert 0 < await wire.journal.pttl(name) <= 60_000
    assert (await early.take(5)).id == "s.3"
