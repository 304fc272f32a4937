"""Finished segments of callers who still speak: encoded once, found at the end, gone with their session."""

import asyncio

import pytest
from prometheus_client import REGISTRY

from kimia.runtime.early import encode_early
from kimia.runtime.fake import FakeTiming, FakeTokenizer, build
from kimia.streams import keys
from kimia.streams.early import Early
from kimia.v1.turn_pb2 import Turn
from tests.runtime.workers import SECONDS, computed, heard, input_log, new_turn, sound

pytestmark = pytest.mark.unit

LONG = 800  # codes: two segments, and 50 codes behind them


class Counting(FakeTokenizer):
    """Notes the positions of every stretch that it makes."""

    def __init__(self):
        super().__init__()
        self.made = 0

    async def run(self, turn, inbox, published=()):
        async for chunk in super().run(turn, inbox, published):
            self.made += len(chunk.encoded.codes)
            yield chunk


def start_others(house):
    for name in ("llm", "detokenizer"):
        house.start(build(name, FakeTiming()))


def hint(turn):
    return Turn(id=turn.id, session_id=turn.session_id, messages=[heard(0)])


def encoded_seconds(outcome):
    return REGISTRY.get_sample_value("kimia_encoded_sound_seconds_total", {"outcome": outcome}) or 0.0


async def collecting(house, turn, log):
    opened = await house.journal.open_turn(Turn(id=turn.id, session_id=turn.session_id), "orchestrator")
    await house.journal.append_input(turn.id, opened.token, log)
    return opened.token


async def test_the_end_of_speech_waits_for_the_last_segment_alone(house):
    stage = Counting()
    house.start(stage)
    start_others(house)
    turn, log = new_turn(heard(0)), input_log((0, sound(LONG, 101)), size=100_000)
    early, found = encoded_seconds("early"), encoded_seconds("found")
    named = keys.session_blobs("{0}", turn.session_id)
    token = await collecting(house, turn, log[:-1])
    await Early(house.wire).offer(hint(turn))
    async with asyncio.timeout(SECONDS):
        while await house.wire.journal.scard(named) < 64:
            await asyncio.sleep(0.002)
    assert stage.made == 750
    assert encoded_seconds("early") - early == pytest.approx(60.0)
    await house.journal.append_input(turn.id, token, log[-1:])
    await house.journal.submit(turn, token)
    assert (await house.ended(turn.id)).state == "done"
    assert stage.made == LONG
    assert encoded_seconds("found") - found == pytest.approx(60.0)
    assert await house.logs(turn.id) == await computed(turn, log, FakeTiming())


async def test_equal_sound_is_encoded_once_for_a_tenant(house):
    stage = Counting()
    house.start(stage)
    start_others(house)
    for expected in (40, 40):
        turn, log = new_turn(heard(0)), input_log((0, sound(40, 102)))
        await house.ask(turn, log)
        assert (await house.ended(turn.id)).state == "done"
        assert stage.made == expected
        assert await house.logs(turn.id) == await computed(turn, log, FakeTiming())


async def test_twice_told_is_encoded_once_and_what_was_submitted_not_at_all(house):
    stage = Counting()
    worker = house.start(stage)
    turn, log = new_turn(heard(0)), input_log((0, sound(400, 103)), size=100_000)
    token = await collecting(house, turn, log[:-1])
    await encode_early(worker._bench, hint(turn))
    await encode_early(worker._bench, hint(turn))
    assert stage.made == 375
    await house.journal.append_input(turn.id, token, log[-1:])
    await house.journal.cancel(turn.id)
    other = input_log((0, sound(400, 104)), size=100_000)
    late = new_turn(heard(0))
    await house.journal.cancel((await collected(house, late, other)).id)
    await encode_early(worker._bench, hint(late))
    assert stage.made == 375


async def collected(house, turn, log):
    await collecting(house, turn, log)
    return turn


async def blobs_of(house):
    return set(await house.wire.blobs.keys("*:blob:*"))


async def test_what_was_made_early_goes_with_the_session(house):
    worker = house.start(Counting())
    turn, log = new_turn(heard(0)), input_log((0, sound(400, 105)), size=100_000)
    await collecting(house, turn, log[:-1])
    before = await blobs_of(house)
    await encode_early(worker._bench, hint(turn))
    assert len(await blobs_of(house) - before) == 32
    await house.journal.delete_session(turn.session_id)
    assert await blobs_of(house) <= before


async def test_what_comes_after_the_deletion_leaves_nothing(house):
    class Slow(FakeTokenizer):
        async def run(self, turn, inbox, published=()):
            async for chunk in super().run(turn, inbox, published):
                if chunk.index == 30:
                    await house.journal.delete_session(turn.session_id)
                yield chunk

    worker = house.start(Slow())
    turn, log = new_turn(heard(0)), input_log((0, sound(400, 106)), size=100_000)
    await collecting(house, turn, log[:-1])
    before = await blobs_of(house)
    await encode_early(worker._bench, hint(turn))
    assert await blobs_of(house) <= before


async def test_what_cannot_be_encoded_is_left_to_the_turn(house):
    worker = house.start(stage := Counting())
    await encode_early(worker._bench, hint(new_turn(heard(0))))  # it was never opened
    turn = new_turn(heard(0))
    await collecting(house, turn, input_log((0, sound(100, 107)))[:-1])
    await encode_early(worker._bench, hint(turn))  # and of this there is no whole segment
    assert not stage.made
