"""All rows of a worker publish in one round trip: what comes while one is under way goes together with the next."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter

from kimia.runtime.metrics import PUBLISH
from kimia.streams.jobs import Claim, Jobs, Published
from kimia.streams.patience import Patience, end
from kimia.v1.turn_pb2 import Chunk


class Publisher:
    """Publishes chunks for many turns at once, each turn one chunk after another. Waits out a lost journal."""

    def __init__(self, jobs: Jobs, patience: Patience, stage: str) -> None:
        self._jobs = jobs
        self._patience = patience
        self._seconds = PUBLISH.labels(stage)
        self._pending: list[tuple[Claim, Chunk, asyncio.Future[Published]]] = []
        self._sending: asyncio.Task[None] | None = None

    async def publish(self, claim: Claim, chunk: Chunk) -> Published:
        """Publish one chunk; what became of it."""
        answer: asyncio.Future[Published] = asyncio.get_running_loop().create_future()
        self._pending.append((claim, chunk, answer))
        if self._sending is None:
            self._sending = asyncio.create_task(self._send())
        return await answer

    async def aclose(self) -> None:
        """Send no more. Whoever still waits for an answer is cancelled."""
        if self._sending is not None:
            await end([self._sending])

    async def _send(self) -> None:
        try:
            while self._pending:
                batch, self._pending = self._pending, []
                await self._send_batch([item for item in batch if not item[2].done()])
        finally:
            self._sending = None

    async def _send_batch(self, batch: Sequence[tuple[Claim, Chunk, asyncio.Future[Published]]]) -> None:
        """Send until it is answered; chunks may be sent twice, since the log takes each only once."""
        started = perf_counter()
        try:
            chunks = [(claim, chunk) for claim, chunk, _ in batch]
            outcomes = await self._patience.reach(lambda: self._jobs.publish_all(chunks))
        except Exception as error:  # noqa: BLE001 - handed on to every turn, whose loop logs it
            for *_, answer in batch:
                if not answer.done():
                    answer.set_exception(error)
            return
        except asyncio.CancelledError:
            for *_, answer in batch:
                answer.cancel()
            raise
        self._seconds.observe(perf_counter() - started)
        for (*_, answer), outcome in zip(batch, outcomes, strict=True):
            if not answer.done():
                answer.set_result(outcome)
