"""The journal is there and does not do what it should: full, read-only, slow, silent. Callers are told, and soon."""

import asyncio

import grpc
import pytest

from kimia.errors import UnavailableError
from kimia.status import from_rpc_error
from kimia.streams import connections
from kimia.v1 import kimi_audio_pb2 as pb
from orchestrator import records
from orchestrator.desk import Limits
from tests.orchestrator.test_journal_trouble import SEEDED, callers, said, service, until
from tests.orchestrator.world import asks, speaks

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

SOON = 30  # seconds, on the busiest machine


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(records, "PATIENCE", 0.5)


async def refused(answer):
    """The caller is told that he may try again; what is wrong with the journal is for the log."""
    async with asyncio.timeout(SOON):
        with pytest.raises(grpc.RpcError) as caught:
            await answer
    error = from_rpc_error(caught.value)
    assert isinstance(error, UnavailableError)
    assert error.retry_after is not None


async def test_a_new_turn_is_refused_when_memory_is_full_and_leaves_nothing(stores):
    store = stores.new().start()
    async with service(store.address) as (world, _):
        store.say("CONFIG", "SET", "maxmemory", 1)
        await refused(world.generate(speaks(), options=SEEDED, session_id="unheard"))
        store.say("CONFIG", "SET", "maxmemory", 0)
        async with asyncio.timeout(SOON):  # the reservation is given back after the refusal was told
            while await world.keys("unheard"):
                await asyncio.sleep(0.005)
        assert set((await world.reserved()).values()) == {0}
        assert said(await world.generate(speaks(), options=SEEDED, session_id="unheard"))[0] == "done"


async def test_a_turn_that_runs_goes_on_when_there_is_memory_again(stores):
    store = stores.new().start()
    async with service(store.address) as (world, _):
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        [caller] = await callers(world, 5)
        store.say("CONFIG", "SET", "maxmemory", 1)
        await until(lambda: any(worker._patience.out for worker in world.running))
        store.say("CONFIG", "SET", "maxmemory", 0)
        assert await caller.answered == undisturbed


async def test_what_frees_memory_is_done_when_it_is_full(stores):
    store = stores.new().start()
    async with service(store.address) as (world, _):
        [caller] = await callers(world, 5)
        store.say("CONFIG", "SET", "maxmemory", 1)
        await world.stub.DeleteSession(pb.DeleteSessionRequest(session_id=caller.session))
        assert await world.keys(caller.session) == [f"{{0}}:gone:{caller.session}"]
        caller.answered.cancel()


async def test_a_journal_that_takes_no_writes_is_refused_and_goes_on_afterwards(stores):
    store, other = stores.new().start(), stores.new().start()
    async with service(store.address) as (world, _):
        store.say("REPLICAOF", "127.0.0.1", other.port)
        await refused(world.generate(asks(), options=SEEDED))
        store.say("REPLICAOF", "NO", "ONE")
        await world.settled(4)
        assert said(await world.generate(asks(), options=SEEDED))[0] == "done"


@pytest.mark.parametrize("how", ["killed", "silent"])
async def test_a_journal_that_stays_away_is_told_at_the_deadline(stores, monkeypatch, how):
    monkeypatch.setitem(connections._OPTIONS, "socket_timeout", 0.3)
    store = stores.new().start()
    async with service(store.address, limits=Limits(turn_seconds=3.0)) as (world, _):
        [caller] = await callers(world, 5)
        if how == "killed":
            store.kill()
        else:
            store.pause()
        await refused(caller.answered)
        await refused(world.generate(asks(), options=SEEDED))
        if how == "silent":
            store.go_on()
        else:
            await asyncio.to_thread(store.start)


async def test_a_slow_journal_delays_and_changes_nothing(stores):
    """Everything between the service and it comes 20 ms late."""
    store = stores.new().start()
    async with service(store.address) as (world, _):
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
    async with service(store.address) as (world, line):
        line.delay = 0.02
        assert said(await world.generate(speaks(), options=SEEDED)) == undisturbed
