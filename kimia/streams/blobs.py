"""Blobs: what can be computed again (continuous features, committed mels).

They live on a lease, and a missing one is no error.
"""

from __future__ import annotations

from collections.abc import Sequence

from kimia.streams.connections import reached
from kimia.streams.wire import Wire


class Blobs:
    """The blob store of a wire. Every call raises UnavailableError when it cannot be reached."""

    def __init__(self, wire: Wire) -> None:
        self._client = wire.blobs
        self._life = round(wire.options.blob_ttl * 1000)  # milliseconds

    async def put(self, key: str, data: bytes) -> None:
        """Store a blob for the length of a lease."""
        with reached("blob store"):
            await self._client.set(key, data, px=self._life)

    async def put_all(self, blobs: Sequence[tuple[str, bytes]]) -> None:
        """Store blobs, key and data of each, in one round trip."""
        with reached("blob store"):
            async with self._client.pipeline(transaction=False) as pipe:
                for key, data in blobs:
                    pipe.set(key, data, px=self._life)
                await pipe.execute()

    async def get(self, keys: Sequence[str]) -> list[bytes | None]:
        """The blobs in the order of the keys, None where one is missing; those found live for another lease."""
        with reached("blob store"):
            async with self._client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.getex(key, px=self._life)
                return await pipe.execute()

    async def drop(self, keys: Sequence[str]) -> None:
        """Remove blobs that nobody needs any more."""
        with reached("blob store"):
            await self._client.unlink(*keys)

    async def renew(self, keys: Sequence[str]) -> list[str]:
        """Let blobs live for another lease; the keys of those that are missing."""
        with reached("blob store"):
            async with self._client.pipeline(transaction=False) as pipe:
                for key in keys:
                    pipe.pexpire(key, self._life)
                found = await pipe.execute()
        return [key for key, there in zip(keys, found, strict=True) if not there]
