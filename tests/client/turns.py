"""One set of cases for both clients: each opens a turn and gives what came of it."""

import asyncio

from kimia.client import AsyncKimia, Kimia
from tests.client.scripted import FAST

QUESTION = [{"role": "user", "message_type": "text", "content": "Hello?"}]


async def asyncio_events(service, open_turn, options=FAST) -> list:
    """The events that the client for asyncio gives."""
    async with AsyncKimia(service.target, options=options) as kimia:
        return [event async for event in open_turn(kimia)]


async def blocking_events(service, open_turn, options=FAST) -> list:
    """The events that the blocking client gives, in a thread."""

    def events() -> list:
        with Kimia(service.target, options=options) as kimia:
            return list(open_turn(kimia))

    return await asyncio.to_thread(events)


async def asyncio_result(service, ask, options=FAST):
    """What an awaitable of the client for asyncio gives."""
    async with AsyncKimia(service.target, options=options) as kimia:
        return await ask(kimia)


async def blocking_result(service, ask, options=FAST):
    """What a method of the blocking client gives, called in a thread."""

    def result():
        with Kimia(service.target, options=options) as kimia:
            return ask(kimia)

    return await asyncio.to_thread(result)


EVENTS = {"asyncio": asyncio_events, "blocking": blocking_events}
RESULTS = {"asyncio": asyncio_result, "blocking": blocking_result}


def question(kimia):
    """A turn that asks."""
    return kimia.generate(QUESTION)
