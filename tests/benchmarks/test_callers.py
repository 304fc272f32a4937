"""Callers against a real orchestrator, a real journal and workers with fake stages."""

import asyncio
import io
import json

import pytest

from benchmarks.callers import FRAME_SECONDS, Habits, Spec, everybody
from kimia.runtime.fake import FakeTiming
from kimia.streams.ledger import Ledger
from kimia.streams.wire import Wire, WireOptions
from tests.orchestrator.world import World

pytestmark = pytest.mark.unit

QUESTION = (0.06, 0.2)
HURRIED = Habits(
    arrival=(0.0, 0.0),
    question=QUESTION,
    think=(0.0, 0.01),
    pause=(0.0, 0.01),
    turns=(2, 2),
    steps=(14, 20),
    barge_ins=0.0,
    deleted=1.0,
)
TIMING = FakeTiming(steps=100, step_seconds=0.005, realtime_factor=0.01)


@pytest.fixture
async def world(valkey_url):
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=0.5))
    async with World(wire) as world:
        yield world
    await wire.aclose()


async def lived(world, callers, rows=4, **habits):
    """What callers write down who hang up after their first call."""
    host = await world.begin(TIMING, rows)
    while await host.desk.turns.copies.is_new(Ledger(world.wire).announced_seconds):  # until then nobody is refused
        await asyncio.sleep(0.05)
    output = io.StringIO()
    spec = Spec(host.target, range(callers), 0.05, 7, Habits(**{**vars(HURRIED), **habits}))
    await everybody(spec, output)
    await world.afterwards()
    found = {}
    for line in output.getvalue().splitlines():
        record = json.loads(line)
        found.setdefault(record["what"], []).append(record)
    return found


async def test_answers_are_heard_to_their_end_and_sessions_deleted(world):
    found = await lived(world, 2)
    turns = found["turn"]
    assert len(found["admitted"]) == 2
    assert {turn["end"] for turn in turns} == {"done"}
    for turn in turns:
        assert [at for at, _ in turn["arrivals"]] == sorted(at for at, _ in turn["arrivals"])
        assert 14 - 7 <= sum(seconds for _, seconds in turn["arrivals"]) / 0.08 <= 20 - 6
        assert turn["spoken"] < turn["started"] <= turn["arrivals"][0][0] <= turn["ended"]
        assert turn["first_audio"] > 0
        assert await world.keys(turn["session"]) == [f"{{0}}:gone:{turn['session']}"]


async def test_the_sound_of_a_question_takes_its_time(world):
    found = await lived(world, 1)
    spoken = found["turn"][0]["spoken"] - found["admitted"][0]["at"]
    assert spoken > QUESTION[0] - FRAME_SECONDS


async def test_barge_ins_stop_answers_that_run(world):
    slow = {"steps": (100, 100), "barge_ins": 1.0, "barge_after": (0.0, 0.0), "deleted": 0.0}
    found = await lived(world, 1, **slow)
    assert all(turn["interrupted"] is not None for turn in found["turn"])
    session = await world.session(found["turn"][0]["session"])
    assert session.messages  # what was heard is kept
    assert not session.running_turn_id


async def test_who_is_refused_comes_back_when_told_to(world):
    found = await lived(world, 3, rows=2)
    assert len(found["admitted"]) == 2
    assert [record["admitted"] for record in found["refused"]] == [None]
    assert found["told_to_wait"][0]["seconds"] > 0
    assert "turn" in found
