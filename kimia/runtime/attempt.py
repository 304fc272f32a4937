"""One claimed turn: what the stage gets to read, what becomes of every chunk, and how it ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Protocol

from kimia.errors import InternalError, KimiaError, NotFoundError, UnavailableError
from kimia.runtime.inputs import (
    FeatureOutlet,
    clip_contents,
    follow,
    known_beginning,
    read_encoded,
    read_sound,
    replay,
    sounds_to_encode,
)
from kimia.runtime.local import close
from kimia.runtime.logs import bound_turn, get_logger
from kimia.runtime.mels import MelOutlet, with_mels
from kimia.runtime.metrics import ENCODED, FIRST_CHUNK, REAL_TIME_FACTOR, REBUILD, STAGE_LATENCY
from kimia.runtime.pacing import Gate, Pace, sound_seconds
from kimia.runtime.publisher import Publisher
from kimia.runtime.rows import Row
from kimia.stage import DETOKENIZER, LLM, TOKENIZER, Stage
from kimia.status import to_failure
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.inbox import Feed, Inbox
from kimia.streams.jobs import Claim, Jobs, Outcome, Published
from kimia.streams.patience import CANCEL_AGAIN, Patience, end
from kimia.v1.turn_pb2 import Chunk, Turn

# How an attempt ends, besides the terminal states of a turn (done, cancelled, error).
HANDED_OVER = "handed_over"  # given to another worker: this one stops
LOST = "lost"  # another worker has it, or nobody needs it any more
REWOUND = "rewound"  # back to the tokenizer
RETRIED = "retried"  # left to be claimed again; counted
TERMINAL = ("done", "cancelled", "error")

log = get_logger()


class Outlet(Protocol):
    """What becomes of a stage's chunks before they are published."""

    async def take(self, chunk: Chunk) -> Sequence[Chunk]:
        """The chunks to publish now, if any; they go in one round trip."""

    async def close(self, over: bool) -> None:
        """The attempt ends; `over`: so does the turn, and nobody goes on with it."""


@dataclass(frozen=True)
class Bench:
    """What all attempts of one worker share."""

    stage: Stage
    jobs: Jobs
    inbox: Inbox
    blobs: Blobs
    publisher: Publisher
    patience: Patience
    partitions: int
    checkpoint: str  # names the weights that features were made with
    lead: float  # seconds of speech that are kept ahead of what the caller has heard

    def place(self, turn: Turn) -> tuple[str, str, str]:
        """Where blobs of a turn lie: partition, tenant, checkpoint."""
        partition = keys.partition_of(keys.session_of(turn.id), self.partitions)
        return partition, turn.caller.tenant or "default", self.checkpoint


@dataclass(frozen=True)
class Given:
    """What one attempt reads and where its chunks go."""

    inbox: AsyncIterator[Chunk]
    outlet: Outlet
    known: Sequence[Chunk] = ()  # of the stage's log behind what is published: they need not be computed


class Attempt:
    """Runs the stage for one claim until the turn is done, somebody else ends it, or it is stopped.

    `row` is its own from the start, and parked while the stage is far enough; who began the attempt gives it back.
    """

    def __init__(self, bench: Bench, claim: Claim, row: Row) -> None:
        self.claim = claim
        self.row = row
        self.outcome = ""  # "" while it runs
        self._bench = bench
        self._verdict = ""  # why it was stopped from outside
        self._gone = False  # the turn was deleted or has expired
        self._closing = False  # the stage's generator is ending its turn: it is not cancelled again
        self._started = perf_counter()
        self.task = asyncio.create_task(self._run())

    @property
    def gone(self) -> bool:
        """Whether the turn was deleted, or has expired."""
        return self._gone

    def stop(self, verdict: str) -> None:
        """End it within one step or chunk; `verdict` becomes its outcome."""
        if not self._verdict and not self.outcome:
            self._verdict = verdict
            self._cancel()

    def _cancel(self) -> None:
        """Until it is noticed: see `kimia.streams.patience.end`."""
        if not (self.outcome or self._closing or self.task.done()):
            self.task.cancel()
            asyncio.get_running_loop().call_later(CANCEL_AGAIN, self._cancel)

    # ---- from the claim to the outcome ----

    async def _run(self) -> None:
        turn_id = self.claim.turn.id
        with bound_turn(turn_id), self._bench.inbox.feed(turn_id) as feed:
            watch = asyncio.create_task(self._watch(feed))
            try:
                self.outcome = await self._serve(feed) or self._verdict
            except asyncio.CancelledError:
                if not self._verdict:
                    raise  # the worker itself is torn down: its lease ends, and another worker goes on
                self.outcome = self.outcome or self._verdict
            finally:
                watch.cancel()
            if self.outcome == HANDED_OVER:
                await self._bench.patience.reach(lambda: self._bench.jobs.release(self.claim))
            log.info("turn left", outcome=self.outcome, seconds=round(perf_counter() - self._started, 4))

    async def _watch(self, feed: Feed) -> None:
        """Stop when the turn reaches a terminal state elsewhere."""
        try:
            self.stop((await feed.ended()).state)
        except NotFoundError:
            self._gone = True
            self.stop(LOST)

    async def _serve(self, feed: Feed) -> str:
        """The outcome, also of what goes wrong. The edge of one turn: nothing that happens here ends the worker."""
        try:
            return await self._compute(feed)
        except UnavailableError as error:
            log.warning("turn interrupted", error=str(error))
        except KimiaError as error:
            failure = to_failure(error)
            log.info("turn failed", reason=failure.reason)
            await self._bench.patience.reach(lambda: self._bench.jobs.fail(self.claim, failure))
            return "error"
        except Exception:
            log.exception("stage crashed", attempt=self.claim.attempt)
        return RETRIED

    async def _compute(self, feed: Feed) -> str:
        """Run the stage and publish what it yields."""
        published = await self._published()
        if published and published[-1].final:  # its last answer was lost: say it again, so that all follows from it
            return await self._publish(published)
        given = await self._given(feed, published)
        if given is None:
            log.info("features gone")
            await self._bench.patience.reach(lambda: self._bench.jobs.rewind(self.claim))
            return REWOUND
        gate = self._gate(published)
        listening = asyncio.create_task(_listen(feed, gate)) if gate.pace.paced else None
        try:
            return await self._publish_all(gate, given, published)
        finally:
            if listening is not None:
                listening.cancel()

    def _gate(self, published: Sequence[Chunk]) -> Gate:
        """What lets the stage go on: it is as far as what is published, and the caller as far as the claim says."""
        claim = self.claim
        gate = Gate(Pace(claim.turn, claim.kind, self._bench.lead), self.row, claim.kind.name)
        for chunk in published:
            gate.pace.made(chunk)
        if claim.playback is not None:
            gate.heard(claim.playback)
        return gate

    async def _publish_all(self, gate: Gate, given: Given, published: Sequence[Chunk]) -> str:
        made = [*published, *map(self._signed, given.known)]  # kept: a journal that lost writes asks for them again
        if given.known:
            self.outcome = self._verdict or await self._publish(made, len(given.known))
            if self.outcome:
                return self.outcome
        begun = made if given.known else await self._restored(published)
        chunks = self._bench.stage.run(self.claim.turn, given.inbox, begun)
        ready = _ahead(chunks, gate)
        try:
            async for chunk in ready:
                self._count_encoded(chunk)
                outs = await given.outlet.take(chunk)
                made += map(self._signed, outs)
                self.outcome = self._verdict or (await self._publish(made, len(outs), gate.seconds) if outs else "")
                if self.outcome:
                    return self.outcome
        finally:
            self._closing = True
            await close(ready)
            await close(chunks)
            await close(given.inbox)
            await given.outlet.close(await self._is_over())
        raise InternalError(f"the {self.claim.kind.name} stage ended without a final chunk; see its worker's log")

    async def _is_over(self) -> bool:
        """Whether nobody goes on with the turn. A claim may be lost because the whole turn is gone."""
        ended = self.outcome or self._verdict
        if self._gone or ended != LOST:
            return self._gone or ended in TERMINAL
        try:
            return (await self._bench.inbox.journal.head(self.claim.turn.id)).over
        except NotFoundError:
            return True
        except UnavailableError:
            return False

    # ---- what the stage reads ----

    async def _published(self) -> Sequence[Chunk]:
        """What an interrupted run has published; a rewound turn begins anew, for the sake of its features."""
        kind = self.claim.kind
        if not self.claim.next_index or (kind is TOKENIZER and self.claim.rewound):
            return ()
        journal, turn_id = self._bench.inbox.journal, self.claim.turn.id
        return await self._bench.patience.reach(lambda: journal.read(turn_id, kind.writes))

    async def _restored(self, published: Sequence[Chunk]) -> Sequence[Chunk]:
        """What is published, with what the log only names."""
        if self.claim.kind is not DETOKENIZER or not published:
            return published
        return await with_mels(self._bench.blobs, published)

    async def _given(self, feed: Feed, published: Sequence[Chunk]) -> Given | None:
        """What the stage reads, and what takes its chunks; None when features are gone. Raises NotFoundError."""
        bench, turn = self._bench, self.claim.turn
        if self.claim.kind is TOKENIZER:
            return await self._sound(published)
        if self.claim.kind is LLM:
            encoded = await read_encoded(feed, bench.blobs, turn)
            return None if encoded is None else Given(replay(encoded), AsItIs())
        outlet = MelOutlet(bench.blobs, turn, bench.place(turn)[:2], published)
        return Given(follow(feed, self.claim.kind.reads), outlet)

    async def _sound(self, published: Sequence[Chunk]) -> Given:
        """The sound of a turn, and what need not be encoded of it."""
        bench, turn = self._bench, self.claim.turn
        sounds = sounds_to_encode(turn, self.claim.rewound)
        pieces = await bench.patience.reach(lambda: read_sound(bench.inbox.journal, turn, sounds))
        place, contents = bench.place(turn), clip_contents(turn, pieces)
        known: Sequence[Chunk] = ()
        if not published and not self.claim.rewound:
            known = await known_beginning(bench.blobs, sounds, place, contents)
            ENCODED.labels("found").inc(sum(map(sound_seconds, known)))
        return Given(replay(pieces), FeatureOutlet(bench.blobs, turn, place, contents, published or known), known)

    # ---- what the stage writes ----

    def _signed(self, chunk: Chunk) -> Chunk:
        if chunk.final:
            chunk.report.worker = self.claim.consumer
        return chunk

    async def _publish(self, made: Sequence[Chunk], count: int = 1, parked: float = 0.0) -> str:
        """Publish the last chunks made, and what the journal has lost before them. The outcome, if this ended the turn.

        `parked` is for how many seconds the turn needed no row.
        """
        at = len(made) - count
        while at < len(made):
            for answer in await self._answers(made[at:]):
                if answer.outcome.lost:
                    self._gone = self._gone or answer.outcome is Outcome.GONE
                    return "cancelled" if answer.outcome is Outcome.CANCELLED else LOST
                at = answer.next if answer.outcome is Outcome.GAP else at + 1
                if answer.outcome is Outcome.GAP:
                    break
        return self._measured(made, count, parked)

    async def _answers(self, chunks: Sequence[Chunk]) -> Sequence[Published]:
        """What becomes of chunks that follow one another; they go together, with those of other turns."""
        publish = self._bench.publisher.publish
        if len(chunks) == 1:
            return (await publish(self.claim, chunks[0]),)
        return await asyncio.gather(*(publish(self.claim, chunk) for chunk in chunks))

    def _count_encoded(self, chunk: Chunk) -> None:
        if self.claim.kind is TOKENIZER:
            ENCODED.labels("made").inc(sound_seconds(chunk))

    def _measured(self, made: Sequence[Chunk], count: int, parked: float) -> str:
        """Record how long it took; "done" after the final chunk."""
        stage, seconds = self.claim.kind.name, perf_counter() - self._started
        if len(made) - count == self.claim.next_index:
            first = REBUILD if self.claim.next_index else FIRST_CHUNK
            first.labels(stage).observe(seconds - parked)
        if not made[-1].final:
            return ""
        STAGE_LATENCY.labels(stage).observe(seconds)
        sound = sum(sound_seconds(chunk) for chunk in made[self.claim.next_index :])
        if sound:
            REAL_TIME_FACTOR.labels(stage).observe(made[-1].report.compute_seconds / sound)
        return "done"


async def _ahead(chunks: AsyncIterator[Chunk], gate: Gate) -> AsyncIterator[Chunk]:
    """The same chunks; the next one is being made while the last one is published, as soon as the gate lets it."""

    async def made() -> Chunk | None:
        await gate.passed()
        return await anext(chunks, None)

    making = asyncio.ensure_future(made())
    try:
        while (chunk := await making) is not None:
            gate.pace.made(chunk)
            making = asyncio.ensure_future(made())
            yield chunk
    finally:
        await end([making])


async def _listen(feed: Feed, gate: Gate) -> None:
    """Tell the gate how far the caller has heard, whenever that is known anew."""
    async for playback in feed.playback():
        gate.heard(playback)


class AsItIs:
    """Takes chunks that carry nothing big."""

    async def take(self, chunk: Chunk) -> Sequence[Chunk]:
        """The chunk itself."""
        return (chunk,)

    async def close(self, over: bool) -> None:
        """Nothing was put away."""
