"""Requests in one round trip."""

import asyncio

import pytest

from kimia.errors import NotFoundError
from kimia.streams import together
from kimia.streams.together import Together

pytestmark = pytest.mark.unit


class Server:
    """Answers batches with ten times the request, as long as `open` is set; fails first as told."""

    def __init__(self, *errors):
        self.batches = []
        self.errors = list(errors)
        self.open = asyncio.Event()

    async def send(self, requests):
        self.batches.append(list(requests))
        await self.open.wait()
        if self.errors:
            raise self.errors.pop()
        return [10 * request for request in requests]


async def asked(asking, *requests):
    """Tasks that have asked."""
    tasks = [asyncio.create_task(asking.ask(request)) for request in requests]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return tasks


async def test_what_is_asked_meanwhile_goes_together():
    server = Server()
    asking = Together(server.send)
    tasks = await asked(asking, 1) + await asked(asking, 2, 3) + await asked(asking, 4)
    server.open.set()
    assert await asyncio.gather(*tasks) == [10, 20, 30, 40]
    assert server.batches == [[1], [2, 3, 4]]
    assert await asking.ask(5) == 50


async def test_large_batches_are_cut(monkeypatch):
    monkeypatch.setattr(together, "MOST", 2)
    server = Server()
    server.open.set()
    asking = Together(server.send)
    assert await asyncio.gather(*(asking.ask(n) for n in range(5))) == [0, 10, 20, 30, 40]
    assert server.batches == [[0, 1], [2, 3], [4]]


async def test_an_error_reaches_everybody_of_its_batch_only():
    server = Server(NotFoundError("a bug"))
    asking = Together(server.send)
    tasks = await asked(asking, 1, 2) + await asked(asking, 3)
    server.open.set()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [NotFoundError, NotFoundError, int]


async def test_who_has_given_up_is_not_sent():
    server = Server()
    asking = Together(server.send)
    (first,) = await asked(asking, 1)
    second, third = await asked(asking, 2, 3)
    second.cancel()
    first.cancel()
    await asyncio.sleep(0)
    server.open.set()
    assert await third == 30
    assert server.batches == [[1], [3]]


async def test_closing_cancels_who_waits():
    asking = Together(Server().send)
    tasks = await asked(asking, 1) + await asked(asking, 2)
    await asking.aclose()
    await asking.aclose()
    answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers] == [asyncio.CancelledError] * 2
