"""Who is solved next: the chunks of all turns, most urgent first, several in one evaluation.

A chunk is due when its caller's buffer ends. Before every evaluation the chunks that are due first are chosen, as many
as fill it; so a turn that has just begun need not wait until the chunks of others are solved, and these go on where
they were. Solved chunks become sound beside the next evaluation (`services.detokenizer.rendering`).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kimia.compute import ComputeThread
from kimia.model.chunking import Push
from kimia.model.detokenize import Begun, Detokenizer, Synthesis
from kimia.model.flow_engine import FlowEngine
from services.detokenizer.rendering import Renderer

# Mel frames of one evaluation. A GPU reads its weights once for all of them; more than these only take longer. A CPU
# gains a fifth at most, with small models (benchmarks/RESULTS.md): there every chunk is evaluated alone, so that its
# samples are the same bit by bit, whoever is beside it.
FRAMES_AT_ONCE = {"cuda": 1024, "cpu": 1}


@dataclass(eq=False)
class Job:
    """One push of one turn."""

    synthesis: Synthesis
    push: Push
    due: float  # of the monotonic clock
    solved: asyncio.Future[Begun]
    begun: Begun | None = None
    error: Exception | None = None
    seconds: float = 0.0  # its share of computing
    wanted: bool = True

    @property
    def over(self) -> bool:
        """Nothing is left to solve."""
        settled = self.begun is not None and (self.begun.solving is None or self.begun.solving.done)
        return settled or self.error is not None


@dataclass
class Scheduler:
    """Solves in one thread and makes sound in another. For one event loop at a time."""

    detokenizer: Detokenizer
    flow: ComputeThread
    vocoder: ComputeThread
    _arrived: deque[Job] = field(default_factory=deque)
    _jobs: list[Job] = field(default_factory=list)  # begun; the flow thread's own
    _working: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self._engine = FlowEngine(self.detokenizer.dit)
        self._renderer = Renderer(self.detokenizer, self.vocoder)
        self._most = FRAMES_AT_ONCE[self.detokenizer.dit.device.type]

    async def push(self, synthesis: Synthesis, push: Push, due: float) -> tuple[Tensor, float]:
        """As Synthesis.push: samples, and the seconds computed for them. Cancelled, it ends within one evaluation."""
        job = Job(synthesis, push, due, asyncio.get_running_loop().create_future())
        self._arrived.append(job)
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        try:
            begun = await job.solved
        except asyncio.CancelledError:
            job.wanted = False
            raise
        pcm, seconds = await self._renderer.render(synthesis, begun, due)
        return pcm, job.seconds + seconds

    async def _work(self) -> None:
        """Advance until nothing waits any more."""
        try:
            while self._arrived or self._jobs:
                for job in await self.flow.turn().run(self._advance):
                    _tell(job)
        except Exception as error:  # noqa: BLE001 - raised again by everybody who waits
            for job in (*self._arrived, *self._jobs):
                job.error = error
                _tell(job)
            self._arrived.clear()
            self._jobs.clear()
        finally:
            self._working = None

    # ---- in the flow thread ----

    def _advance(self) -> list[Job]:
        """Evaluate until a chunk is solved; which ones are."""
        while True:
            while self._arrived:
                self._jobs.append(_begun(self._arrived.popleft()))
            self._jobs = [job for job in self._jobs if job.wanted]
            done = [job for job in self._jobs if job.over]
            if done or not self._jobs:
                self._jobs = [job for job in self._jobs if not job.over]
                return done
            self._evaluate(most_urgent(self._jobs, self._most))

    def _evaluate(self, jobs: Sequence[Job]) -> None:
        begin = time.perf_counter()
        try:
            self._engine.advance([job.begun.solving for job in jobs if job.begun and job.begun.solving])
        except Exception as error:  # noqa: BLE001 - raised again by the turns that it belongs to
            for job in jobs:
                job.error = error
        spent = time.perf_counter() - begin
        frames = sum(map(_frames, jobs))
        for job in jobs:
            job.seconds += spent * _frames(job) / frames


def most_urgent(jobs: Sequence[Job], frames: int) -> list[Job]:
    """The jobs that are due first, up to so many mel frames together; at least one."""
    chosen: list[Job] = []
    for job in sorted(jobs, key=lambda job: job.due):
        frames -= _frames(job)
        if chosen and frames < 0:
            break
        chosen.append(job)
    return chosen


def _frames(job: Job) -> int:
    assert job.begun is not None
    assert job.begun.solving is not None
    return job.begun.solving.chunk.frames


def _begun(job: Job) -> Job:
    try:
        job.begun = job.synthesis.begin(job.push.tokens, job.push.final)
    except Exception as error:  # noqa: BLE001 - raised again by its turn
        job.error = error
    return job


def _tell(job: Job) -> None:
    if job.solved.done():  # cancelled meanwhile
        return
    if job.error is not None:
        job.solved.set_exception(job.error)
    elif job.begun is not None:
        job.solved.set_result(job.begun)
