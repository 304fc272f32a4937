"""Mels on their way into blobs and back, and what becomes of them when the turn is over."""

import asyncio

import pytest

from kimia.errors import UnavailableError
from kimia.runtime.mels import MelOutlet, with_mels
from kimia.v1.turn_pb2 import Chunk, Speech, Step
from tests.runtime.workers import new_turn

pytestmark = pytest.mark.unit

TURN = new_turn()


class Blobs:
    """A store whose `put` takes until `open` is set."""

    def __init__(self, down=False):
        self.kept = {}
        self.down = down
        self.open = asyncio.Event()
        self.open.set()

    async def put(self, key, data):
        await self.open.wait()
        self._check()
        self.kept[key] = data

    async def get(self, keys):
        self._check()
        return [self.kept.get(key) for key in keys]

    async def drop(self, keys):
        self._check()
        for key in keys:
            self.kept.pop(key, None)

    def _check(self):
        if self.down:
            raise UnavailableError("down")


def spoken(count=3):
    """Chunks of a turn, the last one without a mel."""
    mels = [bytes([index + 1] * 8) for index in range(count - 1)] + [b""]
    return [Chunk(index=i, speech=Speech(pcm=b"ab", mel=mel), final=not mel) for i, mel in enumerate(mels)]


async def put_away(blobs, chunks, published=()):
    outlet = MelOutlet(blobs, TURN, ("{0}", "t"), published)
    return outlet, [taken for chunk in chunks for taken in await outlet.take(chunk)]


async def test_mels_go_away_and_come_back():
    blobs = Blobs()
    outlet, out = await put_away(blobs, spoken())
    await outlet.close(over=False)
    assert [bool(chunk.speech.mel_key) for chunk in out] == [True, True, False]
    assert not any(chunk.speech.mel for chunk in out)
    assert sorted(blobs.kept.values()) == [b"\x01" * 8, b"\x02" * 8]
    assert all(key.startswith("{0}:blob:t:") and TURN.id in key for key in blobs.kept)
    filled = await with_mels(blobs, out)
    assert [chunk.speech.mel for chunk in filled] == [chunk.speech.mel for chunk in spoken()]
    assert not any(chunk.speech.mel for chunk in out)  # what is published again stays small


async def test_nobody_waits_for_the_store():
    blobs = Blobs()
    blobs.open.clear()
    outlet, out = await put_away(blobs, spoken())
    assert out[1].speech.mel_key
    assert blobs.kept == {}
    closing = asyncio.create_task(outlet.close(over=False))
    await asyncio.sleep(0)
    assert not closing.done()  # the next worker is to find them
    blobs.open.set()
    await closing
    assert len(blobs.kept) == 2


async def test_a_turn_that_is_over_leaves_none_behind_not_even_those_of_others():
    blobs = Blobs()
    first, published = await put_away(blobs, spoken(4)[:2])
    await first.close(over=False)
    blobs.open.clear()
    second, _ = await put_away(blobs, spoken(4)[2:], published)
    blobs.open.set()
    assert len(blobs.kept) == 2
    await second.close(over=True)  # also what was still on its way
    assert blobs.kept == {}


async def test_a_store_that_is_down_costs_no_chunk():
    blobs = Blobs(down=True)
    outlet, out = await put_away(blobs, spoken())
    await outlet.close(over=True)
    assert await with_mels(blobs, out) == out


async def test_missing_mels_stay_empty():
    blobs = Blobs()
    outlet, out = await put_away(blobs, spoken())
    await outlet.close(over=False)
    del blobs.kept[out[0].speech.mel_key]
    assert [bool(chunk.speech.mel) for chunk in await with_mels(blobs, out)] == [False, True, False]


async def test_who_is_cancelled_while_storing_leaves_no_task():
    blobs = Blobs()
    blobs.open.clear()
    outlet, _ = await put_away(blobs, spoken())
    closing = asyncio.create_task(outlet.close(over=False))
    await asyncio.sleep(0)
    closing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await closing
    assert len(asyncio.all_tasks()) == 1


async def test_chunks_without_speech_pass():
    chunk = Chunk(step=Step(text_id=1))
    outlet, out = await put_away(Blobs(), [chunk])
    await outlet.close(over=True)
    assert out == [Chunk(step=Step(text_id=1))]
