"""Waiting for entries in any partition."""

import asyncio

import pytest
import redis

from kimia.streams.arrivals import Arrivals
from kimia.streams.wire import Wire

pytestmark = pytest.mark.unit

ENDS = {"{0}": {"{0}:a": "0-0", "{0}:b": "0-0"}, "{1}": {"{1}:a": "0-0"}}
LONG = 30.0  # seconds: no test waits so long


@pytest.fixture
async def wire(journal_url):
    wire = await Wire.connect(journal_url)
    yield wire
    await wire.aclose()


@pytest.fixture
async def arrivals(wire):
    arrivals = Arrivals(wire.blocking())
    yield arrivals
    await arrivals.aclose()


async def connections(wire):
    """Who reads blocked, by the server's numbers."""
    return sorted(c["id"] for c in await wire.journal.client_list() if "b" in c["flags"])


async def reading(wire, count):
    async with asyncio.timeout(LONG):
        while len(found := await connections(wire)) != count:
            await asyncio.sleep(0.005)
    return found


@pytest.mark.parametrize("stream", ["{0}:a", "{0}:b", "{1}:a"])
async def test_an_entry_in_any_partition_ends_the_wait(wire, arrivals, stream):
    waiting = asyncio.create_task(arrivals.wait(ENDS, LONG))
    await reading(wire, 2)
    await wire.journal.xadd(stream, {"t": 1})
    await waiting


async def test_reads_outlast_a_wait_and_keep_their_connections(wire, arrivals):
    await arrivals.wait(ENDS, 0.05)
    before = await reading(wire, 2)
    waiting = asyncio.create_task(arrivals.wait(ENDS, LONG))
    await wire.journal.xadd("{1}:a", {"t": 1}, id="5-0")
    await waiting
    waiting = asyncio.create_task(arrivals.wait({**ENDS, "{1}": {"{1}:a": "5-0"}}, LONG))
    assert await reading(wire, 2) == before
    await wire.journal.xadd("{0}:a", {"t": 1})
    await waiting


async def test_what_came_before_the_ends_that_are_given_does_not_count(wire, arrivals):
    await arrivals.wait(ENDS, 0.05)
    await reading(wire, 2)
    await wire.journal.xadd("{0}:a", {"t": 1}, id="5-0")
    await reading(wire, 1)  # it was read while nobody waited
    waiting = asyncio.create_task(arrivals.wait({**ENDS, "{0}": {"{0}:a": "5-0"}}, LONG))
    await reading(wire, 2)
    assert not waiting.done()
    await wire.journal.xadd("{0}:a", {"t": 1})
    await waiting


async def test_a_lost_connection_is_told_and_the_next_wait_reads_again(wire, arrivals):
    waiting = asyncio.create_task(arrivals.wait(ENDS, LONG))
    for number in await reading(wire, 2):
        await wire.journal.client_kill_filter(_id=number)
    with pytest.raises(redis.ConnectionError):
        await waiting
    waiting = asyncio.create_task(arrivals.wait(ENDS, LONG))
    await reading(wire, 2)
    await wire.journal.xadd("{1}:a", {"t": 1})
    await waiting
