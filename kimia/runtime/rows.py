"""The rows of one process: how many turns it computes at once, shared by the pipeline and by direct callers.

A turn that is ahead of its caller is parked: it keeps what it has computed, and its row goes to others until the turn
asks for one again. Whoever had a row comes first then, before those that wait for their first one.
"""

from __future__ import annotations

import asyncio
from collections import deque

__all__ = ["Row", "Rows"]

TURNS_PER_ROW = 2  # turns at most that a process holds for each row, since a parked one keeps its memory


class Rows:
    """A counted set of rows. Who waits is served in order of arrival, before anybody who only tries."""

    def __init__(self, count: int) -> None:
        if count < 1:
            raise ValueError(f"a process needs at least one row, got {count}")
        self.count = count
        self.used = 0
        self.parked = 0  # turns that had a row and will ask for one again
        self._returning: deque[asyncio.Future[None]] = deque()  # of those, who ask now
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> int:
        """Rows that a new turn may take."""
        return max(min(self.count, TURNS_PER_ROW * self.count - self.parked) - self.used, 0)

    @property
    def wanted(self) -> bool:
        """Whether a turn that was parked asks for a row and there is none."""
        return any(not future.done() for future in self._returning)

    def try_acquire(self, *, for_good: bool = False) -> bool:
        """Take a row if one is free; none is while somebody waits. `for_good`: one that no parked turn has left."""
        if not self.free or (for_good and self.used + self.parked >= self.count):
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
        """Give a row back: to a parked turn that asks, to who has waited longest, else to the free ones."""
        if not self.used:
            raise RuntimeError("more rows were given back than taken")
        self.used -= 1
        self._hand_on()

    # ---- parking ----

    def park(self) -> None:
        """Give a row back for a while."""
        self.parked += 1
        self.release()

    async def unpark(self) -> None:
        """Take a row again, before everybody who has had none; cancelled, the turn stays parked."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._returning.append(turn)
        self._hand_on()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.park()
            raise

    def forget(self) -> None:
        """A parked turn has ended and needs no row any more."""
        self.parked -= 1
        self._hand_on()

    def _hand_on(self) -> None:
        """Give rows that nobody holds to those who wait."""
        while self.used < self.count and (turn := _next(self._returning)):
            self.used += 1
            self.parked -= 1
            turn.set_result(None)
        while self.free and (turn := _next(self._waiting)):
            self.used += 1
            turn.set_result(None)


def _next(waiting: deque[asyncio.Future[None]]) -> asyncio.Future[None] | None:
    """Take out who has waited longest and still waits."""
    while waiting:
        turn = waiting.popleft()
        if not turn.done():
            return turn
    return None


class Row:
    """The row of one turn, which has been acquired for it: held, parked, in the end given back."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._held: bool | None = True  # None: given back

    @property
    def wanted(self) -> bool:
        """Whether a parked turn asks for a row and there is none."""
        return self._rows.wanted

    def park(self) -> None:
        """Let others compute; the turn is kept."""
        if self._held:
            self._held = False
            self._rows.park()

    async def unpark(self) -> None:
        """Have a row again, as soon as one is free."""
        if self._held is False:
            await self._rows.unpark()
            self._held = True

    def leave(self) -> None:
        """The turn has ended here. Once more changes nothing."""
        if self._held is None:
            return
        held, self._held = self._held, None
        if held:
            self._rows.release()
        else:
            self._rows.forget()
