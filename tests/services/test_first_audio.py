"""First audio through running workers: how many steps it waits for, counted in the logs of the turn.

The language model takes as many steps as it is let; then everything stands still, and what lies in the logs is all that
these steps have brought.
"""

import asyncio
from contextlib import aclosing

import pytest

from kimia.stage import DETOKENIZER, LLM
from kimia.v1.conversation_pb2 import TrackSampling
from tests.runtime.workers import eventually, new_turn
from tests.services.turns import text

pytestmark = pytest.mark.parity

SAMPLED = {"text": TrackSampling(temperature=0.7, top_k=8), "audio": TrackSampling(temperature=0.8, top_k=10)}
CODE_SAMPLES = 1920


class LetOn:
    """A language model that takes no more steps than `steps`."""

    kind = LLM

    def __init__(self, stage, steps):
        self.stage = stage
        self.steps = steps
        self.more = asyncio.Event()

    def let(self, steps):
        self.steps = steps
        self.more.set()

    async def run(self, turn, inbox, published=()):
        async with aclosing(self.stage.run(turn, inbox, published)) as chunks:
            async for chunk in chunks:
                while chunk.index >= self.steps:
                    self.more.clear()
                    await self.more.wait()
                yield chunk


class Watched:
    """A detokenizer that counts the steps it has read, and come back from without speaking."""

    kind = DETOKENIZER

    def __init__(self, stage):
        self.stage = stage
        self.read = 0

    async def run(self, turn, inbox, published=()):
        async def counted():
            async for chunk in inbox:
                yield chunk
                self.read += 1

        async with aclosing(self.stage.run(turn, counted(), published)) as chunks:
            async for chunk in chunks:
                yield chunk


@pytest.mark.parametrize(("preset", "steps", "codes"), [("low-latency", 16, 6), ("upstream", 37, 18)])
async def test_the_first_chunk_of_speech_waits_for_so_many_steps_and_no_more(house, stages, preset, steps, codes):
    llm, detokenizer = LetOn(stages["llm"], steps - 1), Watched(stages["detokenizer"])
    house.start(llm)
    house.start(detokenizer)
    turn = new_turn(text("How are you?"), route=(LLM, DETOKENIZER))
    turn.options.preset, turn.options.max_new_tokens = preset, steps + 3
    turn.options.text.CopyFrom(SAMPLED["text"])
    turn.options.audio.CopyFrom(SAMPLED["audio"])
    await house.ask(turn)

    await eventually(lambda: detokenizer.read == steps - 1)
    assert await house.journal.read(turn.id, "audio") == []

    llm.let(steps)
    await house.until(turn.id, "audio", 1)
    tokens, [speech] = [await house.journal.read(turn.id, log) for log in ("tokens", "audio")]
    assert len(tokens) == steps
    assert [chunk.step.HasField("code") for chunk in tokens] == [index >= 6 for index in range(steps)]
    assert 0 < len(speech.speech.pcm) // 2 <= codes * CODE_SAMPLES  # one chunk; its seam may wait

    llm.let(1000)
    assert (await house.ended(turn.id)).state == "done"
