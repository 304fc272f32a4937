"""Sound that can be encoded while its caller still speaks: told to one of the tokenizers, at most once.

An entry is a turn with the one message whose clip has a finished segment. It is no job: nobody claims it, it moves no
turn on, and one that is lost costs the time that it would have saved.
"""

from __future__ import annotations

import asyncio
from typing import Any

import redis.asyncio as redis

from kimia.stage import TOKENIZER
from kimia.streams import keys
from kimia.streams.connections import reached
from kimia.streams.journal import milliseconds
from kimia.streams.patience import end
from kimia.streams.wire import Wire
from kimia.v1.turn_pb2 import Turn

MOST = 1000  # entries of a partition that wait; the oldest go first, since their turns are submitted first
BLOCK = 1.0  # seconds of one blocked read


class Early:
    """The entries of all partitions. Every call may raise UnavailableError."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self._client: redis.Redis | None = None
        self._reads: dict[str, asyncio.Task[bytes]] = {}

    async def offer(self, turn: Turn) -> None:
        """Tell of a clip of an open turn: id, caller and a message of it are all that counts."""
        name = keys.early(keys.partition_of(turn.session_id, self._wire.options.partitions), TOKENIZER.name)
        with reached("journal"):
            async with self._wire.journal.pipeline(transaction=False) as pipe:
                pipe.rpush(name, turn.SerializeToString())
                pipe.ltrim(name, -MOST, -1)
                pipe.pexpire(name, milliseconds(self._wire.options.turn_ttl))
                await pipe.execute()

    async def take(self, timeout: float) -> Turn | None:
        """The next entry of any partition, None when `timeout` seconds have passed. For one caller at a time."""
        self._client = self._client or self._wire.blocking()
        for p in self._wire.partitions:
            if p not in self._reads:
                self._reads[p] = asyncio.create_task(self._next(self._client, keys.early(p, TOKENIZER.name)))
        await asyncio.wait(self._reads.values(), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        found = next((p for p, read in self._reads.items() if read.done()), None)
        if found is None:
            return None
        with reached("journal"):
            return Turn.FromString(self._reads.pop(found).result())

    async def aclose(self) -> None:
        """Stop reading."""
        await end(self._reads.values())

    async def _next(self, client: redis.Redis, name: str) -> bytes:
        found: Any = None
        while not found:
            found = await client.blpop([name], timeout=BLOCK)
        entry: bytes = found[1]
        return entry
