"""Chunks of all rows in one round trip."""

import asyncio

import pytest

from kimia.errors import NotFoundError, UnavailableError
from kimia.runtime.publisher import Publisher
from kimia.streams.jobs import Outcome, Published
from kimia.streams.patience import Patience
from kimia.v1.turn_pb2 import Chunk

pytestmark = pytest.mark.unit


class Journal:
    """Takes batches, each as long as `open` is set; fails first as told."""

    def __init__(self, *errors):
        self.batches = []
        self.errors = list(errors)
        self.open = asyncio.Event()
        self.open.set()

    async def publish_all(self, chunks):
        self.batches.append([(claim, chunk.index) for claim, chunk in chunks])
        await self.open.wait()
        if self.errors:
            raise self.errors.pop()
        return [Published(Outcome.WRITTEN, chunk.index + 1) for _, chunk in chunks]


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    monkeypatch.setattr("kimia.streams.patience.FIRST_PAUSE", 1e-4)


def publisher_of(journal):
    return Publisher(journal, Patience(), "llm")


async def test_what_comes_meanwhile_goes_together():
    journal = Journal()
    journal.open.clear()
    publisher = publisher_of(journal)
    sent = [asyncio.create_task(publisher.publish(name, Chunk(index=i))) for i, name in enumerate("abcd")]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = [asyncio.create_task(publisher.publish(name, Chunk(index=9))) for name in "ef"]
    await asyncio.sleep(0)
    journal.open.set()
    answers = await asyncio.gather(*sent, *late)
    assert [answer.next for answer in answers] == [1, 2, 3, 4, 10, 10]
    assert [len(batch) for batch in journal.batches] == [4, 2]


async def test_a_lost_journal_gets_the_same_again():
    journal = Journal(UnavailableError("down"), UnavailableError("down"))
    answer = await publisher_of(journal).publish("a", Chunk(index=3))
    assert answer == Published(Outcome.WRITTEN, 4)
    assert journal.batches == [[("a", 3)]] * 3


async def test_other_errors_reach_every_turn_of_the_batch():
    journal = Journal(NotFoundError("a bug"))
    publisher = publisher_of(journal)
    answers = await asyncio.gather(*(publisher.publish(c, Chunk()) for c in "ab"), return_exceptions=True)
    assert [type(answer) for answer in answers] == [NotFoundError, NotFoundError]
    assert (await publisher.publish("c", Chunk())).outcome is Outcome.WRITTEN


async def test_closing_cancels_who_waits():
    journal = Journal()
    journal.open.clear()
    publisher = publisher_of(journal)
    waiting = asyncio.create_task(publisher.publish("a", Chunk()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    await publisher.aclose()
    await publisher.aclose()
    with pytest.raises(asyncio.CancelledError):
        await waiting
