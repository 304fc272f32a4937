import asyncio
from contextlib import aclosing

import pytest

from kimia.errors import NotFoundError
from kimia.stage import DETOKENIZER, LLM
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat
from kimia.v1.conversation_pb2 import TurnOptions
from kimia.v1.turn_pb2 import STOP_REASON_AUDIO_EOD, Chunk, Speech, StageReport, Step, Turn
from orchestrator.following import Following, Position, merged
from tests.orchestrator.world import NATIVE, indices, kinds, text_of

pytestmark = pytest.mark.unit


# ---- merging ----------------------------------------------------------------------------------------------------


async def items(*values, then=None):
    for value in values:
        await asyncio.sleep(0)
        yield value
    if then is not None:
        raise then


async def test_sources_are_merged_each_in_its_order():
    found = [item async for item in merged(items(1, 2, 3), items("a", "b"), items())]
    assert [item for item in found if isinstance(item, int)] == [1, 2, 3]
    assert [item for item in found if isinstance(item, str)] == ["a", "b"]


async def test_the_error_of_one_source_ends_all():
    with pytest.raises(NotFoundError):
        _ = [item async for item in merged(items(*range(100)), items(1, then=NotFoundError("gone")))]


async def test_leaving_early_ends_the_sources():
    ended = asyncio.Event()

    async def endless():
        try:
            while True:
                await asyncio.sleep(0)
                yield 1
        finally:
            ended.set()

    async with aclosing(merged(endless())) as found:
        assert await anext(found) == 1
    async with asyncio.timeout(5):
        await ended.wait()


async def test_a_slow_reader_holds_the_source_back():
    made = []

    async def counted():
        for number in range(100):
            made.append(number)
            yield number

    async with aclosing(merged(counted())) as found:
        await anext(found)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(made) <= 2


# ---- events -----------------------------------------------------------------------------------------------------


class Logs:
    """A feed of a turn that has ended."""

    def __init__(self, steps, speeches):
        self.logs = {"tokens": steps, "audio": speeches}
        self.closed = False

    async def chunks(self, log, start=0):
        for chunk in self.logs[log][start:]:
            yield chunk

    def close(self):
        self.closed = True


TURN = Turn(
    id="s.1", session_id="s", seed=5, route=[LLM.number, DETOKENIZER.number], options=TurnOptions(output_format=NATIVE)
)


def logs(texts=("a", "", "b", "c"), samples=(100, 0, 200)):
    steps = [Chunk(index=at, step=Step(text=text, code=at)) for at, text in enumerate(texts)]
    steps[-1].final, steps[-1].step.stop = True, STOP_REASON_AUDIO_EOD
    steps[-1].report.CopyFrom(StageReport(prompt_positions=9))
    speeches = [
        Chunk(index=at, speech=Speech(pcm=bytes(2 * count), sample_rate=24000)) for at, count in enumerate(samples)
    ]
    speeches[-1].final = True
    return Logs(steps, speeches)


async def events_of(following):
    with following:
        return [event async for event in following.events()]


async def test_events_are_numbered_without_gap_and_empty_ones_left_out():
    feed = logs()
    following = Following(feed, TURN)
    events = await events_of(following)
    assert kinds(events)[0] == "started"
    assert events[0].started.seed == 5
    assert indices(events, "text") == [0, 1, 2]
    assert indices(events, "audio") == [0, 1]
    assert text_of(events) == following.text == "abc"
    assert following.codes == 4
    assert following.whole
    assert following.stop == STOP_REASON_AUDIO_EOD
    assert following.reports["llm"].prompt_positions == 9
    assert following.sent_ms == 300 * 1000 // 24000
    assert feed.closed


@pytest.mark.parametrize("texts", range(4))
@pytest.mark.parametrize("audios", range(3))
async def test_who_has_some_events_gets_the_others(texts, audios):
    events = await events_of(Following(logs(), TURN, Position(texts, audios)))
    assert indices(events, "text") == list(range(texts, 3))
    assert indices(events, "audio") == list(range(audios, 2))
    assert ("started" in kinds(events)) == (not texts and not audios)


async def test_pieces_in_another_rate_are_numbered_as_they_come_out():
    options = TurnOptions(output_format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=8000))
    turn = Turn(id="s.1", route=[LLM.number, DETOKENIZER.number], options=options)
    whole = await events_of(Following(logs(samples=(600, 3, 900, 0)), turn))
    rest = await events_of(Following(logs(samples=(600, 3, 900, 0)), turn, Position(0, 1)))
    audio = [event for event in whole if event.HasField("audio")]
    assert [event for event in rest if event.HasField("audio")] == audio[1:]
    assert sum(len(event.audio.data) for event in audio) == 2 * 501


async def test_a_turn_of_text_has_one_log():
    turn = Turn(id="s.1", route=[LLM.number])
    events = await events_of(Following(logs(), turn))
    assert set(kinds(events)) == {"started", "text"}
