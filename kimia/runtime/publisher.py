"""All rows of a worker publish in one round trip: what comes while one is under way goes together with the next."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter

from kimia.runtime.metrics import PUBLISH
from kimia.streams.jobs import Claim, Jobs, Published
from kimia.streams.patience import Patience
from kimia.streams.together import Together
from kimia.v1.turn_pb2 import Chunk


class Publisher:
    """Publishes chunks for many turns at once, each turn one chunk after another. Waits out a lost journal."""

    def __init__(self, jobs: Jobs, patience: Patience, stage: str) -> None:
        self._jobs = jobs
        self._patience = patience
        self._seconds = PUBLISH.labels(stage)
        self._together = Together(self._send)

    async def publish(self, claim: Claim, chunk: Chunk) -> Published:
        """Publish one chunk; what became of it."""
        return await self._together.ask((claim, chunk))

    async def aclose(self) -> None:
        """Send no more. Whoever still waits for an answer is cancelled."""
        await self._together.aclose()

    async def _send(self, chunks: Sequence[tuple[Claim, Chunk]]) -> Sequence[Published]:
        """Send until it is answered; chunks may be sent twice, since the log takes each only once."""
        started = perf_counter()
        outcomes = await self._patience.reach(lambda: self._jobs.publish_all(chunks))
        self._seconds.observe(perf_counter() - started)
        return outcomes
