"""Connections to the journal and the blobs, and the Lua scripts that run there."""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Self, TypeAlias

import redis.asyncio as redis
from redis.exceptions import NoScriptError, RedisError

from kimia.errors import SettingsError
from kimia.streams import connections, keys
from kimia.streams.connections import reached

Argument: TypeAlias = str | bytes | int | float
Call: TypeAlias = tuple[Sequence[str], Sequence[Argument]]  # keys, arguments

PARTITIONS = keys.ledger("partitions")  # string: how many the journal is used with

# Scripts that end or free something, say that it lives, or let a process start: they run also with a full memory.
FREEING = frozenset({"delete", "drop", "finish", "heartbeat", "leave", "ledger_partitions", "ledger_renew", "release"})


@dataclass(frozen=True)
class WireOptions:
    """Times are seconds."""

    partitions: int = 1
    turn_ttl: float = 900.0  # a turn is forgotten so long after its last write
    session_ttl: float = 3600.0  # a session is forgotten so long after its last turn
    blob_ttl: float = 900.0
    lease: float = 1.6  # without a heartbeat for so long, a claim may be taken over
    max_deliveries: int = 3  # claims without a new chunk before a turn is given up
    batch_patience: float = 10.0  # before a batch turn passes interactive ones: three stages of it fit any deadline
    prefix_patience: float = 0.1  # for which a turn is left to the free worker that has its KV; that one needs few ms
    lead: float = 4.0  # speech that is kept ahead of what the caller has heard


class Wire:
    """The journal, the blobs, and the scripts. Answers are bytes."""

    def __init__(self, journal: redis.Redis, blobs: redis.Redis, options: WireOptions) -> None:
        self.journal = journal
        self.blobs = blobs
        self.options = options
        self._blocking: list[redis.Redis] = []

    @classmethod
    async def connect(cls, journal_url: str, blob_url: str | None = None, options: WireOptions | None = None) -> Self:
        """Connect and load the scripts. Raises UnavailableError; SettingsError for a URL that is none."""
        journal = connections.connected(journal_url)
        blobs = connections.connected(blob_url) if blob_url else journal
        wire = cls(journal, blobs, options or WireOptions())
        try:
            await wire._greet()
        except BaseException:
            await wire.aclose()
            raise
        return wire

    @property
    def partitions(self) -> tuple[str, ...]:
        """The hash tags of all partitions."""
        return keys.all_partitions(self.options.partitions)

    def blocking(self) -> redis.Redis:
        """A client of the journal for one blocked read at a time. Closed by `aclose`."""
        client = connections.blocking(self.journal)
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

    async def agree(self) -> None:
        """Use the journal with as many partitions as whoever came first, or be the first.

        With another number, turns of some would lie where others never look. Raises SettingsError for that,
        UnavailableError.
        """
        await self._check_partitions([self.options.partitions])

    async def check_partitions(self) -> None:
        """Raise SettingsError where the journal is known to be used with another number of partitions."""
        await self._check_partitions([])

    async def _check_partitions(self, mine: Sequence[Argument]) -> None:
        known = await self.call("ledger_partitions", [PARTITIONS], mine)
        if known is not None and int(known) != self.options.partitions:
            raise SettingsError(
                f"the journal is used with {int(known)} partitions, not with {self.options.partitions}: say "
                f"{int(known)} by KIMIA_PARTITIONS, as elsewhere (to change it, stop all and delete {PARTITIONS})"
            )

    async def aclose(self) -> None:
        """Close all connections."""
        clients = {id(client): client for client in (*self._blocking, self.journal, self.blobs)}
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
            for script in scripts:  # not in a pipeline: on a cluster each goes to all primaries
                await self.journal.script_load(script_text(script)[0])


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
    flags = ["#!lua flags=allow-oom"] if script in FREEING else []
    body = "\n".join([*flags, *((folder / f"{name}.lua").read_text(encoding="utf-8") for name in ("prelude", script))])
    return body, hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
