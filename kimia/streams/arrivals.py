"""Waiting for what comes behind the ends of streams, in any partition."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, Final

import redis.asyncio as redis

from kimia.streams.patience import end

BLOCK: Final = 1000  # milliseconds of one blocked read


class Arrivals:
    """One blocked read for each partition, since a command of a cluster reads one slot.

    A read lasts until something comes, however often that is waited for, so a job in one partition costs no connection
    of the others.
    """

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self._reads: dict[str, asyncio.Task[None]] = {}

    async def wait(self, ends: Mapping[str, Mapping[str, str]], timeout: float) -> None:
        """Until an entry has come behind the end of a stream, or `timeout` seconds have passed.

        `ends`: partition -> stream -> id. Raises what reading raises.
        """
        for p, streams in ends.items():
            if p not in self._reads or self._reads[p].done():  # what it found is behind these ends, or before them
                self._reads[p] = asyncio.create_task(self._come(streams))
                self._reads[p].add_done_callback(_seen)
        done, _ = await asyncio.wait(self._reads.values(), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        for read in done:
            read.result()

    async def aclose(self) -> None:
        """Stop reading."""
        await end(self._reads.values())
        await self._client.aclose()

    async def _come(self, streams: Mapping[str, str]) -> None:
        ids: dict[Any, Any] = dict(streams)
        while not await self._client.xread(ids, count=1, block=BLOCK):
            pass


def _seen(read: asyncio.Task[None]) -> None:
    """A failure while nobody waits is none: the next read fails too, or all is well."""
    if not read.cancelled():
        read.exception()
