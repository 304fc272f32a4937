"""What is new for one process: one blocked read per partition serves all turns that it follows.

Writers append a pointer (turn, log) to the inbox of whoever reads on; a feed that is woken reads the log itself from
where it stands. So a pointer carries no content, and one that is lost (trimmed, or its server restarted) costs a delay
and never a turn: after every failure of the connection, and when nothing came for a while, feeds look for themselves.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Self, TypeAlias, TypeVar

import redis.asyncio as redis
from redis.exceptions import RedisError

from kimia.errors import NotFoundError, UnavailableError
from kimia.stage import Log
from kimia.streams import keys
from kimia.streams.connections import history_of, reached
from kimia.streams.journal import Head, Journal, Playback, deadline_us, parse_head
from kimia.streams.patience import LONGEST_PAUSE, Patience, end, pause_after
from kimia.streams.together import Together
from kimia.streams.wire import Wire
from kimia.v1.turn_pb2 import Chunk

Surely: TypeAlias = Callable[[Callable[[], Awaitable[Head]]], Awaitable[Head]]
Request: TypeAlias = tuple[str, Log | None, int]  # turn, log (None: its head), first index

T = TypeVar("T")

BLOCK = 1.0  # seconds of one blocked read: a stop that is not noticed takes no longer
BATCH = 1000  # pointers read at once; a full batch means that older ones may have been trimmed
LOOK = 5.0  # seconds after which a feed that heard nothing looks for itself


class Inbox:
    """The inbox of one process, open while used as a context manager. `owner` is unique per process start."""

    def __init__(self, wire: Wire, owner: str, look: float = LOOK) -> None:
        self.owner = owner
        self.journal = Journal(wire)
        self.patience = Patience()
        self.look = look
        self.connected: Callable[[str], None] = lambda _: None  # told the history of the journal: see `Journal.history`
        self.surely: Surely = _once  # asks again where that may help
        self.deleted: Callable[[str], None] = lambda _: None  # told a turn of a session that was deleted
        self._wire = wire
        self._feeds: dict[str, set[Feed]] = {}
        self._stopped = False
        self._reads: list[asyncio.Task[None]] = []
        self._clients: list[redis.Redis] = []
        self._together = Together(self._look_up)

    async def __aenter__(self) -> Self:
        for partition in self._wire.partitions:
            client = self._wire.blocking()
            self._clients.append(client)
            self._reads.append(asyncio.create_task(self._follow(client, keys.inbox(partition, self.owner))))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stopped = True
        await end(self._reads)
        await self._together.aclose()
        for client in self._clients:
            await client.aclose()

    def feed(self, turn_id: str) -> Feed:
        """Follow a turn: what happens from now on is heard. Close the feed, or use it as a context manager."""
        feed = Feed(self, turn_id)
        self._feeds.setdefault(turn_id, set()).add(feed)
        return feed

    def forget(self, feed: Feed) -> None:
        """Stop waking a feed."""
        feeds = self._feeds.get(feed.turn_id, set())
        feeds.discard(feed)
        if not feeds:
            self._feeds.pop(feed.turn_id, None)

    def follows(self, turn_id: str) -> bool:
        """Whether a feed of the turn is open."""
        return turn_id in self._feeds

    # ---- reading logs ----

    async def read(self, turn_id: str, log: Log, start: int) -> list[Chunk]:
        """A log from an index on, as soon as the journal can be reached."""
        return [Chunk.FromString(fields[b"c"]) for _, fields in await self._together.ask((turn_id, log, start))]

    async def head(self, turn_id: str) -> Head:
        """A turn's head, as soon as the journal can be reached. Raises NotFoundError."""
        return await self.patience.reach(lambda: self.surely(lambda: self._head(turn_id)))

    async def _head(self, turn_id: str) -> Head:
        fields = await self._together.ask((turn_id, None, 0))
        if not fields:
            raise NotFoundError(f"no turn {turn_id}: it has expired or was deleted; open a new one", field="turn_id")
        return parse_head(fields)

    async def playback(self, turn_id: str) -> Playback | None:
        """How far a running turn was heard, as soon as the journal can be reached; None while nobody has said."""
        return await self.patience.reach(lambda: self.journal.playback(turn_id))

    async def _look_up(self, requests: Sequence[Request]) -> Sequence[Any]:
        return await self.patience.reach(lambda: self._look_up_once(requests))

    async def _look_up_once(self, requests: Sequence[Request]) -> Sequence[Any]:
        """Logs and heads in one round trip: however many turns are woken at once, one connection is used."""
        with reached("journal"):
            async with self._wire.journal.pipeline(transaction=False) as pipe:
                for turn_id, log, start in requests:
                    partition = keys.partition_of(keys.session_of(turn_id), self._wire.options.partitions)
                    if log is None:
                        pipe.hgetall(keys.head(partition, turn_id))
                    else:
                        pipe.xrange(keys.log(partition, turn_id, log), min=f"{start + 1}-0")
                return await pipe.execute()

    # ---- reading pointers ----

    async def _follow(self, client: redis.Redis, key: str) -> None:
        """Read one partition's pointers until stopped; after a failure find the end anew and wake everybody."""
        failures = 0
        while not self._stopped:
            try:
                last = await self._tail(client, key)
                self.connected(await history_of(client))
                self._wake_all()
                failures = 0
                while not self._stopped:
                    last = await self._read(client, key, last)
            except (RedisError, OSError):
                failures += 1
                await asyncio.sleep(pause_after(failures))

    async def _tail(self, client: redis.Redis, key: str) -> Any:
        entries: Any = await client.xrevrange(key, count=1)
        return entries[0][0] if entries else b"0-0"

    async def _read(self, client: redis.Redis, key: str, last: Any) -> Any:
        """Wait for pointers behind the id `last` and wake the feeds they name; the id to go on from."""
        answer: Any = await client.xread({key: last}, count=BATCH, block=round(BLOCK * 1000))
        entries = answer[0][1] if answer else []
        for _, fields in entries:
            turn_id, log = fields[b"t"].decode(), fields[b"l"].decode()
            if log == "gone":
                self.deleted(turn_id)
            for feed in self._feeds.get(turn_id, ()):
                feed.wake(log)
        if len(entries) == BATCH:
            self._wake_all()
        return entries[-1][0] if entries else last

    def _wake_all(self) -> None:
        for feeds in self._feeds.values():
            for feed in feeds:
                feed.wake("state")


class Feed:
    """One turn as it goes on. Waits out a journal that cannot be reached, or as long as `patience` says."""

    def __init__(self, inbox: Inbox, turn_id: str) -> None:
        self.turn_id = turn_id
        self.patience: Callable[[], float | None] = lambda: (
            None
        )  # seconds that one look may take; None: as long as it takes
        self._inbox = inbox
        self._waiting: set[_Bell] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Follow the turn no longer."""
        self._inbox.forget(self)

    def wake(self, log: str) -> None:
        """Something is new in a log; "state": anything may be."""
        for bell in self._waiting:
            bell.ring(log)

    async def chunks(self, log: Log, start: int = 0) -> AsyncIterator[Chunk]:
        """The log's chunks from index `start` on, as they come.

        Ends after the final one, or where the log stands when the turn has reached a terminal state. Raises
        NotFoundError when the turn is gone, UnavailableError when patience ends.
        """
        bell = _Bell(log)
        self._waiting.add(bell)
        try:
            ended = False
            while True:
                looked = bell.answer()
                found, over = await self._read(log, start, look=looked and not ended)
                for chunk in found:
                    yield chunk
                    start = chunk.index + 1
                    if chunk.final:
                        return
                if ended:
                    return
                ended = over  # nothing follows the end, but something may have come just before it: read once more
                if not ended:
                    await bell.wait(self._inbox.look)
        finally:
            self._waiting.discard(bell)

    async def _read(self, log: Log, start: int, *, look: bool) -> tuple[list[Chunk], bool]:
        """What is new in a log and, looked at in the same round trip, whether the turn is over."""
        reading = self._within_reach(lambda: self._inbox.read(self.turn_id, log, start))
        if not look:
            return await reading, False
        head, found = await asyncio.gather(self._head(), reading)
        return found, head.over

    async def _head(self) -> Head:
        return await self._within_reach(self._looked_at)

    async def _looked_at(self) -> Head:
        """The turn's head; where no worker can be told that it is too late to begin, this is told here."""
        head = await self._inbox.head(self.turn_id)
        if not head.over and 0 < deadline_us(head.turn) < time.time() * 1e6:
            await self._inbox.patience.reach(lambda: self._inbox.journal.drop_late(self.turn_id))
            head = await self._inbox.head(self.turn_id)
        return head

    async def playback(self) -> AsyncIterator[Playback]:
        """How far the caller has heard the turn: what is known now, and again whenever that may have changed."""
        bell = _Bell("playback")
        self._waiting.add(bell)
        try:
            while True:
                bell.answer()
                found = await self._inbox.playback(self.turn_id)
                if found is not None:
                    yield found
                await bell.wait(self._inbox.look)
        finally:
            self._waiting.discard(bell)

    async def ended(self) -> Head:
        """Wait for a terminal state. Raises as `chunks` does."""
        bell = _Bell("state")
        self._waiting.add(bell)
        try:
            while True:
                bell.answer()
                head = await self._head()
                if head.over:
                    return head
                await bell.wait(self._inbox.look)
        finally:
            self._waiting.discard(bell)

    async def _within_reach(self, look: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(self.patience()):
                return await look()
        except TimeoutError as error:
            rule = "the journal cannot be reached; the turn goes on when it is back: resume it then"
            raise UnavailableError(rule, retry_after=LONGEST_PAUSE) from error


class _Bell:
    """What one reader of a feed waits for: its log, or a change of the turn's state."""

    def __init__(self, log: str) -> None:
        self._log = log
        self._rung = asyncio.Event()
        self._look = True  # whether the state may have changed too

    def ring(self, log: str) -> None:
        """Say what is new."""
        self._look |= log == "state"
        if log in ("state", self._log):
            self._rung.set()

    def answer(self) -> bool:
        """Begin to look for what is new; whether the state must be looked at as well."""
        look, self._look = self._look, False
        self._rung.clear()
        return look

    async def wait(self, seconds: float) -> None:
        """Until it rings; after so many seconds everything is looked at all the same."""
        try:
            async with asyncio.timeout(seconds):
                await self._rung.wait()
        except TimeoutError:
            self._look = True


async def _once(call: Callable[[], Awaitable[Head]]) -> Head:
    return await call()
