import asyncio

import pytest

from kimia.errors import NotFoundError, UnavailableError
from kimia.v1.turn_pb2 import Caller
from orchestrator.following import Position
from orchestrator.turn import Wanted
from tests.orchestrator.world import ENDLESS, STEADY, TEXT_ONLY, asks, kinds

pytestmark = pytest.mark.unit

CALLER = Caller(tenant="default")


async def started(desk, *, one_off=True):
    """A turn of a conversation of one request."""
    await desk.turns.records.begin("s", CALLER, one_off=one_off)
    opened = await desk.turns.open("s", CALLER)
    return await desk.turns.start(opened, Wanted(CALLER, [asks()], TEXT_ONLY, 60.0))


async def test_a_turn_is_settled_before_its_end_is_told(world):
    desk = (await world.begin()).desk
    turn = await started(desk)
    events = []
    async for event in desk.told(await desk.turns.follow(turn.id, "default", Position())):
        events.append(event)
        if event.HasField("done"):
            assert len((await desk.turns.records.load("s", "default")).messages) == 2
    assert kinds(events)[-1] == "done"


async def test_nothing_is_kept_of_turns_that_were_told(world):
    desk = (await world.begin()).desk
    turn = await started(desk)
    async for _ in desk.told(await desk.turns.follow(turn.id, "default", Position())):
        assert desk._followers == {turn.id: 1}
    assert len(desk._followers) == 0


async def test_what_lingers_is_dropped_when_the_window_has_passed(world):
    desk = (await world.begin(window=0.05)).desk
    turn = await started(desk)
    await desk.linger("s", turn.id)
    with pytest.raises(NotFoundError):
        await desk.turns.records.load("s", "default")


async def test_what_somebody_reads_is_not_dropped(world):
    desk = (await world.begin(ENDLESS, window=0.05)).desk
    turn = await started(desk)
    events = desk.told(await desk.turns.follow(turn.id, "default", Position()))
    await anext(events)
    await desk.linger("s", turn.id)
    assert await desk.turns.records.load("s", "default")
    await events.aclose()


async def test_what_another_process_reads_is_not_dropped(world):
    desk = (await world.begin(window=0.05)).desk
    turn = await started(desk)
    await world.journal.take_reader(turn.id, "another")
    await desk.linger("s", turn.id)
    assert await desk.turns.records.load("s", "default")


async def test_a_process_that_stops_drops_what_has_ended_and_leaves_what_runs(world):
    desk = (await world.begin(STEADY)).desk
    turn = await started(desk)
    desk.later(desk.linger("s", turn.id))
    await desk.aclose()
    assert await desk.turns.records.load("s", "default")
    await world.ended(turn.id)
    desk.later(desk.linger("s", turn.id))
    await desk.aclose()
    with pytest.raises(NotFoundError):
        await desk.turns.records.load("s", "default")


async def test_clean_up_that_fails_stays_in_the_log(world):
    desk = (await world.host()).desk

    async def fail(error):
        raise error

    for error in (NotFoundError("gone"), UnavailableError("away")):
        desk.later(fail(error))
    await desk.aclose()
    await asyncio.sleep(0)
    await desk.drop("unknown")
