"""One request, one turn: Generate and Resume as streams of events."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, replace

from kimia.errors import KimiaError, NotFoundError
from kimia.stage import StageKind
from kimia.streams import keys
from kimia.v1.kimi_audio_pb2 import GenerateRequest, ResumeRequest, TurnEvent
from kimia.v1.turn_pb2 import Caller, Turn
from orchestrator.admission import Reservation
from orchestrator.checks import check_generate, check_sound_bytes, checked_caller
from orchestrator.copies import TurnCopy
from orchestrator.desk import Desk
from orchestrator.following import Position
from orchestrator.memory import route_for
from orchestrator.records import Seen
from orchestrator.turn import Turns, Wanted, separated


@dataclass(frozen=True)
class Ask:
    """A Generate request with its place: whose session it is, and whether that is of this request only."""

    request: GenerateRequest
    caller: Caller
    session_id: str
    one_off: bool
    seconds: float  # until the turn is dropped

    @classmethod
    def of(cls, request: GenerateRequest, seconds: float) -> Ask:
        """Check a request. Raises RequestError."""
        caller = checked_caller(request.caller)
        check_generate(request)
        one_off = not request.session_id
        session_id = request.session_id
        if one_off and request.idempotency_key:
            session_id = keys.session_id_for(caller.tenant, request.idempotency_key)
        elif one_off:
            session_id = keys.new_session_id()
        return cls(request, caller, keys.check_session_id(session_id), one_off, seconds)

    @property
    def resumable(self) -> bool:
        """Whether the client may come back: to its session, or with its key."""
        return not self.one_off or bool(self.request.idempotency_key)


# ---- Generate ---------------------------------------------------------------------------------------------------


async def generate(desk: Desk, ask: Ask) -> AsyncGenerator[TurnEvent]:
    """The turn of a request. Raises KimiaError.

    A client that vanishes may resume the turn; where it cannot, the turn is stopped and everything of it deleted.
    """
    check_sound_bytes(ask.request.messages, desk.limits.clip_bytes, desk.limits.turn_bytes, "messages")
    route = route_of_request(ask.request)
    if not ask.one_off:
        await desk.turns.records.check_tenant(ask.session_id, ask.caller.tenant)
    reservation = await desk.admission.admit(ask.session_id, ask.caller.tenant, route, secrets.token_hex(8))
    starting, finished = desk.begin(_started(desk.turns, ask)), False
    try:
        following = await desk.turns.follow_started(await asyncio.shield(starting), ask.caller.tenant)
        async with aclosing(desk.told(following)) as events:
            async for event in events:
                yield event
        finished = True
    finally:
        reservation.leave()
        desk.later(_afterwards(desk, ask, reservation, starting, finished=finished))


def route_of_request(request: GenerateRequest) -> tuple[StageKind, ...]:
    """The stages that the request's turn passes, whatever its session remembers; clips need no numbers yet."""
    stages = set(route_for((), request.options))
    stages.update(kind for message in request.messages for kind in route_for([message], request.options))
    return tuple(sorted(stages, key=lambda kind: kind.number))


async def _started(turns: Turns, ask: Ask) -> Turn | str:
    """The turn that answers the request: a new one, or the one that its idempotency key has started."""
    try:
        begun = await turns.records.begin(ask.session_id, ask.caller, one_off=ask.one_off, unheard=ask.one_off)
    except NotFoundError:
        if not ask.one_off:
            raise
        # An earlier turn of this key was told to its end and deleted: the request is a new one.
        ask = replace(ask, session_id=keys.new_session_id())
        begun = await turns.records.begin(ask.session_id, ask.caller, one_off=True)
    key = ask.request.idempotency_key
    if key and begun.record.turn_of_key.get(key):
        return begun.record.turn_of_key[key]
    opened = await turns.open(ask.session_id, ask.caller)
    try:
        return await _submitted(turns, ask, opened, begun)
    except KimiaError:
        await turns.cancel(opened.turn_id)
        raise


async def _submitted(turns: Turns, ask: Ask, opened: TurnCopy, begun: Seen) -> Turn | str:
    messages, chunks = separated(opened.turn_id, ask.request.messages)
    await turns.append(opened, chunks)
    request = ask.request
    wanted = Wanted(
        caller=ask.caller,
        asked=messages,
        options=request.options,
        seconds=ask.seconds,
        say=request.say if request.HasField("say") else None,
        key=request.idempotency_key,
        job_class=request.job_class,
    )
    started = await turns.start(opened, wanted, begun=begun)
    if isinstance(started, str):  # the same request, sent twice at once
        await turns.cancel(opened.turn_id)
    return started


def _id_of(started: Turn | str) -> str:
    return started if isinstance(started, str) else started.id


async def _afterwards(
    desk: Desk, ask: Ask, reservation: Reservation, starting: asyncio.Task[Turn | str], *, finished: bool
) -> None:
    await asyncio.wait([starting])  # a client that is quick to vanish leaves before its turn has begun
    turn_id = "" if starting.cancelled() or starting.exception() else _id_of(starting.result())
    session_id = keys.session_of(turn_id) if turn_id else ask.session_id
    if finished or not turn_id:
        await reservation.release()
    if not ask.one_off:
        return
    if turn_id and ask.resumable:
        await desk.linger(session_id, turn_id)
    else:
        await desk.drop(session_id)


# ---- Resume -----------------------------------------------------------------------------------------------------


async def resume(desk: Desk, request: ResumeRequest) -> AsyncGenerator[TurnEvent]:
    """What the client lacks of a turn. Raises KimiaError."""
    caller = checked_caller(request.caller)
    session_id = keys.session_of(request.turn_id)
    position = Position(
        next_text=request.last_text_index + 1 if request.HasField("last_text_index") else 0,
        next_audio=request.last_audio_index + 1 if request.HasField("last_audio_index") else 0,
    )
    following = await desk.turns.follow(request.turn_id, caller.tenant, position)
    reservation = desk.admission.resumed(session_id, caller.tenant)
    try:
        async with aclosing(desk.told(following)) as events:
            async for event in events:
                yield event
    finally:
        reservation.leave()
        desk.later(_after_resume(desk, session_id, request.turn_id, caller.tenant))


async def _after_resume(desk: Desk, session_id: str, turn_id: str, tenant: str) -> None:
    record = await desk.turns.records.load(session_id, tenant)
    if record.one_off:
        await desk.linger(session_id, turn_id)
