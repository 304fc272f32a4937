"""Committed mels of the detokenizer: into blobs while their chunks are published, and back for who goes on.

A blob holds the mel of one chunk, 16 kB per second of speech at the released sizes. It is named by its chunk before it
is stored, so that nobody waits for it: a name that leads nowhere costs a synthesis, never an error.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kimia.errors import UnavailableError
from kimia.runtime.logs import get_logger
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.patience import end
from kimia.v1.turn_pb2 import Chunk, Turn

log = get_logger()


class MelOutlet:
    """Takes the chunks of one turn. `place` is (partition, tenant) of its blobs, `published` what others have made."""

    def __init__(self, blobs: Blobs, turn: Turn, place: tuple[str, str], published: Sequence[Chunk] = ()) -> None:
        self._blobs = blobs
        self._turn_id = turn.id
        self._place = place
        self._named = [chunk.speech.mel_key for chunk in published if chunk.speech.mel_key]
        self._storing: list[asyncio.Task[None]] = []

    async def take(self, chunk: Chunk) -> Sequence[Chunk]:
        """The chunk to publish: its mel is being put away, and named instead."""
        if mel := chunk.speech.mel:
            key = keys.mel(*self._place, self._turn_id, chunk.index)
            self._named.append(key)
            self._storing.append(asyncio.create_task(self._store(key, mel)))
            chunk.speech.mel, chunk.speech.mel_key = b"", key
        return (chunk,)

    async def close(self, over: bool) -> None:
        """Wait until all is stored; where the turn is over nobody goes on with it, and its mels are dropped."""
        try:
            await asyncio.gather(*self._storing)
            if over and self._named:
                await self._blobs.drop(self._named)
        except UnavailableError as error:
            log.info("mels left to expire", error=str(error))
        finally:
            await end(self._storing)

    async def _store(self, key: str, mel: bytes) -> None:
        try:
            await self._blobs.put(key, mel)
        except UnavailableError as error:
            log.info("mel not stored", error=str(error))


async def with_mels(blobs: Blobs, published: Sequence[Chunk]) -> Sequence[Chunk]:
    """The same chunks with their mels in place, as far as they are still there."""
    filled = [Chunk() for _ in published]
    for copy, chunk in zip(filled, published, strict=True):
        copy.CopyFrom(chunk)
    named = [chunk.speech for chunk in filled if chunk.speech.mel_key]
    try:
        found = await blobs.get([speech.mel_key for speech in named]) if named else []
    except UnavailableError as error:
        log.warning("mels out of reach", error=str(error))
        return published
    for speech, mel in zip(named, found, strict=True):
        speech.mel = mel or b""
    log.info("mels found", chunks=len(published), mels=sum(map(bool, found)))
    return filled
