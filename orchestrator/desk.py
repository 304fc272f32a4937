"""What the calls of one process share: turns, admission, limits, and what is to be done after a call has ended."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeVar

from kimia.errors import KimiaError, NotFoundError
from kimia.runtime.logs import get_logger
from kimia.v1.kimi_audio_pb2 import TurnEvent
from orchestrator.admission import Admission
from orchestrator.following import Following
from orchestrator.outcome import count, last_event
from orchestrator.records import patiently
from orchestrator.turn import Turns

T = TypeVar("T")

log = get_logger()


@dataclass(frozen=True)
class Limits:
    """What one call may ask for."""

    turn_seconds: float = 120.0  # for a turn whose caller sets no deadline
    clip_bytes: int = 32 << 20  # of one stretch of sound
    turn_bytes: int = 64 << 20  # of all sound that is not committed
    idle_seconds: float = 300.0  # without a message and a turn, after which a call is ended


class Desk:
    """One process's turns and calls."""

    def __init__(self, turns: Turns, admission: Admission, limits: Limits) -> None:
        self.turns = turns
        self.admission = admission
        self.limits = limits
        self._followers: Counter[str] = Counter()
        self._background: set[asyncio.Task[Any]] = set()
        self._closing = asyncio.Event()
        admission.journal_is_new = turns.copies.is_new

    async def aclose(self) -> None:
        """Do what is still to be done, at once."""
        self._closing.set()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.turns.aclose()

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of something that is done to its end even when the call that asks for it is cut off."""
        return await asyncio.shield(self.begin(work))

    def begin(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Something that is done to its end. Shield it where it is awaited."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: asyncio.Task[Any]) -> None:
        """What fails is raised where it is awaited; a call that was cut off awaits nothing any more."""
        self._background.discard(task)
        if not task.cancelled():
            task.exception()

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something after the call that asks for it, whose task may be cancelled."""
        task = asyncio.create_task(_logged(work))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def told(self, following: Following) -> AsyncGenerator[TurnEvent]:
        """All events of a turn that its client lacks; the turn is settled before the last one is given."""
        turn_id = following.turn.id
        self._followers[turn_id] += 1
        try:
            with following:
                async with aclosing(following.events()) as events:
                    async for event in events:
                        yield event
                head = await following.feed.ended()
            settled = await self.turns.settle(head, tokens=following.tokens if following.whole else None)
            following.reports.update(settled.reports)
            if following.position.at_start:
                count(following, head)
            elif head.state == "done":
                following.check_position()
            yield last_event(following, head, settled.codes)
        finally:
            self._followers[turn_id] -= 1
            if not self._followers[turn_id]:
                del self._followers[turn_id]  # a Counter keeps what has come to nought

    async def drop(self, session_id: str) -> None:
        """Delete a conversation of one request, and give its rows back."""
        try:
            await self.turns.delete(session_id)
        except NotFoundError:
            log.debug("deleted before", session=session_id)
        await self.admission.ledger.release(session_id)

    async def linger(self, session_id: str, turn_id: str) -> None:
        """Keep a conversation of one request for the resume window, then drop it unless somebody else reads it."""
        try:
            async with asyncio.timeout(self.admission.window):
                await self._closing.wait()
        except TimeoutError:
            log.debug("not resumed", session=session_id)
        head = await patiently(lambda: self.turns.journal.head(turn_id))
        elsewhere = head.reader != self.turns.inbox.owner
        leaving = self._closing.is_set() and not head.over  # another process may be asked for it
        if not (self._followers[turn_id] or elsewhere or leaving):
            await self.drop(session_id)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """What fails after a call is over has nobody to be told but the log; keys expire in any case."""
    try:
        await work
    except NotFoundError:
        return
    except KimiaError as error:
        log.warning("clean-up failed", error=str(error))
