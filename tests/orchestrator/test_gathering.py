"""Sound waits for more of it, everything else goes on at once; nothing is lost and nothing changes its place."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia.errors import RequestError
from kimia.v1.kimi_audio_pb2 import CallerAudio, Commit, ConverseRequest, Playback
from orchestrator.gathering import GATHERED_REQUESTS, gathered

pytestmark = pytest.mark.unit

FOR_EVER = 3600.0  # seconds: whoever waits for this does not end in time


def sound(index):
    return ConverseRequest(audio=CallerAudio(index=index, data=b"\0\0"))


COMMIT = ConverseRequest(commit=Commit())
HEARD = ConverseRequest(playback=Playback(heard_ms=20))


async def told(*requests, error=None, pause=None):
    """A stream of requests; `pause`: place before which the client falls silent for a moment."""
    for place, request in enumerate(requests):
        if place == pause:
            await asyncio.sleep(0.05)
        yield request
    if error is not None:
        raise error


async def batches(requests, seconds=FOR_EVER):
    async with asyncio.timeout(20):
        return [batch async for batch in gathered(requests, seconds)]


async def test_sound_waits_for_what_follows_it_and_a_commit_for_nothing():
    pieces = [sound(index) for index in range(5)]
    assert await batches(told(*pieces, COMMIT, pause=3)) == [[*pieces, COMMIT]]
    assert await batches(told(HEARD, COMMIT, pause=1)) == [[HEARD], [COMMIT]]


async def test_sound_waits_no_longer_than_a_moment():
    assert await batches(told(sound(0), sound(1), pause=1), seconds=0.0) == [[sound(0)], [sound(1)]]


async def test_no_more_is_read_ahead_than_agreed():
    read = []

    async def endless():
        for index in range(10 * GATHERED_REQUESTS):
            read.append(index)
            yield sound(index)

    stream = gathered(endless(), FOR_EVER)
    assert len(await anext(stream)) == GATHERED_REQUESTS
    await asyncio.sleep(0.01)
    assert len(read) <= 2 * GATHERED_REQUESTS
    await stream.aclose()


async def test_an_error_comes_behind_what_was_read_before_it():
    seen = []

    async def read():
        async for batch in gathered(told(sound(0), sound(1), error=RequestError("nonsense")), FOR_EVER):
            seen.extend(batch)

    with pytest.raises(RequestError, match="nonsense"):
        await read()
    assert seen == [sound(0), sound(1)]


async def test_who_stops_listening_stops_the_reading():
    ended = asyncio.Event()

    async def waiting():
        try:
            yield COMMIT
            await asyncio.Event().wait()
        finally:
            ended.set()

    stream = gathered(waiting(), FOR_EVER)
    assert await anext(stream) == [COMMIT]
    await stream.aclose()
    assert ended.is_set()


@given(st.lists(st.sampled_from(["sound", "commit", "pause"]), max_size=60))
def test_everything_comes_once_and_in_order(script):
    requests = [sound(at) if what == "sound" else COMMIT for at, what in enumerate(script) if what != "pause"]

    async def client():
        given_requests = iter(requests)
        for what in script:
            if what == "pause":
                await asyncio.sleep(0)
            else:
                yield next(given_requests)

    found = asyncio.run(batches(client(), seconds=0.0001))
    assert [request for batch in found for request in batch] == requests
    assert all(found)
