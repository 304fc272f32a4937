"""Conversations on two real workers of the language model: where the next turn goes, and what it then says.

Whoever answers, and whatever it has kept: every turn's log is the one that its spec alone leads to.
"""

import asyncio
from contextlib import asynccontextmanager

import pytest

from kimia.compute import ComputeThread
from kimia.model.engine import context_bytes
from kimia.model.prefix import Prefixes
from kimia.runtime.fake import FakeDetokenizer, FakeTokenizer
from kimia.streams.ledger import Ledger
from kimia.streams.wire import Wire, WireOptions
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.conversation_pb2 import TrackSampling, TurnOptions
from orchestrator.memory import CODE_MS
from services.llm.stage import LanguageModelStage
from tests.orchestrator.world import World
from tests.runtime.test_worker import looks
from tests.runtime.workers import content
from tests.services.turns import ran

pytestmark = pytest.mark.parity

SAMPLED = TrackSampling(temperature=0.9)
QUESTION = "§" * 30  # 60 ids: turns are of several pieces of 64 positions


class Pair(World):
    """Two workers of the language model, one for speech, an orchestrator."""

    def __init__(self, wire, model):
        super().__init__(wire)
        self.model = model
        self.threads = []
        self.workers = {}

    async def open(self):
        for stage in (FakeTokenizer(), FakeDetokenizer()):
            self.start(stage)
        for _ in range(2):
            self.threads.append(ComputeThread())
            prefixes = Prefixes(4 * context_bytes(self.model.lm))
            stage = LanguageModelStage(self.model.lm, self.model.tokenizer, self.threads[-1], 2, prefixes)
            worker = self.start(stage, rows=2)
            self.workers[worker.consumer] = worker, stage
            await looks(self, worker)
        async with asyncio.timeout(10):
            while any(not stage.capacity for stage in (await Ledger(self.wire).usage()).values()):
                await asyncio.sleep(0.002)
        await self.host()

    async def close(self):
        for thread in self.threads:
            thread.close()

    def stage(self, name):
        return self.workers[name][1]

    async def rested(self):
        """Until both have read ahead what they can."""
        for _, stage in self.workers.values():
            while stage.scheduler._pump is not None and not stage.scheduler._pump.done():
                await asyncio.sleep(0.002)

    async def asked(self, call):
        """A question is committed; its turn."""
        await call.send(text=pb.CallerText(text=QUESTION))
        await call.send(commit=pb.Commit())
        return (await call.event("started")).turn_id

    async def answered(self, call):
        """A turn from beginning to end; its id and who answered."""
        turn_id = await self.asked(call)
        assert (await call.turn())[-1].WhichOneof("content") == "done"
        await self.rested()
        return turn_id, (await self.journal.head(turn_id)).stages["llm"].consumer

    async def as_alone(self, stage, *turn_ids):
        """What each turn has said is what a stage says that has kept nothing."""
        for turn_id in turn_ids:
            log = [content(chunk) for chunk in await self.journal.read(turn_id, "tokens")]
            assert log == [content(chunk) for chunk in await ran(stage, await self.spec(turn_id), [])]

    def reused(self, name):
        """Positions that each turn of a worker did not have to read."""
        return [answer.reused for answer in self.workers[name][1].scheduler.answers]


@pytest.fixture
async def pair(valkey_url, model, monkeypatch):
    seen = LanguageModelStage.__init__

    def noting(stage, *args):
        seen(stage, *args)
        scheduler = stage.scheduler
        scheduler.answers, join = [], scheduler.join

        def joined(*args):
            turn = join(*args)
            scheduler.answers.append(turn.answer)
            return turn

        scheduler.join = joined

    monkeypatch.setattr(LanguageModelStage, "__init__", noting)
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=2, prefix_patience=2))
    async with Pair(wire, model) as pair:
        await pair.open()
        yield pair
    await pair.close()
    await wire.aclose()


@asynccontextmanager
async def calling(pair):
    options = TurnOptions(seed=5, max_new_tokens=40, text=SAMPLED, audio=SAMPLED)
    async with pair.call(options=options) as call:
        yield call


async def test_a_conversation_stays_with_the_worker_that_knows_it(pair, stages):
    async with calling(pair) as call:
        turns = [await pair.answered(call) for _ in range(3)]
    [holder] = {name for _, name in turns}
    first, *later = pair.reused(holder)
    assert first == 0
    assert all(positions >= 64 for positions in later)
    await pair.as_alone(stages["llm"], *(turn_id for turn_id, _ in turns))


async def test_when_it_has_died_another_reads_everything(pair, stages):
    async with calling(pair) as call:
        first, holder = await pair.answered(call)
        await pair.kill(pair.workers[holder][0])
        second, other = await pair.answered(call)
        third, again = await pair.answered(call)
    assert other == again != holder
    assert pair.reused(other)[0] == 0
    assert pair.reused(other)[1] >= 64
    await pair.as_alone(stages["llm"], first, second, third)


async def test_a_turn_that_began_with_what_was_kept_is_taken_over_by_who_has_nothing(pair, stages):
    async with calling(pair) as call:
        _, holder = await pair.answered(call)
        turn_id = await pair.asked(call)
        await pair.until(turn_id, "tokens", 5)
        assert pair.reused(holder)[1] >= 64
        await pair.kill(pair.workers[holder][0])
        assert (await call.turn())[-1].WhichOneof("content") == "done"
    head = await pair.journal.head(turn_id)
    assert head.stages["llm"].consumer != holder
    assert head.stages["llm"].take_overs == 1
    await pair.as_alone(stages["llm"], turn_id)


async def test_what_was_not_heard_is_neither_remembered_nor_reused(pair, stages):
    async with calling(pair) as call:
        cut = await pair.asked(call)
        await pair.until(cut, "tokens", 30)
        await call.send(cancel=pb.Cancel(heard_ms=3 * CODE_MS))
        await call.event("cancelled")
        await pair.rested()
        second, holder = await pair.answered(call)
    spec = await pair.spec(second)
    assert len(spec.messages[1].spoken.clip.codes) == 3
    assert (await pair.journal.head(cut)).stages["llm"].consumer == holder
    assert pair.reused(holder)[1] == 64
    await pair.as_alone(stages["llm"], second)


async def test_nothing_is_kept_of_a_deleted_session(pair):
    async with calling(pair) as call:
        ready = await call.ready()
        _, holder = await pair.answered(call)
    stage = pair.stage(holder)
    assert len(stage.scheduler._engine.prefixes) == 1
    await pair.stub.DeleteSession(pb.DeleteSessionRequest(session_id=ready.session_id))
    async with asyncio.timeout(10):
        while len(stage.scheduler._engine.prefixes):
            await asyncio.sleep(0.005)
