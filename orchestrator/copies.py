"""What this process has written to the journal and writes again when a restart or a fail-over of the journal lost it.

The worker that makes a chunk keeps it until its turn ends; all else that a turn needs was written by an orchestrator:
the head, the caller's sound, the final spec, the session's record, a cancellation, a deletion. Copies of these are kept
here while somebody follows the turn, and for `KEPT_SECONDS` after the last write. Every time the journal has another
history (`Journal.history`) all of them are written again. Where nothing was lost that changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from kimia.errors import KimiaError, NotFoundError, StateError, UnavailableError
from kimia.runtime.logs import get_logger
from kimia.streams.inbox import Inbox
from kimia.streams.journal import Journal
from kimia.streams.patience import end, pause_after
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import Chunk, Turn

T = TypeVar("T")

KEPT_SECONDS = 60.0  # after the last write: far longer than a replica that is fit to be promoted lags behind
APPENDED_AT_ONCE = 16  # pieces of input in one call to the journal: 1 MiB

log = get_logger()


@dataclass
class TurnCopy:
    """A turn whose input this process may write, as it has written it. `token` is that of its reader."""

    turn: Turn  # id, session and caller; once it is submitted, the whole spec
    token: int
    input: list[Chunk] = field(default_factory=list)
    submitted: bool = False
    cancelled: bool = False
    worker: str = ""  # of the llm, that should have the conversation in its cache

    @property
    def turn_id(self) -> str:
        """Of the turn."""
        return self.turn.id

    def add(self, chunks: Sequence[Chunk]) -> None:
        """Keep input that is about to be written; what is sent once more is kept once."""
        expected = self.input[-1].index + 1 if self.input else None
        self.input.extend(chunk for chunk in chunks if expected is None or chunk.index >= expected)


class Kept(Generic[T]):
    """Values by name, each forgotten a while after it was last kept, unless somebody still holds it."""

    def __init__(self, held: Callable[[str], bool] = lambda _: False) -> None:
        self._values: dict[str, T] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._held = held

    def keep(self, name: str, value: T) -> None:
        """Keep a value from now on."""
        self.drop(name)
        self._values[name] = value
        self._timers[name] = asyncio.get_running_loop().call_later(KEPT_SECONDS, self._over, name)

    def get(self, name: str) -> T | None:
        """The value, if it is still kept."""
        return self._values.get(name)

    def drop(self, name: str) -> None:
        """Forget it now."""
        self._values.pop(name, None)
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def items(self) -> list[tuple[str, T]]:
        """All that is kept."""
        return list(self._values.items())

    def _over(self, name: str) -> None:
        if self._held(name):
            self.keep(name, self._values[name])
        else:
            self.drop(name)


class Copies:
    """Copies of one process, and the repair of the journal by them."""

    def __init__(self, journal: Journal, inbox: Inbox) -> None:
        self.turns: Kept[TurnCopy] = Kept(inbox.follows)
        self.records: Kept[tuple[SessionRecord, int]] = Kept()  # with the version
        self._deleted: Kept[None] = Kept()
        self._journal = journal
        self._inbox = inbox
        self._history = ""  # under which all that is kept was written
        self._history_since = 0.0  # the loop's clock: when this process found it
        self._seen = ""  # the newest that the inbox has come upon
        self._repairs = 0
        self._repairing = asyncio.Lock()
        self._looking: asyncio.Task[None] | None = None
        inbox.connected, inbox.surely = self._look, self.surely

    async def aclose(self) -> None:
        """Repair nothing more, keep nothing."""
        self._inbox.connected = lambda _: None
        await end([*filter(None, [self._looking])])
        for kept in (self.turns, self.records, self._deleted):
            for name, _ in kept.items():
                kept.drop(name)

    def deleted(self, session_id: str) -> None:
        """A session is being deleted: nothing of it is kept, and the deletion is said again where it is lost."""
        self.records.drop(session_id)
        for turn_id, copy in self.turns.items():
            if copy.turn.session_id == session_id:
                self.turns.drop(turn_id)
        self._deleted.keep(session_id, None)

    # ---- finding out ----

    async def surely(self, call: Callable[[], Awaitable[T]]) -> T:
        """The answer of a call; made again where it failed for something that the journal had lost."""
        while True:
            before = self._repairs
            try:
                return await call()
            except (NotFoundError, StateError):
                if not await self.repaired(before):
                    raise

    async def repaired(self, before: int | None = None) -> bool:
        """Look whether the journal has another history, and write again what it may have lost.

        Whether that has happened, now or since there had been `before` repairs. Raises UnavailableError.
        """
        async with self._repairing:
            before = self._repairs if before is None else before
            history = await self._journal.history()
            if history != self._history:
                if self._history:
                    await self._repair()
                    self._repairs += 1
                self._history = history
                self._history_since = asyncio.get_running_loop().time()
            return self._repairs != before

    async def is_new(self, seconds: float) -> bool:
        """Whether this process has known the journal's history for less than so many seconds. Raises UnavailableError.

        What every process says again and again within this time may still be missing there.
        """
        await self.repaired()
        return asyncio.get_running_loop().time() - self._history_since < seconds

    def _look(self, history: str) -> None:
        """The inbox has connected anew, and this is the history that it has found."""
        self._seen = history
        if history != self._history and (self._looking is None or self._looking.done()):
            self._looking = asyncio.create_task(self._looked())

    async def _looked(self) -> None:
        """Until all other connections have come to the same server as the inbox."""
        looks = 0
        while self._history != self._seen:
            await self._inbox.patience.reach(self.repaired)
            looks += 1
            if self._history != self._seen:
                await asyncio.sleep(pause_after(looks))

    # ---- writing again ----

    async def _repair(self) -> None:
        """Deletions first, so that nothing of them comes back; records before the turns that they name."""
        for session_id, _ in self._deleted.items():
            await self._delete_again(session_id)
        restored = 0
        for _, (record, version) in self.records.items():
            restored += await self._journal.restore_session(record, version)
        for _, copy in self.turns.items():
            await self._write_again(copy)
        log.warning("journal restarted or changed", turns=len(self.turns.items()), records_restored=restored)

    async def _delete_again(self, session_id: str) -> None:
        try:
            await self._journal.delete_session(session_id)
        except NotFoundError:
            await self._journal.bury_session(session_id)

    async def _write_again(self, copy: TurnCopy) -> None:
        """One turn up to where it was. What stands in the way of one does not stop the others."""
        try:
            if await self._is_reader(copy):
                await self._fill(copy)
            else:
                self.turns.drop(copy.turn_id)
        except UnavailableError:
            raise
        except KimiaError as error:  # it was deleted, or has ended
            log.info("turn not written again", turn=copy.turn_id, error=str(error))
            self.turns.drop(copy.turn_id)

    async def _is_reader(self, copy: TurnCopy) -> bool:
        """Make sure that the head is there, and that this process reads it; False where another took it over."""
        spec = Turn(id=copy.turn_id, session_id=copy.turn.session_id, caller=copy.turn.caller)
        opened = await self._journal.open_turn(spec, self._inbox.owner)
        if opened.existing and opened.token != copy.token:
            head = await self._journal.head(copy.turn_id)
            if head.reader_token > copy.token:
                return False
            copy.token = await self._journal.take_reader(copy.turn_id, self._inbox.owner)
        else:
            copy.token = opened.token
        return True

    async def _fill(self, copy: TurnCopy) -> None:
        """Input, submission and cancellation, each only where it is missing."""
        head = await self._journal.head(copy.turn_id)
        missing = [chunk for chunk in copy.input if chunk.index >= head.next["input"]]
        if not head.over:
            for start in range(0, len(missing), APPENDED_AT_ONCE):
                some = missing[start : start + APPENDED_AT_ONCE]
                await self._journal.append_input(copy.turn_id, copy.token, some)
            if copy.submitted:
                await self._journal.submit(copy.turn, copy.token, copy.worker)
        if copy.cancelled:
            await self._journal.cancel(copy.turn_id)
