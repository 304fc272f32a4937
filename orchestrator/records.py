"""Session records in the journal: read, changed without losing what others change, patient when the journal is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from kimia.errors import NotFoundError, StateError, UnavailableError
from kimia.runtime.logs import get_logger
from kimia.streams import keys
from kimia.streams.connections import reached
from kimia.streams.journal import Journal
from kimia.streams.wire import Wire
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import Caller
from orchestrator.copies import Copies

T = TypeVar("T")

PATIENCE = 15.0  # seconds that a call waits for a journal that is away: longer than a restart takes
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 1.0  # seconds
CONFLICTS = 20  # attempts at a record that others keep changing

log = get_logger()


@dataclass(frozen=True)
class Seen:
    """A session as it was a moment ago: a change that begins from it needs no reading."""

    record: SessionRecord
    version: int
    new: bool = False  # it was begun by whoever holds this


async def patiently(call: Callable[[], Awaitable[T]]) -> T:
    """The answer of an idempotent call, as soon as the journal can be reached. Raises UnavailableError in the end."""
    clock = asyncio.get_running_loop().time
    latest, pause = clock() + PATIENCE, FIRST_PAUSE
    while True:
        try:
            return await call()
        except UnavailableError:
            if clock() + pause > latest:
                raise
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


class Records:
    """The sessions of all tenants; nobody sees those of another. What was saved here and lost is found again."""

    def __init__(self, wire: Wire, journal: Journal, copies: Copies) -> None:
        self._wire = wire
        self._journal = journal
        self._copies = copies

    async def load(self, session_id: str, tenant: str) -> SessionRecord:
        """A session of this tenant. Raises NotFoundError."""
        record, _ = await self.latest(session_id)
        _check_tenant(record, tenant)
        return record

    async def latest(self, session_id: str) -> tuple[SessionRecord, int]:
        """A session and its version, not older than what was saved here. Raises NotFoundError."""
        return await patiently(lambda: self._latest(session_id))

    async def check_tenant(self, session_id: str, tenant: str) -> None:
        """Raise NotFoundError for a session of another tenant; one that does not exist is nobody's yet."""
        try:
            record, _ = await self.latest(session_id)
        except NotFoundError:
            return
        _check_tenant(record, tenant)

    async def life(self, session_id: str) -> int:
        """Milliseconds until a session is forgotten unless it goes on."""
        key = keys.session(keys.partition_of(session_id, self._wire.options.partitions), session_id)
        with reached("journal"):
            return max(int(await self._wire.journal.pttl(key)), 0)

    async def begin(self, session_id: str, caller: Caller, *, one_off: bool = False, unheard: bool = False) -> Seen:
        """A session of this tenant, maybe a new one. Raises NotFoundError for another's, or a deleted one.

        `unheard`: its id is that of one request, so it is written without a look.
        """
        if not unheard:
            try:
                return await self.seen(session_id, caller.tenant)
            except NotFoundError:
                log.debug("session begins", session=session_id)
        record = new_record(session_id, caller, one_off=one_off)
        try:
            version = await patiently(lambda: self._save(record, 0))
        except StateError:  # somebody else has begun it, or it belongs to another tenant
            return await self.seen(session_id, caller.tenant)
        return Seen(record, version, new=True)

    async def seen(self, session_id: str, tenant: str) -> Seen:
        """A session of this tenant, to be changed soon. Raises NotFoundError."""
        record, version = await self.latest(session_id)
        _check_tenant(record, tenant)
        return Seen(record, version)

    async def change(self, session_id: str, edit: Callable[[SessionRecord], T], seen: Seen | None = None) -> T:
        """Change a session; the edit's result. It is made anew on a fresh record when somebody else has written.

        So an edit must notice what it has done already. Raises NotFoundError, and what the edit raises. `seen` is the
        session as this request has read or written it last.
        """
        return await patiently(lambda: self._changed(session_id, edit, seen))

    async def _changed(self, session_id: str, edit: Callable[[SessionRecord], T], seen: Seen | None) -> T:
        for attempt in range(CONFLICTS):
            record, version = await self._latest(session_id) if seen is None or attempt else _copied(seen)
            before = record.SerializeToString(deterministic=True)
            result = edit(record)
            if record.SerializeToString(deterministic=True) == before:
                return result
            try:
                await self._save(record, version)
            except StateError:
                continue
            return result
        raise UnavailableError(f"session {session_id} is changed by others all the time; try again", retry_after=1.0)

    async def _latest(self, session_id: str) -> tuple[SessionRecord, int]:
        found = await self._copies.surely(lambda: self._journal.load_session(session_id))
        kept = self._copies.records.get(session_id)
        if kept is not None and found[1] < kept[1] and await self._copies.repaired():
            return await self._journal.load_session(session_id)
        return found

    async def _save(self, record: SessionRecord, version: int) -> int:
        saved = await self._journal.save_session(record, version)
        copy = SessionRecord()
        copy.CopyFrom(record)
        self._copies.records.keep(record.id, (copy, saved))
        return saved


def _copied(seen: Seen) -> tuple[SessionRecord, int]:
    record = SessionRecord()
    record.CopyFrom(seen.record)
    return record, seen.version


def _check_tenant(record: SessionRecord, tenant: str) -> None:
    if record.caller.tenant != tenant:
        raise NotFoundError(f"no session {record.id}: it has expired or was deleted; begin one", field="session_id")


def new_record(session_id: str, caller: Caller, *, one_off: bool = False) -> SessionRecord:
    """The record of a session that begins now."""
    now = Timestamp()
    now.GetCurrentTime()
    return SessionRecord(id=session_id, caller=caller, create_time=now, one_off=one_off)
