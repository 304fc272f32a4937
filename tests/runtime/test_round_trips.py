"""How often a worker speaks to the journal: once per step for all its rows, and once per segment of sound."""

import asyncio

import pytest

from kimia.runtime.fake import FakeLanguageModel, FakeTokenizer
from kimia.stage import LLM, TOKENIZER
from kimia.streams.wire import Wire
from kimia.v1.turn_pb2 import Chunk, StageReport, Step
from tests.runtime.workers import heard, input_log, new_turn, sound

pytestmark = pytest.mark.unit

ROWS, STEPS = 24, 30


class InStep:
    """A language model whose rows take their steps together."""

    kind = LLM

    def __init__(self):
        self.barrier = asyncio.Barrier(ROWS)

    async def run(self, turn, inbox, published=()):
        for index in range(STEPS):
            await self.barrier.wait()
            chunk = Chunk(index=index, step=Step(text="a"), final=index == STEPS - 1)
            if chunk.final:
                chunk.report.CopyFrom(StageReport(units=STEPS))
            yield chunk


@pytest.fixture
def sent(monkeypatch):
    """How many calls of a script went in each round trip."""
    trips = {}
    pipelined = Wire._pipelined

    async def counted(self, script, calls):
        trips.setdefault(script, []).append(len(calls))
        return await pipelined(self, script, calls)

    monkeypatch.setattr(Wire, "_pipelined", counted)
    return trips


async def test_all_rows_publish_a_step_in_one_round_trip(house, sent):
    turns = [new_turn(route=[LLM]) for _ in range(ROWS)]
    house.start(InStep(), rows=ROWS)
    for turn in turns:
        await house.ask(turn)
    for turn in turns:
        assert (await house.ended(turn.id)).state == "done"
    assert sum(sent["publish"]) == ROWS * STEPS
    assert len(sent["publish"]) <= STEPS + 3  # rows of a first or last step may miss each other
    assert sent["publish"].count(ROWS) >= STEPS - 3


async def test_a_segment_of_sound_is_published_in_one_round_trip(house, sent):
    house.start(FakeTokenizer())
    house.start(FakeLanguageModel())
    turn = new_turn(heard(0), route=[TOKENIZER, LLM])
    turn.options.max_new_tokens = 1
    await house.ask(turn, input_log((0, sound(400, 88)), size=200_000))
    assert (await house.ended(turn.id)).state == "done"
    assert sent["publish"][:2] == [32, 3]  # 375 codes, and the rest
