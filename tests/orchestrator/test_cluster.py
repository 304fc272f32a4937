"""A whole service on a cluster of three primaries: callers notice nothing of it."""

import asyncio

import pytest

from kimia.cli.ps import look
from kimia.errors import CapacityError
from kimia.runtime.fake import build
from kimia.stage import LLM
from kimia.streams import keys
from kimia.streams.ledger import Ledger
from kimia.v1 import kimi_audio_pb2 as pb
from tests.orchestrator.test_journal_trouble import SEEDED, TALKING, agree, callers, said, served
from tests.orchestrator.world import speaks

pytestmark = [pytest.mark.unit, pytest.mark.timeout(180)]

PARTITIONS = 16


def sessions_of(cluster):
    """One new session on each primary."""
    found = {}
    while len(found) < len(cluster.primaries):
        session = keys.new_session_id()
        found.setdefault(cluster.primary_of(keys.partition_of(session, PARTITIONS)), session)
    return [found[store] for store in cluster.primaries]


def names(store, session):
    """Keys of a session on one server."""
    with store.client() as client:
        return list(client.scan_iter(f"*{session}*", count=1000))


async def test_answers_take_over_admission_and_deletion(stores):
    cluster = stores.cluster()
    sessions = sessions_of(cluster)
    async with served(cluster.url, PARTITIONS) as world:
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        found = await callers(world, 1, 1, 1, sessions=sessions)
        [llm] = [worker for worker in world.running if worker.kind is LLM]
        await world.kill(llm)
        world.start(build("llm", TALKING))
        await agree(world, found, undisturbed)
        assert all(names(store, session) for store, session in zip(cluster.primaries, sessions, strict=True))
        await world.afterwards()
        await world.settled(4)

        ledger = Ledger(world.wire)
        lines = await look(cluster.url, PARTITIONS)
        assert [(line.reserved, line.waiting, line.running) for line in lines] == [(0, 0, 0)] * 3
        for line in range(lines[1].capacity):
            await ledger.reserve(f"r{line}", "acme", (LLM,), 60)
        with pytest.raises(CapacityError):
            await ledger.reserve("one more", "acme", (LLM,), 60)

        for session in sessions:
            await world.stub.DeleteSession(pb.DeleteSessionRequest(session_id=session))
            tombstone = keys.gone(keys.partition_of(session, PARTITIONS), session)
            assert await world.keys(session) == [tombstone]


async def test_a_primary_dies_under_running_turns_and_its_replica_is_promoted(stores):
    cluster = stores.cluster()
    sessions = sessions_of(cluster)
    async with served(cluster.url, PARTITIONS) as world:
        undisturbed = said(await world.generate(speaks(), options=SEEDED))
        found = await callers(world, 1, 5, 12, sessions=sessions)
        cluster.primaries[0].kill()
        await agree(world, found, undisturbed)
        assert cluster.replica.say("ROLE")[0] == "master"
        assert await asyncio.to_thread(names, cluster.replica, sessions[0])
