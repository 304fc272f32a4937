"""Session records in the journal: read, changed without losing what others change, patient when the journal is away."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from google.protobuf.timestamp_pb2 import Timestamp

from kimia.errors import NotFoundError, StateError, UnavailableError
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

    async def begin(self, session_id: str, caller: Caller, *, one_off: bool = False) -> tuple[SessionRecord, bool]:
        """A session of this tenant, and whether it is new. Raises NotFoundError for another's, or a deleted one."""
        try:
            return (await self.load(session_id, caller.tenant)), False
        except NotFoundError:
            record = new_record(session_id, caller, one_off=one_off)
        try:
            await patiently(lambda: self._save(record, 0))
        except StateError:  # somebody else has begun it, or it belongs to another tenant
            return (await self.load(session_id, caller.tenant)), False
        return record, True

    async def change(self, session_id: str, edit: Callable[[SessionRecord], T]) -> T:
        """Change a session; the edit's result. It is made anew on a fresh record when somebody else has written.

        So an edit must notice what it has done already. Raises NotFoundError, and what the edit raises.
        """
        return await patiently(lambda: self._changed(session_id, edit))

    async def _changed(self, session_id: str, edit: Callable[[SessionRecord], T]) -> T:
        for _ in range(CONFLICTS):
            record, version = await self._latest(session_id)
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

    async def _save(self, record: SessionRecord, version: int) -> None:
        saved = await self._journal.save_session(record, version)
        copy = SessionRecord()
        copy.CopyFrom(record)
        self._copies.records.keep(record.id, (copy, saved))


def _check_tenant(record: SessionRecord, tenant: str) -> None:
    if record.caller.tenant != tenant:
        raise NotFoundError(f"no session {record.id}: it has expired or was deleted; begin one", field="session_id")


def new_record(session_id: str, caller: Caller, *, one_off: bool = False) -> SessionRecord:
    """The record of a session that begins now."""
    now = Timestamp()
    now.GetCurrentTime()
    return SessionRecord(id=session_id, caller=caller, create_time=now, one_off=one_off)
