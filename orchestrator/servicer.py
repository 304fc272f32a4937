"""The public service: requests in, events out. Errors become statuses in `kimia.runtime.server`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.timestamp_pb2 import Timestamp

from kimia.errors import UnavailableError
from kimia.runtime.logs import get_logger
from kimia.runtime.metrics import SESSIONS
from kimia.v1.conversation_pb2 import Message
from kimia.v1.kimi_audio_pb2 import (
    ConverseRequest,
    ConverseResponse,
    DeleteSessionRequest,
    DeleteSessionResponse,
    GenerateRequest,
    GenerateResponse,
    GetSessionRequest,
    GetSessionResponse,
    ResumeRequest,
    ResumeResponse,
)
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioServicer
from kimia.v1.session_pb2 import SessionRecord
from orchestrator.call import Call, read_collected
from orchestrator.checks import checked_caller
from orchestrator.desk import Desk
from orchestrator.memory import clips_of
from orchestrator.single import Ask, generate, resume

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

RETRY_AFTER = 1.0  # seconds

log = get_logger()


class KimiAudio(KimiAudioServicer):
    """Generate, Converse, Resume, GetSession, DeleteSession; refuses while there is no desk."""

    def __init__(self) -> None:
        self._desk: Desk | None = None
        self._running = 0  # requests
        self._idle = asyncio.Event()
        self._idle.set()
        self._calls: set[Call] = set()

    def open(self, desk: Desk) -> None:
        """Serve from now on."""
        self._desk = desk

    async def drain(self, seconds: float) -> None:
        """Refuse what is new; return when every request has ended, or after so many seconds.

        Calls end as soon as no turn is told in them: their clients go on elsewhere, and so do turns that run longer.
        """
        self._desk = None
        for call in tuple(self._calls):
            call.retire()
        await self.ended(seconds)

    async def ended(self, seconds: float) -> None:
        """Wait for every request to end, but not longer."""
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            log.info("requests left", count=self._running)

    @contextmanager
    def _serving(self) -> Iterator[Desk]:
        if self._desk is None:
            rule = "this process is starting or stopping; try again, another one may answer"
            raise UnavailableError(rule, retry_after=RETRY_AFTER)
        self._running += 1
        self._idle.clear()
        SESSIONS.inc()
        try:
            yield self._desk
        finally:
            SESSIONS.dec()
            self._running -= 1
            if not self._running:
                self._idle.set()

    # ---- turns ----

    async def Generate(self, request: GenerateRequest, context: Context) -> AsyncGenerator[GenerateResponse]:
        """Answer one conversation, or the next turn of a session."""
        with self._serving() as desk:
            ask = Ask.of(request, _seconds(context, desk.limits.turn_seconds))
            async with aclosing(generate(desk, ask)) as events:
                async for event in events:
                    yield GenerateResponse(event=event)

    async def Converse(
        self,
        request_iterator: AsyncIterator[ConverseRequest],
        context: Context,
    ) -> AsyncGenerator[ConverseResponse]:
        """A call."""
        with self._serving() as desk:
            call = Call(desk, lambda: _seconds(context, desk.limits.turn_seconds))
            self._calls.add(call)
            try:
                async with aclosing(call.responses(request_iterator)) as responses:
                    async for response in responses:
                        yield response
            finally:
                self._calls.discard(call)

    async def Resume(self, request: ResumeRequest, context: Context) -> AsyncGenerator[ResumeResponse]:  # noqa: ARG002
        """Go on with a turn whose connection was lost."""
        with self._serving() as desk:
            async with aclosing(resume(desk, request)) as events:
                async for event in events:
                    yield ResumeResponse(event=event)

    # ---- sessions ----

    async def GetSession(self, request: GetSessionRequest, context: Context) -> GetSessionResponse:  # noqa: ARG002
        """What is remembered of a session."""
        with self._serving() as desk:
            tenant = checked_caller(request.caller).tenant
            record = await desk.turns.refreshed(request.session_id, tenant)
            collected = await read_collected(desk.turns, record)
            return GetSessionResponse(
                session_id=record.id,
                create_time=record.create_time,
                expire_time=await _expiry(desk, record.id),
                messages=_public(record),
                turn_ids=record.turn_ids,
                next_audio_index=collected.next_audio_index,
                running_turn_id=record.running_turn_id,
            )

    async def DeleteSession(self, request: DeleteSessionRequest, context: Context) -> DeleteSessionResponse:  # noqa: ARG002
        """Delete a session, its turns and the blobs it used, for good."""
        with self._serving() as desk:
            tenant = checked_caller(request.caller).tenant
            await desk.turns.records.load(request.session_id, tenant)
            await desk.turns.delete(request.session_id)
            await desk.admission.ledger.release(request.session_id)
            return DeleteSessionResponse()


def _seconds(context: Context, limit: float) -> float:
    """Time for a turn: what the client gives it, or the service."""
    left = context.time_remaining()
    return limit if left is None else min(left, limit)


async def _expiry(desk: Desk, session_id: str) -> Timestamp:
    """When a session is forgotten unless it goes on."""
    expiry = Timestamp()
    expiry.GetCurrentTime()
    expiry.FromMilliseconds(expiry.ToMilliseconds() + await desk.turns.records.life(session_id))
    return expiry


def _public(record: SessionRecord) -> list[Message]:
    """The conversation without what leads to stored sound and features."""
    messages = [*record.messages, *record.asked]
    for clip in clips_of(messages):
        for name in ("number", "source_turn", "source_number", "feature_keys"):
            clip.ClearField(name)
    return messages
