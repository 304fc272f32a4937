"""Stages joined by queues in one process."""

import asyncio

import pytest

from kimia.errors import AudioError, ParameterError
from kimia.runtime.fake import FakeDetokenizer, FakeLanguageModel, FakeTiming, FakeTokenizer, read_pcm
from kimia.runtime.local import run_route
from kimia.stage import DETOKENIZER, LLM, TOKENIZER
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.turn_pb2 import Chunk, InputAudio, Turn

pytestmark = pytest.mark.unit

FORMAT = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
SOUND = bytes(i * 7 % 251 for i in range(40000))
INPUT = [Chunk(input=InputAudio(data=SOUND, clip_end=True), final=True)]


def turn_through(*kinds):
    message = Message(role=ROLE_USER, audio=Clip(format=FORMAT))
    return Turn(id="s.t", seed=3, route=[kind.number for kind in kinds], messages=[message])


def stages(**timing):
    made = (FakeTokenizer, FakeLanguageModel, FakeDetokenizer)
    return {stage.kind.name: stage for stage in (kind(FakeTiming(**timing)) for kind in made)}


async def logs(turn, given=INPUT, **timing):
    found = {}
    async for kind, chunk in run_route(stages(**timing), turn, given):
        found.setdefault(kind.writes, []).append(chunk)
    return found


async def test_every_log_is_complete():
    found = await logs(turn_through(TOKENIZER, LLM, DETOKENIZER))
    assert set(found) == {"encoded", "tokens", "audio"}
    for chunks in found.values():
        assert [c.index for c in chunks] == list(range(len(chunks)))
        assert chunks[-1].final
    codes = [c.step.code for c in found["tokens"] if c.step.HasField("code")]
    assert read_pcm(b"".join(c.speech.pcm for c in found["audio"])) == list(enumerate(codes))


async def test_a_shorter_route_leaves_stages_out():
    assert set(await logs(turn_through(LLM), [])) == {"tokens"}
    assert set(await logs(turn_through(TOKENIZER, LLM))) == {"encoded", "tokens"}


async def test_stages_run_at_the_same_time():
    order = [kind.name async for kind, _ in run_route(stages(step_seconds=1e-4), turn_through(LLM, DETOKENIZER))]
    assert order.index("detokenizer") < len(order) - 1 - order[::-1].index("llm")


async def test_what_a_stage_raises_comes_out_as_it_is():
    with pytest.raises(AudioError, match="clip_end"):
        await logs(turn_through(TOKENIZER, LLM, DETOKENIZER), [])


async def test_a_missing_stage_is_refused():
    with pytest.raises(ParameterError, match="llm"):
        async for _ in run_route({}, turn_through(LLM)):
            pass


class Endless(FakeLanguageModel):
    """Waits forever after its first step, and says when it was closed."""

    closed = False

    async def run(self, turn, inbox, published=()):
        try:
            yield Chunk(index=0)
            await asyncio.Event().wait()
        finally:
            self.closed = True


async def test_closing_ends_every_stage():
    endless = Endless()
    before = asyncio.all_tasks()
    route = run_route({**stages(), "llm": endless}, turn_through(LLM, DETOKENIZER))
    assert (await anext(route))[0] is LLM
    await route.aclose()
    assert endless.closed
    assert asyncio.all_tasks() == before
