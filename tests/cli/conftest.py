"""A service that follows a script, in a thread of its own, for commands that block."""

import asyncio
import threading
from collections.abc import Iterator

import pytest

from tests.client.scripted import Scripted, serving


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """The service; its `target` is where it listens."""
    service, up, loop = Scripted(), threading.Event(), asyncio.new_event_loop()
    stop = asyncio.Event()

    async def serve() -> None:
        async with serving(service) as service.target:
            up.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    up.wait()
    yield service
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.close()
