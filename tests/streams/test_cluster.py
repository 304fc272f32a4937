"""A cluster of three primaries, one of which has a replica. The service on it: `tests/orchestrator/test_cluster.py`."""

import asyncio
from dataclasses import replace

import pytest

from kimia.errors import SettingsError, UnavailableError
from kimia.stage import LLM
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.connections import history_of, reached
from kimia.streams.inbox import Inbox
from kimia.streams.jobs import Jobs
from kimia.streams.journal import Journal
from kimia.streams.wire import Wire, WireOptions
from tests.streams.turns import new_turn, step

pytestmark = [pytest.mark.unit, pytest.mark.parametrize("stores", ["valkey"], indirect=True)]  # Redis: the service

OPTIONS = WireOptions(partitions=16, lease=600)
SECONDS = 30  # no test waits longer


@pytest.fixture
def cluster(stores):
    return stores.cluster()


@pytest.fixture
async def wire(cluster):
    wire = await Wire.connect(cluster.url, options=OPTIONS)
    yield wire
    await wire.aclose()


async def until(condition):
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.005)


async def again(call):
    """What a call gives as soon as the cluster answers."""
    async with asyncio.timeout(SECONDS):
        while True:
            try:
                return await call()
            except UnavailableError:
                await asyncio.sleep(0.05)


def clients(store):
    with store.client() as client:
        return client.info("clients")


def everywhere(cluster, partitions):
    """One partition of each primary."""
    return list({cluster.primary_of(p): p for p in partitions}.values())


async def submitted(wire, p):
    """A turn of a session in a partition."""
    session = next(s for s in map(str, range(1000)) if keys.partition_of(s, OPTIONS.partitions) == p)
    turn = new_turn(session)
    opened = await Journal(wire).open_turn(turn, "me")
    await Journal(wire).submit(turn, opened.token)
    return turn


async def test_the_number_of_partitions_is_agreed_on(wire, cluster):
    await wire.agree()
    other = await Wire.connect(cluster.url, options=replace(OPTIONS, partitions=OPTIONS.partitions + 1))
    with pytest.raises(SettingsError, match=f"used with {OPTIONS.partitions} partitions"):
        await other.agree()
    await other.aclose()


async def test_partitions_lie_on_all_nodes_and_one_worker_serves_them(cluster, wire):
    jobs, blobs = Jobs(wire, LLM, "w"), Blobs(wire)
    await jobs.prepare()
    places = everywhere(cluster, wire.partitions)
    assert len(places) == 3
    assert await jobs.sweep(9) == []
    waiting = asyncio.create_task(jobs.wait(SECONDS))
    for p in places:
        turn = await submitted(wire, p)
        await waiting  # whichever partition it is
        [claim] = await jobs.sweep(9)
        assert (claim.turn.id, claim.job_key) == (turn.id, keys.jobs(p, "llm", "interactive"))
        await jobs.publish(claim, step(0, final=True))
        assert cluster.primary_of(p).say("EXISTS", keys.head(p, turn.id)) == 1
        assert (await Journal(wire).head(turn.id)).state == "done"
        waiting = asyncio.create_task(jobs.wait(SECONDS))
    waiting.cancel()
    names = [f"{p}:blob:b" for p in places]
    for name in names:
        await blobs.put(name, name.encode())
    assert await blobs.get([*names, "{1}:none"]) == [*(name.encode() for name in names), None]
    assert await blobs.renew([names[0], "{1}:none"]) == ["{1}:none"]
    await blobs.drop(names)
    assert await blobs.get(names) == [None] * 3
    await jobs.aclose()


async def test_scripts_that_one_node_has_lost_are_sent_again(cluster, wire):
    places = everywhere(cluster, wire.partitions)
    calls = [([f"{p}:jobs:llm:batch"], []) for p in places]
    for store in cluster.primaries:
        store.say("SCRIPT", "FLUSH")
        assert await wire.call_many("depth", calls) == [[0, 0]] * 3
        store.say("SCRIPT", "FLUSH")
        assert [await wire.call("depth", *call) for call in calls] == [[0, 0]] * 3


async def test_callers_are_bounded_and_a_dropped_connection_is_no_outage(cluster, monkeypatch):
    monkeypatch.setattr("kimia.streams.connections.CONNECTIONS", 3)
    wire = await Wire.connect(cluster.url, options=OPTIONS)
    assert sorted(await asyncio.gather(*(wire.journal.incr("n") for _ in range(50)))) == list(range(1, 51))
    assert all(clients(store)["connected_clients"] <= 5 for store in cluster.primaries)
    for store in cluster.primaries:
        store.say("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    assert await wire.journal.incr("n") == 51
    await wire.aclose()


async def test_readers_hear_of_a_new_primary_though_no_connection_was_lost(cluster, wire):
    """The old primary sends them on to the new one, which may lack what it has not got: they must look."""
    inbox, histories = Inbox(wire, "me"), []
    inbox.connected = histories.append
    async with inbox:
        await until(lambda: len(histories) == OPTIONS.partitions)
        [before] = set(histories)
        assert len(before.split(",")) == 3
        cluster.replica.say("CLUSTER", "FAILOVER")
        await until(lambda: any(history != before for history in histories))
        assert histories[-1] == await again(lambda: Journal(wire).history())
        assert len(set(histories[-1].split(",")) & set(before.split(","))) == 2


async def test_a_replica_is_promoted(cluster, wire):
    before = await history_of(wire.journal)
    p = next(p for p in wire.partitions if cluster.primary_of(p) is cluster.primaries[0])
    await wire.journal.set(f"{p}:a", 1)
    cluster.primaries[0].say("WAIT", 1, 0)
    cluster.primaries[0].kill()
    calls = [([f"{place}:jobs:llm:batch"], []) for place in wire.partitions]
    assert await again(lambda: wire.call_many("depth", calls)) == [[0, 0]] * OPTIONS.partitions
    assert cluster.replica.say("GET", f"{p}:a") == "1"
    assert await history_of(wire.journal) != before


async def test_a_slot_that_moves(cluster, wire):
    """A command is sent on to the node that has its slot now; a blocked read is told."""
    old, new, _ = cluster.primaries
    p = next(p for p in wire.partitions if cluster.primary_of(p) is old)
    slot, blocked = old.say("CLUSTER", "KEYSLOT", p), wire.blocking()
    reading = asyncio.create_task(blocked.xread({f"{p}:nothing": "0"}, block=4000))
    await until(lambda: clients(old)["blocked_clients"])
    for store in cluster.primaries:
        store.say("CLUSTER", "SETSLOT", slot, "NODE", new.say("CLUSTER", "MYID"))
    with pytest.raises(UnavailableError, match="slots move"), reached("journal"):
        await reading
    assert await wire.call("depth", [f"{p}:jobs:llm:batch"], []) == [0, 0]
    assert await wire.call_many("depth", [([f"{p}:jobs:llm:batch"], [])] * 2) == [[0, 0]] * 2
    await wire.journal.set(f"{p}:a", 1)
    assert new.say("GET", f"{p}:a") == "1"


async def test_what_is_no_cluster_is_named(stores):
    alone = stores.new().start()
    with pytest.raises(SettingsError, match="no node of a cluster"):
        await Wire.connect(f"redis+cluster://{alone.address}")
    with pytest.raises(UnavailableError, match=r"the journal .* check its URL"):
        await Wire.connect("redis+cluster://127.0.0.1:1,127.0.0.1:2")
    with pytest.raises(SettingsError, match="no URL of a cluster"):
        await Wire.connect(f"redis+cluster://{alone.address}?protocol=x")
    empty = stores.node()
    with pytest.raises(UnavailableError, match="lost its master"):
        await Wire.connect(f"redis+cluster://{empty.address}")
