"""One claimed turn against every answer that the journal may give."""

import asyncio

import pytest

from kimia.errors import NotFoundError, UnavailableError
from kimia.runtime.attempt import HANDED_OVER, LOST, RETRIED, AsItIs, Attempt, Bench
from kimia.runtime.fake import DELAY, FakeLanguageModel, FakeTiming
from kimia.runtime.rows import Row, Rows
from kimia.stage import LLM
from kimia.streams.jobs import Claim, Outcome, Published
from kimia.streams.journal import Playback
from kimia.streams.patience import Patience
from kimia.v1.turn_pb2 import Chunk
from tests.runtime.workers import ROUTE, eventually, new_turn

pytestmark = pytest.mark.unit

TURN = new_turn(route=[LLM])


class Feed:
    """A turn that nobody ends."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    async def ended(self):
        await asyncio.Event().wait()

    async def playback(self):
        await asyncio.Event().wait()
        yield


class Journal:
    """Log, jobs, inbox and publisher in one. `answers` are given before the honest ones, by index of the chunk."""

    def __init__(self, written=(), answers=None):
        self.log = list(written)
        self.answers = answers or {}
        self.sent = []
        self.said = []
        self.journal = self

    def feed(self, turn_id):
        return Feed()

    async def read(self, turn_id, log):
        return list(self.log)

    async def head(self, turn_id):
        raise NotFoundError(f"no turn {turn_id}")

    async def publish(self, claim, chunk):
        self.sent.append(chunk.index)
        if self.answers.get(chunk.index):
            return self.answers[chunk.index].pop(0)
        self.log = [*self.log[: chunk.index], chunk]
        return Published(Outcome.WRITTEN, chunk.index + 1)

    async def release(self, claim):
        self.said.append("release")

    async def fail(self, claim, failure):
        self.said.append(failure.reason)


def new_row():
    rows = Rows(1)
    assert rows.try_acquire()
    return Row(rows)


def attempt_of(journal, stage=None, next_index=0, turn=TURN, playback=None):
    stage = stage or FakeLanguageModel(FakeTiming(steps=12))
    bench = Bench(stage, journal, journal, None, journal, Patience(), 1, "weights", lead=3603.0)
    claim = Claim(turn, LLM, "me", 1, "jobs", "1-0", 1, next_index, False, 0.0, playback)
    return Attempt(bench, claim, new_row())


async def outcome(attempt):
    await asyncio.wait_for(attempt.task, 5)
    return attempt.outcome


async def whole():
    journal = Journal()
    assert await outcome(attempt_of(journal)) == "done"
    return journal.log


async def test_every_chunk_is_published_once_in_order():
    journal = Journal()
    assert await outcome(attempt_of(journal)) == "done"
    assert journal.sent == list(range(12))
    assert journal.said == []


async def test_it_goes_on_behind_what_is_published():
    log = await whole()
    journal = Journal(log[:5])
    assert await outcome(attempt_of(journal, next_index=5)) == "done"
    assert journal.sent == list(range(5, 12))
    assert journal.log == log


async def test_a_final_chunk_whose_answer_was_lost_is_said_again():
    log = await whole()
    journal = Journal(log, {11: [Published(Outcome.DUPLICATE, 12)]})
    assert await outcome(attempt_of(journal, next_index=12)) == "done"
    assert journal.sent == [11]


async def test_duplicates_are_passed_over():
    journal = Journal(answers={4: [Published(Outcome.DUPLICATE, 5)]})
    assert await outcome(attempt_of(journal)) == "done"
    assert journal.sent == list(range(12))


@pytest.mark.parametrize("published", [0, 6], ids=["its own", "another's"])
async def test_a_gap_is_filled_from_where_it_begins(published):
    log = await whole()
    journal = Journal(log[:published], {8: [Published(Outcome.GAP, 3)]})
    assert await outcome(attempt_of(journal, next_index=published)) == "done"
    assert journal.sent == [*range(published, 9), *range(3, 12)]
    assert journal.log == log


@pytest.mark.parametrize(
    ("answer", "expected"),
    [(Outcome.FENCED, LOST), (Outcome.GONE, LOST), (Outcome.CANCELLED, "cancelled")],
)
async def test_it_stops_within_one_chunk(answer, expected):
    journal = Journal(answers={4: [Published(answer, 4)]})
    assert await outcome(attempt_of(journal)) == expected
    assert journal.sent == list(range(5))
    assert journal.said == []


async def test_the_next_chunk_is_computed_while_the_last_one_is_published():
    class Ahead(FakeLanguageModel):
        computed = asyncio.Event()  # the second chunk

        async def run(self, turn, inbox, published=()):
            async for chunk in super().run(turn, inbox, published):
                if chunk.index == 1:
                    self.computed.set()
                yield chunk

    class Slow(Journal):
        async def publish(self, claim, chunk):
            if chunk.index == 0:
                await Ahead.computed.wait()  # for ever, were one done after the other
            return await super().publish(claim, chunk)

    journal = Slow()
    assert await outcome(attempt_of(journal, Ahead(FakeTiming(steps=12)))) == "done"
    assert journal.sent == list(range(12))


class Counting(FakeLanguageModel):
    """Counts the steps that it makes, given out or not."""

    made = 0

    async def run(self, turn, inbox, published=()):
        async for chunk in super().run(turn, inbox, published):
            self.made += 1
            yield chunk


async def test_beyond_the_lead_nothing_is_asked_of_the_stage_and_the_row_is_free():
    turn, journal, stage = new_turn(route=ROUTE[1:]), Journal(), Counting(FakeTiming(steps=100))
    attempt = attempt_of(journal, stage, turn=turn, playback=Playback(heard=-3600.0, age=0.0))
    await eventually(lambda: len(journal.log) == DELAY + 46)  # commits of 6, 12 and 24 and 4 to look ahead: 3.2 s
    await asyncio.sleep(0.01)
    assert stage.made == len(journal.log) == DELAY + 46
    assert attempt.row._rows.free == 1
    attempt.stop(HANDED_OVER)
    assert await outcome(attempt) == HANDED_OVER
    attempt.row.leave()
    assert (attempt.row._rows.used, attempt.row._rows.parked) == (0, 0)


class Waiting(FakeLanguageModel):
    """Gives one chunk and waits; swallows so many cancellations."""

    def __init__(self, swallows=0):
        super().__init__()
        self.swallows = swallows
        self.waits = asyncio.Event()
        self.closed = False

    async def run(self, turn, inbox, published=()):
        try:
            yield Chunk(index=len(published))
            while True:
                try:
                    self.waits.set()
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    if not self.swallows:
                        raise
                    self.swallows -= 1
        finally:
            self.closed = True


@pytest.mark.parametrize("swallows", [0, 2])
async def test_stopping_closes_the_stage_though_a_cancellation_is_lost(monkeypatch, swallows):
    monkeypatch.setattr("kimia.runtime.attempt.CANCEL_AGAIN", 0.001)
    journal, stage = Journal(), Waiting(swallows)
    attempt = attempt_of(journal, stage)
    await stage.waits.wait()
    attempt.stop("cancelled")
    attempt.stop(LOST)
    assert await outcome(attempt) == "cancelled"
    assert stage.closed
    assert journal.said == []


async def test_handing_over_releases_the_claim():
    journal, stage = Journal(), Waiting()
    attempt = attempt_of(journal, stage)
    await stage.waits.wait()
    attempt.stop(HANDED_OVER)
    assert await outcome(attempt) == HANDED_OVER
    assert journal.said == ["release"]


async def test_torn_down_it_says_nothing():
    journal, stage = Journal(), Waiting()
    attempt = attempt_of(journal, stage)
    await stage.waits.wait()
    attempt.task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt.task
    assert stage.closed
    assert journal.said == []


async def test_stopping_after_the_end_changes_nothing():
    journal = Journal()
    attempt = attempt_of(journal)
    assert await outcome(attempt) == "done"
    attempt.stop("cancelled")
    assert attempt.outcome == "done"


class Broken(FakeLanguageModel):
    def __init__(self, error):
        super().__init__()
        self.error = error

    async def run(self, turn, inbox, published=()):
        raise self.error
        yield


@pytest.mark.parametrize("error", [KeyError("bug"), UnavailableError("no Triton")])
async def test_what_may_pass_is_left_for_another_attempt(error):
    journal = Journal()
    assert await outcome(attempt_of(journal, Broken(error))) == RETRIED
    assert journal.said == []


@pytest.mark.parametrize("there", [True, False], ids=["another worker has it", "the turn is gone"])
async def test_what_was_put_away_is_dropped_where_a_lost_turn_is_gone(monkeypatch, there):
    closed = []

    async def close(self, over):
        closed.append(over)

    class Head:
        over = False

    async def head(turn_id):
        return Head()

    monkeypatch.setattr(AsItIs, "close", close)
    journal = Journal(answers={4: [Published(Outcome.FENCED, 4)]})
    if there:
        journal.head = head
    assert await outcome(attempt_of(journal)) == LOST
    assert closed == [not there]
