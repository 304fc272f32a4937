"""The rows of one process: how many turns it computes at once, shared by the pipeline and by direct callers."""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Rows"]


class Rows:
    """A counted set of rows. Who waits is served in order of arrival, before anybody who only tries."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a process needs at least one row, got {count}")
        self.count = count
        self.used = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> int:
        """Rows that nobody holds."""
        return self.count - self.used

    def try_acquire(self) -> bool:
        """Take a row if one is free; none is while somebody waits."""
        if not self.free:
            return False
        self.used += 1
        return True

    async def acquire(self) -> None:
        """Take a row, waiting for one if need be."""
        if self.try_acquire():
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the row had been handed over already
                self.release()
            raise

    def release(self) -> None:
        """Give a row back: to who has waited longest, else to the free ones."""
        if not self.used:
            raise RuntimeError("more rows were given back than taken")
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)  # the row stays used: it changes hands
                return
        self.used -= 1
