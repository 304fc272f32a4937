"""Many small requests in one round trip: what is asked while one is under way goes together with the next."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from kimia.streams.patience import end

A = TypeVar("A")
R = TypeVar("R")

MOST = 256  # requests of one round trip


class Together(Generic[A, R]):
    """Hands requests to `send` in batches, in the order in which they were made; it answers each, in that order."""

    def __init__(self, send: Callable[[Sequence[A]], Awaitable[Sequence[R]]]) -> None:
        self._send = send
        self._pending: list[tuple[A, asyncio.Future[R]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def ask(self, request: A) -> R:
        """The answer to a request. Raises what `send` raises for its batch."""
        answer: asyncio.Future[R] = asyncio.get_running_loop().create_future()
        self._pending.append((request, answer))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send_all())
        return await answer

    async def aclose(self) -> None:
        """Send no more. Whoever still waits for an answer is cancelled."""
        if self._sending is not None:
            await end([self._sending])

    async def _send_all(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending[:MOST], self._pending[MOST:]
                wanted = [(request, answer) for request, answer in batch if not answer.done()]
                if wanted:
                    await self._send_batch(wanted)
        finally:
            self._sending = None

    async def _send_batch(self, batch: Sequence[tuple[A, asyncio.Future[R]]]) -> None:
        try:
            results = await self._send([request for request, _ in batch])
        except Exception as error:  # noqa: BLE001 - raised again by everybody who asked
            for _, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
        except asyncio.CancelledError:
            for _, answer in [*batch, *self._pending]:
                answer.cancel()
            raise
        else:
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():
                    answer.set_result(result)
