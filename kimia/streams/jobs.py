"""The jobs of one stage, as one worker sees them: take, hold, publish, hand over. Orchestrators use the journal."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from kimia.stage import LLM, TOKENIZER, StageKind
from kimia.streams import keys
from kimia.streams.arrivals import Arrivals
from kimia.streams.connections import reached
from kimia.streams.journal import (
    Playback,
    job_class,
    milliseconds,
    next_stage,
    parse_playback,
    too_late,
    turn_keys,
)
from kimia.streams.wire import Argument, Call, Wire
from kimia.v1.turn_pb2 import Chunk, Failure, Turn

_INTERNAL = 13  # google.rpc.Code
_BATCH_SHARE = 8  # claims of a worker of which one may be of a batch turn that was passed over for too long
_SIGNS = 3  # leases that a worker counts as free after it has looked for jobs: it does so every second
_FORGOTTEN = 86_400_000  # ms without a sign of life after which an idle consumer's name is removed


class Outcome(enum.Enum):
    """What became of a published chunk."""

    WRITTEN = "written"
    DUPLICATE = "duplicate"  # its index was published before; what was published stays
    GAP = "gap"  # chunks before it are missing: send again from `next`
    FENCED = "fenced"  # the turn belongs to another worker now
    GONE = "gone"  # the turn was deleted or has expired
    CANCELLED = "cancelled"  # the turn has ended

    @property
    def lost(self) -> bool:
        """Nothing more of this turn can be published by this claim."""
        return self in (Outcome.FENCED, Outcome.GONE, Outcome.CANCELLED)


@dataclass(frozen=True)
class Published:
    """An outcome, and the index that the log goes on with."""

    outcome: Outcome
    next: int


@dataclass(frozen=True)
class Claim:
    """One turn in the hands of one worker."""

    turn: Turn
    kind: StageKind
    consumer: str
    token: int
    job_key: str
    job_id: str
    attempt: int  # from 1; claims since the last new chunk
    next_index: int  # chunks of the log that are published already
    rewound: bool  # features were lost: the tokenizer encodes every clip again, the llm reads them from the log
    queued_seconds: float  # from the queue to the first claim; 0 for later ones
    playback: Playback | None = None  # how far the caller has heard it


@dataclass(frozen=True)
class Postponed:
    """A job that was delivered here and is left to another worker, which has what the turn needs, for a moment."""

    p: str
    job_key: str
    job_id: bytes
    turn_id: str
    seconds: float


class Jobs:
    """The jobs of one stage. `consumer` is unique per process start. Every call may raise UnavailableError."""

    def __init__(self, wire: Wire, kind: StageKind, consumer: str) -> None:
        self._wire = wire
        self._kind = kind
        self._consumer = consumer
        self._lease = milliseconds(wire.options.lease)
        self._arrivals = Arrivals(wire.blocking())
        self._tails: dict[str, str] = {}
        self._start = 0  # partitions take turns at being swept first
        self._postponed: list[Postponed] = []
        self._passed = 0  # claims while batch turns may have been passed over, since the last of those was taken

    async def prepare(self) -> None:
        """Make the groups, and forget consumers that are long dead."""
        for p in self._wire.partitions:
            streams = [*self._own(p), *self._classes(p)]
            await self._wire.call("join", streams, [self._own_ttl(), _FORGOTTEN])

    # ---- taking ----

    async def sweep(self, count: int) -> list[Claim]:
        """Take up to `count` turns that nobody has had, without waiting.

        What was handed over comes first, then interactive turns, then batch; but where the oldest batch turn has waited
        for `batch_patience`, it is the next after what was handed over, in one of a worker's `_BATCH_SHARE` claims.
        Turns that have ended, expired or gone are dropped on the way.
        """
        claims: list[Claim] = []
        partitions = self._rotated()
        for p, take in [(p, self._take_urgent) for p in partitions] + [(p, self._take_batch) for p in partitions]:
            more = True
            while more and len(claims) < count:
                found, more = await take(p, count - len(claims))
                claims += found
        return claims

    def postponed(self) -> list[Postponed]:
        """What the last sweep left to others for a moment: whoever swept must `claim_again` until that is over."""
        found, self._postponed = self._postponed, []
        return found

    async def claim_again(self, job: Postponed, *, patient: bool) -> tuple[list[Claim], Postponed | None]:
        """Take a job that was left to another worker, unless that one has it by now; or leave it for a while more."""
        patience = round(self._wire.options.prefix_patience * 1000) if patient else 0
        call = self._claim_call(job.p, job.job_key, job.job_id, job.turn_id, patience=patience)
        [answer] = await self._wire.call_many("claim", [call])
        if answer[0] == b"later":
            return [], replace(job, seconds=answer[1] / 1e6)
        return [self._claim(answer)] if answer[0] == b"claimed" else [], None

    async def wait(self, timeout: float) -> None:
        """Until a job has come that the last sweep has not seen, or `timeout` seconds have passed."""
        ends = {
            p: {stream: self._tails.get(stream, "0-0") for stream in (*self._own(p), *self._classes(p))}
            for p in self._wire.partitions
        }
        with reached("journal"):
            await self._arrivals.wait(ends, timeout)

    async def recover(self, count: int) -> list[Claim]:
        """Take up to `count` turns whose worker has given no sign of life for a lease."""
        claims: list[Claim] = []
        for p in self._rotated():
            if len(claims) < count:
                streams = self._classes(p)
                answer = await self._wire.call("recover", streams, [self._consumer, count - len(claims), self._lease])
                claims += await self._claim_all(p, streams, answer)
        return claims

    async def _take_urgent(self, p: str, wanted: int) -> tuple[list[Claim], bool]:
        """All but batch turns, and one of these when it is due."""
        handover, interactive, batch = self._classes(p)
        due = [batch] if self._passed >= _BATCH_SHARE - 1 else []  # at most one: then it begins to count again
        found, more = await self._take(p, [*self._own(p), handover, *due, interactive], wanted, due)
        for claim in found:
            self._passed = 0 if claim.job_key == batch else self._passed + 1
        return found, more

    async def _take_batch(self, p: str, wanted: int) -> tuple[list[Claim], bool]:
        return await self._take(p, self._classes(p)[-1:], wanted)

    async def _take(
        self, p: str, streams: Sequence[str], wanted: int, due: Sequence[str] = ()
    ) -> tuple[list[Claim], bool]:
        """Claims, and whether there may be more. Of the stream `due` one is taken if it has waited for too long."""
        args: list[Argument] = [self._consumer, wanted, self._own_ttl(), _SIGNS * self._lease]
        args += [*due, milliseconds(self._wire.options.batch_patience)] if due else []
        answer = await self._wire.call("take", streams, args)
        for stream, (tail, _) in zip(streams, answer, strict=True):
            self._tails[stream] = tail.decode()
        taken = sum(len(entries) for _, entries in answer)
        return await self._claim_all(p, streams, answer), taken == wanted

    async def _claim_all(self, p: str, streams: Sequence[str], answer: Sequence[Any]) -> list[Claim]:
        """Claim delivered entries, all in one round trip."""
        found = zip(streams, answer, strict=True)
        jobs = [(stream, entry, pairs[1].decode()) for stream, (_, entries) in found for entry, pairs in entries]
        patience = round(self._wire.options.prefix_patience * 1000)
        calls = [self._claim_call(p, *job, patience=patience) for job in jobs]
        results = await self._wire.call_many("claim", calls) if jobs else []
        for job, result in zip(jobs, results, strict=True):
            if result[0] == b"later":
                self._postponed.append(Postponed(p, *job, result[1] / 1e6))
        return [self._claim(result) for result in results if result[0] == b"claimed"]

    def _claim_call(self, p: str, stream: str, entry: bytes, turn_id: str, *, patience: int) -> Call:
        stage = self._kind.name
        names = [*turn_keys(p, turn_id), stream, keys.token(p, stage), keys.dlq(p, stage)]
        most = self._wire.options.max_deliveries
        identity: list[Argument] = [turn_id, self._consumer, entry, stage, self._kind.writes]
        return names, [*identity, self._lease, most, self._gave_up(), too_late(self._kind), patience]

    def _claim(self, answer: Sequence[Any]) -> Claim:
        _, token, spec, attempt, next_index, rewound, waited, stream, entry, *playback = answer
        return Claim(
            turn=Turn.FromString(spec),
            kind=self._kind,
            consumer=self._consumer,
            token=token,
            job_key=stream.decode(),
            job_id=entry.decode(),
            attempt=attempt,
            next_index=next_index,
            rewound=bool(rewound),
            queued_seconds=waited / 1e6,
            playback=parse_playback(playback),
        )

    # ---- holding ----

    async def heartbeat(self, claims: Sequence[Claim]) -> list[Claim]:
        """Say that these claims live; those that are lost, ended or gone come back."""
        calls: list[Call] = [([self._head(c), c.job_key], [*_fence(c), self._kind.name, self._lease]) for c in claims]
        alive = await self._wire.call_many("heartbeat", calls) if calls else []
        return [claim for claim, answer in zip(claims, alive, strict=True) if not answer]

    async def publish(self, claim: Claim, chunk: Chunk) -> Published:
        """Write one chunk; the next stage, the reader and the end of the turn follow from it."""
        return (await self.publish_all([(claim, chunk)]))[0]

    async def publish_all(self, chunks: Sequence[tuple[Claim, Chunk]]) -> list[Published]:
        """Write chunks of any turns in one round trip, in order."""
        answers = await self._wire.call_many("publish", [self._publish_call(*pair) for pair in chunks])
        return [Published(Outcome(outcome.decode()), after) for outcome, after in answers]

    def _publish_call(self, claim: Claim, chunk: Chunk) -> Call:
        turn, p = claim.turn, self._partition(claim)
        after = next_stage(turn, self._kind)
        names = [*turn_keys(p, turn.id), claim.job_key, keys.session_blobs(p, keys.session_of(turn.id))]
        if after:
            names.append(keys.jobs(p, after, job_class(turn)))
        early = int(self._kind is not TOKENIZER)  # the llm cannot prefill an open segment
        body: list[Argument] = [chunk.index, int(chunk.final), chunk.SerializeToString()]
        who: list[Argument] = [turn.id, *_fence(claim), self._kind.name, self._kind.writes]
        return names, [*who, *body, after, early, chunk.encoded.feature_key or chunk.speech.mel_key]

    # ---- letting go ----

    async def release(self, claim: Claim) -> None:
        """Hand an unfinished turn to another worker; it does not count as an attempt."""
        names = [self._head(claim), claim.job_key, self._handover(claim, self._kind)]
        await self._wire.call("release", names, [claim.turn.id, *_fence(claim), self._kind.name])

    async def fail(self, claim: Claim, failure: Failure) -> None:
        """End a turn with a failure, unless it is another worker's by now."""
        names = [*turn_keys(self._partition(claim), claim.turn.id), claim.job_key]
        args: list[Argument] = [claim.turn.id, "error", failure.SerializeToString(), *_fence(claim), self._kind.name]
        await self._wire.call("finish", names, args)

    async def rewind(self, claim: Claim) -> None:
        """Put a turn back to the tokenizer, because features that the llm needs are gone."""
        assert self._kind is LLM, "only the llm reads features"
        names = [self._head(claim), claim.job_key, self._handover(claim, TOKENIZER)]
        await self._wire.call("rewind", names, [claim.turn.id, *_fence(claim)])

    async def depth(self) -> tuple[int, int]:
        """Turns that wait, and turns in the hands of workers."""
        found = [await self._wire.call("depth", self._classes(p), []) for p in self._wire.partitions]
        return sum(waiting for waiting, _ in found), sum(pending for _, pending in found)

    async def aclose(self) -> None:
        """Forget this consumer where it holds nothing. What it holds is recovered by others."""
        for p in self._wire.partitions:
            await self._wire.call("leave", [*self._own(p), *self._classes(p)], [self._consumer])
        await self._arrivals.aclose()

    # ---- parts ----

    def _rotated(self) -> list[str]:
        partitions = list(self._wire.partitions)
        self._start = (self._start + 1) % len(partitions)
        return partitions[self._start :] + partitions[: self._start]

    def _classes(self, p: str) -> list[str]:
        return [keys.jobs(p, self._kind.name, name) for name in keys.CLASSES]

    def _own(self, p: str) -> list[str]:
        return [keys.worker_jobs(p, self._kind.name, self._consumer)]

    def _own_ttl(self) -> int:
        return milliseconds(self._wire.options.turn_ttl)

    def _partition(self, claim: Claim) -> str:
        return keys.partition_of(keys.session_of(claim.turn.id), self._wire.options.partitions)

    def _head(self, claim: Claim) -> str:
        return keys.head(self._partition(claim), claim.turn.id)

    def _handover(self, claim: Claim, kind: StageKind) -> str:
        return keys.jobs(self._partition(claim), kind.name, keys.HANDOVER)

    def _gave_up(self) -> bytes:
        rule = f"the {self._kind.name} stage gave this turn up after {self._wire.options.max_deliveries} attempts"
        message = f"{rule}; its workers' logs say why"
        return Failure(code=_INTERNAL, reason="GAVE_UP", message=message).SerializeToString()


def _fence(claim: Claim) -> tuple[str, int, str]:
    """What proves a claim: consumer and token; and the job's entry."""
    return claim.consumer, claim.token, claim.job_id
