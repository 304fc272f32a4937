"""Whose segment is encoded next: those of all turns, one of each before anybody's second.

A segment is the unit of work: at most 30 s of sound, independent of all others. So a long clip keeps nobody waiting for
longer than one evaluation, and where the device gains from it the segments of several turns share one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from kimia.compute import ComputeThread
from kimia.model.audio import Segment
from kimia.model.encode import SEGMENTS_AT_ONCE, AudioEncoder, EncodedAudio
from kimia.model.prompt import Encoded
from kimia.pipeline import CodesOnly

Evaluation: TypeAlias = Callable[[Sequence[Segment]], Sequence[Encoded]]


@dataclass(eq=False)
class Job:
    """One segment of one turn."""

    segment: Segment
    heard: bool  # features are wanted, not codes alone
    round: int
    encoded: asyncio.Future[Encoded]
    seconds: float = 0.0  # its share of computing


class Scheduler:
    """Encodes in one thread. For one event loop at a time."""

    def __init__(self, encoder: AudioEncoder, compute: ComputeThread) -> None:
        self._encoder = encoder
        self._compute = compute
        self._most = SEGMENTS_AT_ONCE[encoder.device.type]
        self._round = 0  # that is being served: whoever comes now has his first segment in it
        self._jobs: list[Job] = []  # in the order of arrival
        self._working: asyncio.Task[None] | None = None

    def submit(self, segments: Sequence[Segment], heard: bool) -> list[Job]:
        """Let segments of one turn be encoded, in order; await `Job.encoded` of each, or `withdraw` them."""
        loop = asyncio.get_running_loop()
        jobs = [Job(segment, heard, self._round + at, loop.create_future()) for at, segment in enumerate(segments)]
        self._jobs += jobs
        if self._jobs and self._working is None:
            self._working = asyncio.create_task(self._work())
        return jobs

    def withdraw(self, jobs: Sequence[Job]) -> None:
        """Nobody waits for these any more: what has not begun is not computed."""
        for job in jobs:
            if not job.encoded.cancel() and not job.encoded.cancelled():
                job.encoded.exception()  # seen

    async def _work(self) -> None:
        """Encode until nothing waits any more."""
        try:
            while batch := self._next():
                await self._encode(batch)
        finally:
            self._working = None

    def _next(self) -> list[Job]:
        """Those of the lowest round, first come first served, as many of one kind as go together."""
        self._jobs = [job for job in self._jobs if not job.encoded.done()]
        queue = sorted(self._jobs, key=lambda job: job.round)
        batch = [job for job in queue if job.heard == queue[0].heard][: self._most]
        self._jobs = [job for job in self._jobs if job not in batch]
        self._round = max([self._round, *(job.round for job in batch)])
        return batch

    async def _encode(self, batch: Sequence[Job]) -> None:
        """Encode some segments together; an error of the whole is an error of each. The edge of the encoders."""
        evaluation: Evaluation = self._both if batch[0].heard else self._codes
        compute = self._compute.turn()
        try:
            made = await compute.run(evaluation, [job.segment for job in batch])
        except Exception as error:  # noqa: BLE001 - raised again by everybody who waits
            for job in batch:
                if not job.encoded.done():
                    job.encoded.set_exception(error)
            return
        for job, encoded in zip(batch, made, strict=True):
            job.seconds = compute.seconds / len(batch)
            if not job.encoded.done():
                job.encoded.set_result(encoded)

    def _both(self, segments: Sequence[Segment]) -> list[EncodedAudio]:
        """Features as they go on the wire: fetched from the device here, a segment at a time, not in the event loop."""
        made = self._encoder.encode_segments(segments)
        return [EncodedAudio(one.codes, one.features.cpu()) for one in made]

    def _codes(self, segments: Sequence[Segment]) -> list[CodesOnly]:
        return [CodesOnly(codes) for codes in self._encoder.codes_of_segments(segments)]
