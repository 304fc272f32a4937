"""Requests of a call, gathered: sound waits a moment for more of it, everything else goes on at once.

Telephony brings a piece of sound every 20 ms. Storing each by itself is the greatest part of an orchestrator's work,
and where the store is slower than the caller speaks, the pieces of a question queue up and its answer begins late.
Nothing is gained by storing them earlier: an answer begins with the commit, and that is not kept waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import suppress

from kimia.streams.patience import end
from kimia.v1.kimi_audio_pb2 import ConverseRequest

GATHER_SECONDS = 0.1  # for which a piece of sound waits at most
GATHERED_REQUESTS = 16  # that are read ahead at most


async def gathered(
    requests: AsyncIterator[ConverseRequest], seconds: float = GATHER_SECONDS
) -> AsyncGenerator[list[ConverseRequest]]:
    """All requests in their order, one or more at a time. Raises what reading them raises, behind what was read."""
    ahead = _Ahead()
    reading = asyncio.create_task(ahead.read(requests))
    try:
        while batch := await ahead.take(seconds):
            yield batch
        await reading
    finally:
        await end([reading])


class _Ahead:
    """Requests that were read and not yet taken."""

    def __init__(self) -> None:
        self._batch: list[ConverseRequest] = []
        self._some = asyncio.Event()
        self._enough = asyncio.Event()  # there is more than a little sound
        self._taken = asyncio.Event()
        self._over = False

    async def read(self, requests: AsyncIterator[ConverseRequest]) -> None:
        """Read to the end, never further ahead than GATHERED_REQUESTS."""
        try:
            async for request in requests:
                self._batch.append(request)
                self._some.set()
                full = len(self._batch) >= GATHERED_REQUESTS
                if full or not request.HasField("audio"):
                    self._enough.set()
                if full:
                    self._taken.clear()
                    await self._taken.wait()
        finally:
            self._over = True
            self._some.set()
            self._enough.set()

    async def take(self, seconds: float) -> list[ConverseRequest]:
        """What has come; if it is nothing but sound, also what comes within the next moment. Empty at the end."""
        await self._some.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._enough.wait()
        batch, self._batch = self._batch, []
        if not self._over:
            self._some.clear()
            self._enough.clear()
        self._taken.set()
        return batch
