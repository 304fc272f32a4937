"""Connections to the journal and the blobs, and the Lua scripts that run there."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Self, TypeAlias

import redis.asyncio as redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff, NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

from kimia.errors import UnavailableError
from kimia.streams.keys import all_partitions

Argument: TypeAlias = str | bytes | int | float
Call: TypeAlias = tuple[Sequence[str], Sequence[Argument]]  # keys, arguments

CONNECTIONS = 64  # of one process at once, besides those that are blocked; more calls wait for one

_RETRY_AFTER = 1.0  # seconds
_RETRY = Retry(ExponentialBackoff(cap=0.1, base=0.01), 3)  # seconds: a connection that was dropped, not an outage
_UNREACHABLE = (RedisConnectionError, RedisTimeoutError, ReadOnlyError, OutOfMemoryError, OSError)


@dataclass(frozen=True)
class WireOptions:
    """Times are seconds."""

    partitions: int = 1
    turn_ttl: float = 900.0  # a turn is forgotten so long after its last write
    session_ttl: float = 3600.0  # a session is forgotten so long after its last turn
    blob_ttl: float = 900.0
    lease: float = 2.0  # without a heartbeat for so long, a claim may be taken over
    max_deliveries: int = 3  # claims without a new chunk before a turn is given up
    batch_patience: float = 10.0  # before a batch turn passes interactive ones: three stages of it fit any deadline


@contextmanager
def reached(what: str) -> Iterator[None]:
    """Turn failures of the connection into UnavailableError; `what` names the server, e.g. "journal"."""
    try:
        yield
    except _UNREACHABLE as error:
        raise UnavailableError(
            f"the {what} cannot be reached ({error}); check its URL, that it runs, and that it has memory",
            retry_after=_RETRY_AFTER,
        ) from error


class Wire:
    """The journal, the blobs, and the scripts. Answers are bytes."""

    def __init__(self, journal: redis.Redis, blobs: redis.Redis, options: WireOptions) -> None:
        self.journal = journal
        self.blobs = blobs
        self.options = options
        self._blocking: list[redis.Redis] = []

    @classmethod
    async def connect(cls, journal_url: str, blob_url: str | None = None, options: WireOptions | None = None) -> Self:
        """Connect and load the scripts. Raises UnavailableError."""
        journal = _client(journal_url)
        wire = cls(journal, _client(blob_url) if blob_url else journal, options or WireOptions())
        try:
            await wire._greet()
        except BaseException:
            await wire.aclose()
            raise
        return wire

    @property
    def partitions(self) -> tuple[str, ...]:
        """The hash tags of all partitions."""
        return all_partitions(self.options.partitions)

    def blocking(self) -> redis.Redis:
        """A client of its own for one blocked read at a time, without a timeout. Closed by `aclose`.

        It does not repeat a read whose connection was lost: the reader must hear of it, since it may have missed
        something.
        """
        old = self.journal.connection_pool
        options = {**old.connection_kwargs, "socket_timeout": None, "retry": Retry(NoBackoff(), 0)}
        pool = redis.ConnectionPool(connection_class=old.connection_class, **options)
        client = redis.Redis.from_pool(pool)
        self._blocking.append(client)
        return client

    async def call(self, script: str, keys: Sequence[str], args: Sequence[Argument]) -> Any:
        """Run kimia/streams/lua/<script>.lua in the journal. Raises UnavailableError."""
        body, digest = script_text(script)
        with reached("journal"):
            try:
                return await execute(self.journal, "EVALSHA", digest, len(keys), *keys, *args)
            except NoScriptError:
                return await execute(self.journal, "EVAL", body, len(keys), *keys, *args)

    async def call_many(self, script: str, calls: Sequence[Call]) -> list[Any]:
        """Run one script many times in one round trip, in order. Raises UnavailableError."""
        answers = await self._pipelined(script, calls)
        missing = next((i for i, answer in enumerate(answers) if isinstance(answer, NoScriptError)), None)
        if missing is not None:
            # The server has lost its scripts. What came after the first gap in the order is said again as well:
            # every script gives the same answer, or `duplicate`, when it is called twice.
            await self._load([script])
            answers[missing:] = await self._pipelined(script, calls[missing:])
        for answer in answers:
            if isinstance(answer, RedisError):
                with reached("journal"):
                    raise answer
        return answers

    async def aclose(self) -> None:
        """Close all connections."""
        clients = {id(client): client for client in (self.journal, self.blobs, *self._blocking)}
        for client in clients.values():
            await client.aclose()

    async def _pipelined(self, script: str, calls: Sequence[Call]) -> list[Any]:
        digest = script_text(script)[1]
        with reached("journal"):
            async with self.journal.pipeline(transaction=False) as pipe:
                queue: Callable[..., Any] = pipe.execute_command
                for keys, args in calls:
                    queue("EVALSHA", digest, len(keys), *keys, *args)
                return await pipe.execute(raise_on_error=False)

    async def _greet(self) -> None:
        await self._load(script_names())
        with reached("blob store"):
            await execute(self.blobs, "PING")

    async def _load(self, scripts: Sequence[str]) -> None:
        with reached("journal"):
            async with self.journal.pipeline(transaction=False) as pipe:
                for script in scripts:
                    pipe.script_load(script_text(script)[0])
                await pipe.execute()


async def execute(client: redis.Redis, *words: Argument) -> Any:
    """One command with its answer as the server gives it."""
    send: Callable[..., Awaitable[Any]] = client.execute_command
    return await send(*words)


@cache
def script_names() -> tuple[str, ...]:
    """All scripts."""
    files = (resources.files("kimia.streams") / "lua").iterdir()
    return tuple(sorted(file.name.removesuffix(".lua") for file in files if file.name != "prelude.lua"))


@cache
def script_text(script: str) -> tuple[str, str]:
    """A script with the functions that all share before it, and its SHA-1."""
    folder = resources.files("kimia.streams") / "lua"
    body = "\n".join((folder / f"{name}.lua").read_text(encoding="utf-8") for name in ("prelude", script))
    return body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()


class _Pool(redis.ConnectionPool):
    """Connections that callers wait for when all are in use, where redis-py would refuse them.

    Its BlockingConnectionPool does that too, but loses a connection for good when a caller is cancelled while it gives
    one back.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(max_connections=10 * CONNECTIONS, **options)
        self._free = asyncio.Semaphore(CONNECTIONS)
        self._given: set[Any] = set()

    async def get_connection(self, *_: Any, **__: Any) -> Any:
        """A connection, as soon as one is free."""
        await self._free.acquire()
        try:
            connection = await super().get_connection()  # type: ignore[no-untyped-call]
        except BaseException:
            self._free.release()
            raise
        self._given.add(connection)
        return connection

    async def release(self, connection: Any) -> None:
        """Give a connection back; also one that could not be made, which is nobody's yet."""
        try:
            await super().release(connection)
        finally:
            if connection in self._given:
                self._given.remove(connection)
                self._free.release()


def _client(url: str) -> redis.Redis:
    """A client that connects on first use. Raises UnavailableError for a URL that is none."""
    try:
        pool = _Pool.from_url(url, protocol=2, socket_connect_timeout=5, socket_timeout=10, retry=_RETRY)
    except ValueError as error:
        raise UnavailableError(f"{url!r} is no Redis URL ({error}); use redis://host:port/db") from error
    return redis.Redis.from_pool(pool)
