"""The Redis adapter: claims turns from the job streams while rows are free, and runs the stage for each.

    worker = Worker(stage, wire, rows, consumer, checkpoint)
    running = asyncio.create_task(worker.run())
    ...
    await worker.drain(30)          # on SIGTERM; then `running` ends

A worker that dies needs no farewell: its leases end, and others go on behind the chunks it has published.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from functools import partial

from kimia.errors import UnavailableError
from kimia.runtime.attempt import HANDED_OVER, LOST, Attempt, Bench
from kimia.runtime.early import encode_early
from kimia.runtime.logs import get_logger
from kimia.runtime.metrics import CLAIMS, JOBS_WAITING, QUEUE_WAIT, TAKE_OVERS, TURNS
from kimia.runtime.publisher import Publisher
from kimia.runtime.rows import Row, Rows
from kimia.stage import TOKENIZER, Remembers, Stage
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.early import Early
from kimia.streams.inbox import Inbox
from kimia.streams.jobs import Claim, Jobs, Postponed
from kimia.streams.ledger import Ledger
from kimia.streams.patience import Patience, end
from kimia.streams.wire import Wire

IDLE_WAIT = 1.0  # seconds of one wait for new jobs; new ones end it at once
LOOK_AGAIN = 0.02  # seconds between two looks at a turn that is left to another worker: until then a row is kept for it
FAREWELL = 1.0  # seconds for each thing that a leaving worker still has to say to the journal
LAST_CHUNK = 3.0  # seconds for stages that are stopped to end their step or chunk
COUNTED = ("done", "cancelled", "error", HANDED_OVER)

log = get_logger()


class Worker:
    """One process's part in the pipeline. `consumer` is unique per process start, `checkpoint` names the weights."""

    def __init__(self, stage: Stage, wire: Wire, rows: Rows, consumer: str, checkpoint: str) -> None:
        self.kind = stage.kind
        self.consumer = consumer
        self._rows = rows
        self._lease = wire.options.lease
        self._jobs = Jobs(wire, stage.kind, consumer)
        self._ledger = Ledger(wire)
        self._early = Early(wire)
        self._patience = Patience(_say_lost, _say_found)
        self._inbox = Inbox(wire, consumer)
        self._stage = stage
        self._inbox.deleted = self._forget
        self._publisher = Publisher(self._jobs, self._patience, stage.kind.name)
        self._bench = Bench(
            stage=stage,
            jobs=self._jobs,
            inbox=self._inbox,
            blobs=Blobs(wire),
            publisher=self._publisher,
            patience=self._patience,
            partitions=wire.options.partitions,
            checkpoint=checkpoint,
            lead=wire.options.lead,
        )
        self._attempts: set[Attempt] = set()
        self._fronts: list[asyncio.Task[None]] = []  # what stops first when the worker leaves
        self._returns: set[asyncio.Task[None]] = set()
        self._postponed: set[asyncio.Task[None]] = set()
        self._stopping = asyncio.Event()
        self._drained = asyncio.Event()

    async def run(self) -> None:
        """Work until drained. Cancelled, it stops at once and gives nothing back: so it is when a process dies."""
        async with self._inbox:
            await self._patience.reach(self._jobs.prepare)
            steps = [(self._claim, 0.0), (self._recover, self._lease / 4), (self._announce, self._lease)]
            if self.kind is TOKENIZER:
                steps.append((self._encode_early, 0.0))
            self._fronts = [asyncio.create_task(self._repeat(*step)) for step in steps]
            beating = asyncio.create_task(self._beat())
            try:
                await self._drained.wait()
            finally:
                attempts = [attempt.task for attempt in self._attempts]
                await end([*self._fronts, beating, *self._returns, *self._postponed, *attempts])
                await self._publisher.aclose()
                await self._early.aclose()

    async def drain(self, seconds: float) -> None:
        """Claim nothing more, let turns end for so long, hand the rest over, and leave."""
        self._stopping.set()
        if self._fronts:
            await asyncio.wait(self._fronts, timeout=FAREWELL)
            await end(self._fronts)
        await self._say(self._ledger.withdraw(self.kind, self.consumer))
        await self._attempts_end(seconds)
        for attempt in tuple(self._attempts):
            attempt.stop(HANDED_OVER)
        await self._attempts_end(LAST_CHUNK)
        await self._say(self._jobs.aclose())
        self._drained.set()

    # ---- taking turns ----

    async def _claim(self) -> None:
        """Take what waits, as many turns as rows are free; when nothing does, wait for more."""
        if not await self._unless_stopped(self._row_is_free()):
            return
        claims = await self._jobs.sweep(max(self._rows.free - len(self._postponed), 0))
        for job in self._jobs.postponed():
            task = asyncio.create_task(self._claim_later(job))
            self._postponed.add(task)
            task.add_done_callback(self._postponed.discard)
        self._begin(claims)
        if self._rows.free <= len(self._postponed):
            await self._unless_stopped(_one_of(self._postponed))
        elif not claims:
            await self._unless_stopped(self._jobs.wait(IDLE_WAIT))

    async def _claim_later(self, job: Postponed | None) -> None:
        """Take a turn that was left to another worker, which would be the better one, if it has not begun in time."""
        claims: list[Claim] = []
        while job is not None:
            await self._sleep(min(job.seconds, LOOK_AGAIN))
            again = partial(self._jobs.claim_again, job, patient=not self._stopping.is_set())
            claims, job = await self._patience.reach(again)
        if self._stopping.is_set():
            for claim in claims:
                await self._give_back(claim)
        else:
            self._begin(claims)

    async def _row_is_free(self) -> None:
        await self._rows.acquire()
        self._rows.release()  # nothing is kept while looking for jobs: a direct call may take it

    async def _recover(self) -> None:
        """Take turns of workers that fell silent."""
        if self._rows.free:
            claims = await self._jobs.recover(self._rows.free)
            TAKE_OVERS.labels(self.kind.name).inc(len(claims))
            self._begin(claims)

    async def _encode_early(self) -> None:
        """Encode what callers who still speak have finished, one stretch of sound at a time."""
        turn = await self._early.take(IDLE_WAIT)
        if turn is not None:
            await encode_early(self._bench, turn)

    def _begin(self, claims: Iterable[Claim]) -> None:
        for claim in claims:
            CLAIMS.labels(self.kind.name).inc()
            if claim.queued_seconds:
                QUEUE_WAIT.labels(self.kind.name).observe(claim.queued_seconds)
            if self._rows.try_acquire():
                attempt = Attempt(self._bench, claim, Row(self._rows))
                self._attempts.add(attempt)
                attempt.task.add_done_callback(partial(self._end, attempt))
            else:  # a direct call was faster, or a parked turn: hand it back
                task = asyncio.create_task(self._give_back(claim))
                self._returns.add(task)
                task.add_done_callback(self._returns.discard)

    async def _give_back(self, claim: Claim) -> None:
        await self._patience.reach(lambda: self._jobs.release(claim))

    def _end(self, attempt: Attempt, task: asyncio.Task[None]) -> None:
        """Free the row, also when the task was cancelled before it began."""
        attempt.row.leave()
        self._attempts.discard(attempt)
        if attempt.gone:
            self._forget(attempt.claim.turn.id)
        if attempt.outcome in COUNTED:
            TURNS.labels(self.kind.name, attempt.outcome).inc()
        if not task.cancelled() and task.exception():
            log.error("turn left in disorder", turn=attempt.claim.turn.id, exc_info=task.exception())

    def _forget(self, turn_id: str) -> None:
        if isinstance(self._stage, Remembers):
            self._stage.forget(keys.session_of(turn_id))

    # ---- holding turns ----

    async def _beat(self) -> None:
        """Renew all leases, also while draining; what is lost is stopped."""
        while True:
            try:
                await self._patience.reach(self._heartbeat)
            except Exception:
                log.exception("heartbeat failed")
            await asyncio.sleep(self._lease / 3)

    async def _heartbeat(self) -> None:
        held = list(self._attempts)
        lost = await self._jobs.heartbeat([attempt.claim for attempt in held])
        for attempt in held:
            if any(claim is attempt.claim for claim in lost):
                attempt.stop(LOST)

    async def _announce(self) -> None:
        """Say how many rows there are, and how many turns wait."""
        await self._ledger.announce(self.kind, self.consumer, self._rows.count, self._rows.used)
        JOBS_WAITING.labels(self.kind.name).set((await self._jobs.depth())[0])

    # ---- parts ----

    async def _repeat(self, step: Callable[[], Awaitable[None]], pause: float) -> None:
        """A step again and again until the worker leaves. The edge of a loop: what fails is logged and tried again."""
        while not self._stopping.is_set():
            try:
                await self._patience.reach(step)
            except Exception:
                log.exception("worker loop failed", step=step.__name__)
                await self._sleep(self._lease / 2)
            await self._sleep(pause)

    async def _sleep(self, seconds: float) -> None:
        """So long, but no longer than until the worker leaves."""
        if seconds:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._stopping.wait()

    async def _unless_stopped(self, call: Awaitable[None]) -> bool:
        """Wait for a call or for the worker to leave; whether the call came first. Raises what it raises."""
        task, stop = asyncio.ensure_future(call), asyncio.ensure_future(self._stopping.wait())
        try:
            await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            return not stop.done()
        finally:
            await end((task, stop))

    async def _attempts_end(self, seconds: float) -> None:
        if self._attempts:
            await asyncio.wait([attempt.task for attempt in self._attempts], timeout=seconds)

    async def _say(self, call: Awaitable[None]) -> None:
        """Something to the journal that helps but is not needed."""
        with suppress(UnavailableError, TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await call


async def _one_of(tasks: set[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _say_lost(error: UnavailableError) -> None:
    log.warning("journal lost", error=str(error))


def _say_found() -> None:
    log.info("journal found")
