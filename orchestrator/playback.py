"""How far the caller has heard the running turn, on its way to the workers: the newest position, and not too often."""

from __future__ import annotations

import asyncio

from kimia.errors import UnavailableError
from kimia.streams.journal import Journal, Playback
from kimia.streams.patience import end

PAUSE = 0.5  # seconds between two writes of one call, however often its client speaks; the lead is seconds long


class PlaybackNotes:
    """Writes positions to the journal beside the call. A newer one replaces what could not be written yet."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._latest: tuple[str, float, float] | None = None  # turn, seconds heard, and when (the loop's clock)
        self._writing: asyncio.Task[None] | None = None

    def add(self, turn_id: str, heard: float, age: float) -> None:
        """So many seconds of a turn had been heard, `age` seconds ago."""
        loop = asyncio.get_running_loop()
        self._latest = turn_id, heard, loop.time() - age
        if self._writing is None or self._writing.done():
            self._writing = loop.create_task(self._write())

    async def aclose(self) -> None:
        """Write no more: the workers go on in real time from the last position they know."""
        await end([] if self._writing is None else [self._writing])

    async def _write(self) -> None:
        """Write until there is nothing new. A journal that is away gets the position when it is back."""
        while self._latest is not None:
            latest = turn_id, heard, at = self._latest
            try:
                await self._journal.note_playback(turn_id, Playback(heard, asyncio.get_running_loop().time() - at))
            except UnavailableError:
                pass
            else:
                self._latest = None if self._latest is latest else self._latest
            await asyncio.sleep(PAUSE)
