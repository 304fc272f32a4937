"""Turns, their logs and sessions in the journal, as an orchestrator sees them. Workers use `kimia.streams.jobs`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from kimia.errors import NotFoundError, RequestError, StateError, TurnCancelledError
from kimia.stage import STAGES, TOKENIZER, Log, StageKind, route_of
from kimia.streams import keys
from kimia.streams.connections import history_of, reached
from kimia.streams.wire import Argument, Wire
from kimia.v1.conversation_pb2 import Message
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, Chunk, Failure, Turn

_DEADLINE_EXCEEDED = 4  # google.rpc.Code
_LONGEST_MS = 86_400_000  # beyond any turn, and exact in Lua

State: TypeAlias = Literal["open", "running", "done", "cancelled", "error"]


@dataclass(frozen=True)
class Opened:
    """An open turn. `token` allows to write its input; 0 where another process reads a turn that existed."""

    turn_id: str
    token: int
    existing: bool


@dataclass(frozen=True)
class StageTimes:
    """One stage of a turn: microseconds of the journal's clock, 0 for what has not happened."""

    queued: int
    claimed: int
    first: int
    done: int
    consumer: str
    take_overs: int


@dataclass(frozen=True)
class Head:
    """What is known of a turn. Times are microseconds of the journal's clock, 0 for what has not happened."""

    turn: Turn
    state: State
    failure: Failure | None
    opened: int
    submitted: int
    ended: int
    stages: Mapping[str, StageTimes]
    next: Mapping[Log, int]
    reader: str
    reader_token: int
    heard_ms: int  # milliseconds of speech that its caller is known to have heard

    @property
    def over(self) -> bool:
        """Nothing will be written any more."""
        return self.state not in ("open", "running")


@dataclass(frozen=True)
class Playback:
    """How far a caller had heard a turn, and how long ago that was. Both in seconds."""

    heard: float
    age: float


class Journal:
    """Turns, logs and sessions. Every call may raise UnavailableError; ids of the wrong form raise RequestError."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._turn_ttl = milliseconds(wire.options.turn_ttl)
        self._session_ttl = milliseconds(wire.options.session_ttl)

    async def history(self) -> str:
        """Names the line of writes that the server's data come from: another after every restart and promotion.

        So what was written under another name may be lost.
        """
        with reached("journal"):
            return await history_of(self._wire.journal)

    # ---- turns ----

    async def open_turn(self, turn: Turn, reader: str) -> Opened:
        """Begin a turn, or find the one that the same id or idempotency key has begun.

        `reader` is the process whose inbox gets the pointers. Raises NotFoundError for a deleted session.
        """
        p = self._partition(turn.id)
        session, tenant = keys.session_of(turn.id), turn.caller.tenant
        names = [*turn_keys(p, turn.id), keys.gone(p, session), keys.token(p, "reader")]
        if turn.idempotency_key:
            names.append(keys.idempotency(p, tenant, turn.idempotency_key))
        spec = turn.SerializeToString()
        args: list[Argument] = [
            turn.id,
            spec,
            reader,
            session,
            tenant,
            turn.caller.key_id,
            self._turn_ttl,
            self._session_ttl,
            turn.caller.traceparent,
        ]
        answer, *found = await self._wire.call("open", names, args)
        if answer == b"gone":
            raise _no_session(session)
        return Opened(found[0].decode(), found[1], answer == b"existing")

    async def append_input(self, turn_id: str, token: int, chunks: Sequence[Chunk]) -> int:
        """Append to the log `input`; the log's next index. What is there already is skipped.

        The chunks' indices follow one another. Raises NotFoundError; TurnCancelledError; StateError when another
        process reads the turn now, when the turn has ended, or when chunks before these are missing.
        """
        if not chunks:
            return (await self.head(turn_id)).next["input"]
        first = chunks[0].index
        if [chunk.index for chunk in chunks] != list(range(first, first + len(chunks))):
            raise RequestError("the chunks' indices must follow one another", field="index")
        names = turn_keys(self._partition(turn_id), turn_id)
        data = [chunk.SerializeToString() for chunk in chunks]
        answer, after = await self._wire.call("append", names, [turn_id, token, first, TOKENIZER.name, *data])
        _check(answer.decode(), turn_id, after)
        return cast(int, after)

    async def submit(self, turn: Turn, token: int, worker: str | None = None) -> None:
        """Write the final spec and queue the first stage of its route; once more changes nothing.

        `worker` is the consumer of the llm stage that would serve it best; another takes it if that one does not.
        Raises as `append_input` does.
        """
        route = route_of(turn)
        if not route:
            raise RequestError("a turn passes at least one stage", field="route")
        p = self._partition(turn.id)
        first = route[0].name
        names = [*turn_keys(p, turn.id), keys.jobs(p, first, job_class(turn))]
        args: list[Argument] = [turn.id, token, turn.SerializeToString(), first, _time_left(turn), worker or ""]
        answer = await self._wire.call("submit", names, args)
        _check(answer.decode(), turn.id)

    async def take_reader(self, turn_id: str, reader: str) -> int:
        """Make `reader` the reader of a turn; its token. Raises NotFoundError."""
        p = self._partition(turn_id)
        names = [*turn_keys(p, turn_id), keys.token(p, "reader")]
        token = await self._wire.call("reader", names, [reader])
        if not token:
            raise _no_turn(turn_id)
        return cast(int, token)

    async def read(self, turn_id: str, log: Log, start: int = 0) -> list[Chunk]:
        """A log from an index on; empty where nothing is written, or the turn is gone."""
        name = keys.log(self._partition(turn_id), turn_id, log)
        with reached("journal"):
            entries: Any = await self._wire.journal.xrange(name, min=f"{start + 1}-0")
        return [Chunk.FromString(fields[b"c"]) for _, fields in entries]

    async def head(self, turn_id: str) -> Head:
        """What is known of a turn. Raises NotFoundError."""
        with reached("journal"):
            fields = await self._wire.journal.hgetall(self._head(turn_id))
        if not fields:
            raise _no_turn(turn_id)
        return parse_head(cast(Mapping[bytes, bytes], fields))

    async def note_blobs(self, turn_id: str, blobs: Sequence[str]) -> bool:
        """Let the deletion of an open turn's session find these blobs; False where the turn is gone."""
        p, session = self._partition(turn_id), keys.session_of(turn_id)
        names = [*turn_keys(p, turn_id), keys.session_blobs(p, session)]
        return bool(await self._wire.call("note_blobs", names, blobs))

    async def cancel(self, turn_id: str) -> bool:
        """Stop a turn. True if this call ended it; False if it had ended, or is gone."""
        return await self._finish(turn_id, "cancelled", b"")

    async def fail(self, turn_id: str, failure: Failure) -> bool:
        """End a turn with a failure. True if this call ended it."""
        return await self._finish(turn_id, "error", failure.SerializeToString())

    async def drop_late(self, turn_id: str) -> bool:
        """End a turn whose deadline has passed before a stage of it has begun. True if this call ended it."""
        args = [word for kind in STAGES.values() for word in (kind.name, kind.writes, too_late(kind))]
        return bool(await self._wire.call("drop", turn_keys(self._partition(turn_id), turn_id), [turn_id, *args]))

    async def note_playback(self, turn_id: str, playback: Playback) -> None:
        """Say how far the caller has heard a turn, which paces its workers. Without effect unless the turn runs."""
        heard, age = (min(round(seconds * 1000), _LONGEST_MS) for seconds in (playback.heard, playback.age))
        await self._wire.call("playback", [self._head(turn_id)], [turn_id, heard, age])

    async def playback(self, turn_id: str) -> Playback | None:
        """How far the caller of a running turn has heard it; None while nobody has said."""
        return parse_playback(await self._wire.call("playback", [self._head(turn_id)], [turn_id]))

    async def _finish(self, turn_id: str, state: State, failure: bytes) -> bool:
        names = turn_keys(self._partition(turn_id), turn_id)
        return bool(await self._wire.call("finish", names, [turn_id, state, failure]) == b"ended")

    # ---- sessions ----

    async def load_session(self, session_id: str) -> tuple[SessionRecord, int]:
        """A session and its version. Raises NotFoundError."""
        p = self._session_partition(session_id)
        with reached("journal"):
            record, version = await self._wire.journal.hmget(keys.session(p, session_id), ["record", "version"])
        if record is None or version is None:
            raise _no_session(session_id)
        return SessionRecord.FromString(cast(bytes, record)), int(version)

    async def save_session(self, record: SessionRecord, version: int) -> int:
        """Write a session if it has the version that was read (0: it does not exist yet); its new version.

        Lets the session and the input logs of its turns live for another `session_ttl`. Raises StateError when
        somebody else has written it, NotFoundError when it was deleted or has expired.
        """
        p = self._session_partition(record.id)
        inputs = [keys.log(p, turn, "input") for turn in _turns_of(record) if self._partition(turn) == p]
        args: list[Argument] = [version, record.SerializeToString(), self._session_ttl, *_blobs_of(record)]
        answer, *found = await self._wire.call("save", [*session_keys(p, record.id), *inputs], args)
        if answer == b"gone":
            raise _no_session(record.id)
        if answer == b"conflict":
            raise StateError(f"session {record.id} was changed by another call; load it and try again")
        return cast(int, found[0])

    async def restore_session(self, record: SessionRecord, version: int) -> bool:
        """Write a session as it was, where a fail-over has lost this version; whether it had. Deleted ones stay so."""
        names = session_keys(self._session_partition(record.id), record.id)
        args: list[Argument] = [version, record.SerializeToString(), self._session_ttl, *_blobs_of(record)]
        [answer] = await self._wire.call("restore", names, args)
        return bool(answer == b"restored")

    async def bury_session(self, session_id: str) -> None:
        """Let nothing bring a session back of which there is nothing left to delete."""
        p = self._session_partition(session_id)
        with reached("journal"):
            await self._wire.journal.set(keys.gone(p, session_id), 1, px=self._turn_ttl)

    async def delete_session(self, session_id: str) -> None:
        """Delete a session, its turns and the blobs it used; who writes later finds nothing. Raises NotFoundError."""
        names = session_keys(self._session_partition(session_id), session_id)
        answer, *blobs = await self._wire.call("delete", names, [self._turn_ttl])
        if answer == b"gone":
            raise _no_session(session_id)
        if blobs:
            with reached("blob store"):
                await self._wire.blobs.unlink(*blobs)

    def _head(self, turn_id: str) -> str:
        return keys.head(self._partition(turn_id), turn_id)

    def _partition(self, turn_id: str) -> str:
        return keys.partition_of(keys.session_of(turn_id), self._wire.options.partitions)

    def _session_partition(self, session_id: str) -> str:
        return keys.partition_of(keys.check_session_id(session_id), self._wire.options.partitions)


# ---- what jobs share ----------------------------------------------------------------------------------------------


def turn_keys(p: str, turn_id: str) -> list[str]:
    """The six keys that every script about a turn gets first."""
    logs = [keys.log(p, turn_id, name) for name in keys.LOGS]
    return [keys.head(p, turn_id), *logs, keys.session_turns(p, keys.session_of(turn_id))]


def session_keys(p: str, session_id: str) -> list[str]:
    """The four keys that scripts about a session get first."""
    return [make(p, session_id) for make in (keys.session, keys.session_turns, keys.session_blobs, keys.gone)]


def milliseconds(seconds: float) -> int:
    """At least 1."""
    return max(1, round(seconds * 1000))


def job_class(turn: Turn) -> str:
    """Which queue a turn waits in."""
    return keys.BATCH if turn.job_class == JOB_CLASS_BATCH else keys.INTERACTIVE


def deadline_us(turn: Turn) -> int:
    """Microseconds since the epoch; 0 for none."""
    return turn.deadline.ToMicroseconds() if turn.HasField("deadline") else 0


def too_late(kind: StageKind) -> bytes:
    """The failure of a turn whose deadline has passed before a stage has begun."""
    message = f"the deadline passed before the {kind.name} stage had a free row; try again later"
    return Failure(code=_DEADLINE_EXCEEDED, reason="DEADLINE_EXCEEDED", message=message).SerializeToString()


def _time_left(turn: Turn) -> int | str:
    """Microseconds until a turn's deadline; "": it has none."""
    return deadline_us(turn) - time.time_ns() // 1000 if turn.HasField("deadline") else ""


def next_stage(turn: Turn, kind: StageKind) -> str:
    """The stage that reads what `kind` writes; "" after the last.

    A rewound turn passes the tokenizer even if its route leaves it out, so order counts, not the place in the route.
    """
    return next((other.name for other in route_of(turn) if other.number > kind.number), "")


# ---- reading heads ------------------------------------------------------------------------------------------------


def parse_head(fields: Mapping[bytes, bytes]) -> Head:
    """A head from the fields of its hash."""

    def number(name: str) -> int:
        return int(fields.get(name.encode(), b"0"))

    def word(name: str) -> str:
        return fields.get(name.encode(), b"").decode()

    def times(stage: str) -> StageTimes:
        queued, claimed, first, done = (
            number(f"{stage}:{moment}") for moment in ("queued", "claimed", "first", "done")
        )
        return StageTimes(queued, claimed, first, done, word(f"{stage}:consumer"), number(f"{stage}:take_overs"))

    failure = fields.get(b"failure")
    return Head(
        turn=Turn.FromString(fields[b"turn"]),
        state=cast(State, word("state")),
        failure=None if failure is None else Failure.FromString(failure),
        opened=number("opened"),
        submitted=number("submitted"),
        ended=number("ended"),
        stages={name: times(name) for name in STAGES if f"{name}:queued".encode() in fields},
        next={log: number(f"{log}:next") for log in keys.LOGS},
        reader=word("reader"),
        reader_token=number("reader_token"),
        heard_ms=number("heard"),
    )


def parse_playback(answer: Sequence[int]) -> Playback | None:
    """A position as scripts give it. One that lies in the future, after a clock has jumped, is of now."""
    return Playback(answer[0] / 1000, max(answer[1], 0) / 1000) if answer else None


def _clips(record: SessionRecord) -> list[Any]:
    messages: list[Message] = [*record.messages, *record.pending]
    return [m.audio if m.HasField("audio") else m.spoken.clip for m in messages if not m.HasField("text")]


def _turns_of(record: SessionRecord) -> list[str]:
    sources = [clip.source_turn for clip in _clips(record)]
    named = [*record.turn_ids, record.running_turn_id, record.open_turn_id, *sources]
    return [turn for turn in dict.fromkeys(named) if turn]


def _blobs_of(record: SessionRecord) -> list[str]:
    return list(dict.fromkeys(key for clip in _clips(record) for key in clip.feature_keys))


# ---- answers that are errors --------------------------------------------------------------------------------------


def _check(answer: str, turn_id: str, after: int = 0) -> None:
    """Raise what an answer other than `ok` means."""
    if answer == "ok":
        return
    if answer == "gone":
        raise _no_turn(turn_id)
    if answer == "cancelled":
        raise TurnCancelledError(f"turn {turn_id} was cancelled; open a new one")
    meanings = {
        "fenced": "is followed by another connection now; resume it to go on here",
        "gap": f"has input up to index {after - 1}; send again from {after}",
    }
    raise StateError(f"turn {turn_id} {meanings.get(answer, 'has ended; open a new one')}")


def _no_turn(turn_id: str) -> NotFoundError:
    return NotFoundError(f"no turn {turn_id}: it has expired or was deleted; open a new one", field="turn_id")


def _no_session(session_id: str) -> NotFoundError:
    return NotFoundError(f"no session {session_id}: it has expired or was deleted; begin one", field="session_id")
