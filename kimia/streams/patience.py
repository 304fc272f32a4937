"""Waiting out a server that cannot be reached, and ending tasks that talk to one."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection
from typing import Any, TypeVar

from kimia.errors import UnavailableError

T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0  # seconds
CANCEL_AGAIN = 0.1  # seconds


def pause_after(failures: int) -> float:
    """Seconds to wait after so many failures in a row (1 or more); spread, so that not all come back at once."""
    longest: float = min(FIRST_PAUSE * 2 ** min(failures - 1, 10), LONGEST_PAUSE)
    return longest * random.uniform(0.5, 1.0)


class Patience:
    """Repeats calls until the server answers. `lost` hears of the first failure, `found` of the first answer after it.

    One object may serve many tasks: they share one outage.
    """

    def __init__(
        self, lost: Callable[[UnavailableError], None] | None = None, found: Callable[[], None] | None = None
    ) -> None:
        self.out = False
        self._lost = lost
        self._found = found

    async def reach(self, call: Callable[[], Awaitable[T]]) -> T:
        """The answer of a call that may be repeated, as soon as there is one."""
        failures = 0
        while True:
            try:
                answer = await call()
            except UnavailableError as error:
                failures += 1
                self._tell_lost(error)
                await asyncio.sleep(pause_after(failures))
            else:
                self._tell_found()
                return answer

    def _tell_lost(self, error: UnavailableError) -> None:
        if not self.out and self._lost:
            self._lost(error)
        self.out = True

    def _tell_found(self) -> None:
        if self.out and self._found:
            self._found()
        self.out = False


async def end(tasks: Collection[asyncio.Future[Any]]) -> None:
    """Cancel tasks and wait until they have ended; what they raise is dropped.

    One `cancel` is not enough: `asyncio.wait_for` of Python 3.11, through which redis-py reads and writes, swallows a
    cancellation that arrives together with the answer.
    """
    left = {task for task in tasks if not task.done()}
    while left:
        for task in left:
            task.cancel()
        left = (await asyncio.wait(left, timeout=CANCEL_AGAIN))[1]
    await asyncio.gather(*tasks, return_exceptions=True)
