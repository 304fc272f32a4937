"""One Converse call: drives the state machine of `orchestrator.session`, carries its actions out, tells what comes.

Messages are taken one at a time, each with all its actions, under one lock; the end of a turn is settled under the same
lock. What goes to the client passes one bounded queue, so a slow client slows its own turn's reader and nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from kimia.errors import DeadlineError, KimiaError, NotFoundError, RequestError, UnavailableError
from kimia.runtime.logs import get_logger
from kimia.stage import DETOKENIZER, LLM, TOKENIZER, StageKind
from kimia.streams import keys
from kimia.streams.journal import Head
from kimia.streams.patience import end
from kimia.v1.audio_pb2 import AudioFormat
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT, Message, TurnOptions
from kimia.v1.kimi_audio_pb2 import CallConfig, ConverseRequest, ConverseResponse, TurnEvent
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import Caller, Chunk, InputAudio, Turn
from orchestrator.admission import Reservation
from orchestrator.checks import check_sound_bytes, checked_caller
from orchestrator.copies import TurnCopy
from orchestrator.desk import Desk
from orchestrator.early import EarlySound
from orchestrator.following import Following
from orchestrator.gathering import gathered
from orchestrator.memory import sourced
from orchestrator.outcome import cancelled_event, count, last_event
from orchestrator.playback import PlaybackNotes
from orchestrator.records import patiently
from orchestrator.session import (
    Action,
    AppendAudio,
    CancelTurn,
    ClearInput,
    CutAnswer,
    Fail,
    FollowTurn,
    NotePlayback,
    OpenSession,
    OpenTurn,
    Reply,
    SayTurn,
    Session,
    SessionView,
    SubmitTurn,
)
from orchestrator.sound import output_format
from orchestrator.turn import Turns, Wanted, piece_of_sound, separated

QUEUED_RESPONSES = 16  # between the readers of a turn and a slow client

log = get_logger()


@dataclass(frozen=True)
class Collected:
    """The caller's input that the journal holds for the next turn."""

    messages: tuple[Message, ...] = ()
    next_audio_index: int = 0
    written: tuple[Chunk, ...] = ()  # the input log

    @property
    def pieces(self) -> list[tuple[int, int]]:
        """Clip and bytes of each piece of sound."""
        return [(chunk.input.clip, len(chunk.input.data)) for chunk in self.written if chunk.input.data]


class Call:
    """One connection of a session. `responses` is all there is to run."""

    def __init__(self, desk: Desk, seconds: Callable[[], float]) -> None:
        """`seconds`: what a turn that begins now may take."""
        self._desk = desk
        self._seconds = seconds
        self._turns = desk.turns
        self._admission = desk.admission
        self._limits = desk.limits
        self._machine = Session(desk.limits.clip_bytes, desk.limits.turn_bytes)
        self._lock = asyncio.Lock()
        self._queue: asyncio.Queue[ConverseResponse | Exception | None] = asyncio.Queue(QUEUED_RESPONSES)
        self._followed: dict[str, tuple[Following, asyncio.Task[None]]] = {}
        self._playback = PlaybackNotes(desk.turns.journal)
        self._early = EarlySound(desk.turns.early)
        self._input_format = AudioFormat()
        self._reservation: Reservation | None = None
        self._caller = Caller()
        self._session_id = ""
        self._input: TurnCopy | None = None
        self._next_chunk = 0
        self._unstored: list[Chunk] = []  # sound that was taken and not written yet
        self._unstored_index = 0  # of the last piece of it
        self._over = False  # the client has said all, or something that ends the call: it does not come back to it
        self._retiring = False
        self._leaving: asyncio.Task[None] | None = None
        self._idle_at = 0.0  # the loop's clock: when the call ends unless something happens
        self._touch()

    def retire(self) -> None:
        """End the call as soon as no turn is told: its client comes back, to another process."""
        self._retiring = True
        self._leave_if_idle()

    def _leave_if_idle(self) -> None:
        if self._retiring and not self._followed and not self._lock.locked() and self._leaving is None:
            error = UnavailableError("this process is stopping; connect again, nothing is lost", retry_after=0.0)
            self._leaving = asyncio.create_task(self._queue.put(error))

    async def responses(self, requests: AsyncIterator[ConverseRequest]) -> AsyncGenerator[ConverseResponse]:
        """Everything that the client is told, until it has said all and every turn has ended. Raises KimiaError."""
        tasks = [asyncio.create_task(self._read(requests)), asyncio.create_task(self._watch())]
        try:
            while (item := await self._queue.get()) is not None:
                if isinstance(item, Exception):
                    self._over = self._is_final(item)
                    raise item
                yield item
            self._over = True
        finally:
            await self._hang_up(tasks)

    def _is_final(self, error: Exception) -> bool:
        """Whether nothing of the call goes on after an error: its rows are free at once."""
        if not isinstance(error, KimiaError) or isinstance(error, UnavailableError):
            return False
        return isinstance(error, NotFoundError) or not self._machine.running

    async def _hang_up(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """The running turn goes on, and what was collected is kept; the client may come back."""
        await end(tasks)  # first, since one of them begins to follow turns
        for turn_id in tuple(self._followed):
            await self._stop_following(turn_id)
        await end([*filter(None, [self._leaving])])
        await self._playback.aclose()
        if self._reservation is None:
            return
        if self._over:
            await self._reservation.release()
        else:
            self._reservation.leave()
            await self._note_heard()

    async def _note_heard(self) -> None:
        """Whoever goes on with the session knows how far the caller has heard."""
        heard, running = self._machine.heard_ms, self._machine.running
        if heard is None:
            return

        def edit(record: SessionRecord) -> None:
            if record.running_turn_id == running:
                record.heard_ms = max(record.heard_ms, heard)

        try:
            await self._turns.records.change(self._session_id, edit)
        except NotFoundError:
            log.info("session deleted during its call", session=self._session_id)

    # ---- both directions ----

    async def _read(self, requests: AsyncIterator[ConverseRequest]) -> None:
        """The session's edge: what goes wrong here ends the call."""
        try:
            async with aclosing(gathered(requests)) as batches:
                async for batch in batches:
                    async with self._lock:
                        await self._take(batch)
                    self._touch()
                    self._leave_if_idle()
            while self._followed:
                await asyncio.wait([task for _, task in self._followed.values()])
            await self._queue.put(None)
        except Exception as error:  # noqa: BLE001 - raised again where the responses are made
            await self._queue.put(error)

    def _touch(self) -> None:
        """Something has happened."""
        self._idle_at = asyncio.get_running_loop().time() + self._limits.idle_seconds

    async def _watch(self) -> None:
        """End a call in which nothing happens, so that others get its rows. The session's edge, as `_read` is."""
        try:
            while (left := self._idle_at - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(left)
                async with self._lock:
                    if self._machine.running:
                        self._touch()
                    await self._refresh()
            seconds = self._limits.idle_seconds
            rule = f"nothing was said or answered for {seconds:g} s; call again with the same session to go on"
            await self._queue.put(DeadlineError(rule, reason="IDLE"))
        except Exception as error:  # noqa: BLE001 - raised again where the responses are made
            await self._queue.put(error)

    async def _take(self, batch: Sequence[ConverseRequest]) -> None:
        """Requests in their order; sound is stored with what follows it, up to anything else."""
        for request in batch:
            if not request.HasField("audio"):
                await self._store()
            if request.WhichOneof("content") in ("commit", "say", "cancel"):
                await self._refresh()
            await self._perform(self._machine.receive(request))
        await self._store()

    async def _perform(self, actions: Sequence[Action]) -> None:
        for action in actions:
            if not isinstance(action, AppendAudio):
                await self._store()
            await self._perform(await self._outcome(action))

    async def _outcome(self, action: Action) -> list[Action]:
        """Carry one action out; what the machine says to what came of it."""
        match action:
            case Reply(response=response):
                await self._queue.put(response)
            case Fail(error=error):
                raise error
            case OpenSession(config=config):
                return self._machine.opened(await self._open_session(config))
            case OpenTurn():
                self._input, self._next_chunk = await self._turns.open(self._session_id, self._caller), 0
                return self._machine.turn_opened()
            case AppendAudio():
                await self._append(action)
            case SubmitTurn() | SayTurn():
                return await self._begin_turn(action)
            case CancelTurn():
                return await self._cancel(action)
            case _:
                await self._other(action)
        return []

    async def _other(self, action: Action) -> None:
        match action:
            case ClearInput():
                await self._clear(action)
            case CutAnswer(turn_id=turn_id, heard_ms=heard_ms):
                left = await self._turns.cut(turn_id, heard_ms)
                await self._tell(cancelled_event(turn_id, left))
            case NotePlayback(turn_id=turn_id, heard_ms=heard_ms, age_ms=age_ms):
                self._playback.add(turn_id, heard_ms / 1000, age_ms / 1000)
            case FollowTurn(turn_id=turn_id):
                await self._follow(turn_id)

    async def _tell(self, event: TurnEvent) -> None:
        await self._queue.put(ConverseResponse(event=event))

    # ---- the session ----

    async def _open_session(self, config: CallConfig) -> SessionView:
        self._caller = checked_caller(config.caller, "config.caller")
        self._input_format = config.input_format
        self._session_id = keys.check_session_id(config.session_id or keys.new_session_id(), "config.session_id")
        check_sound_bytes(config.messages, self._limits.clip_bytes, self._limits.turn_bytes, "config.messages")
        route = route_of_call(config.options)
        await self._turns.records.check_tenant(self._session_id, self._caller.tenant)
        self._reservation = await self._admission.admit(self._session_id, self._caller.tenant, route)
        begun = await self._turns.records.begin(self._session_id, self._caller)
        record = begun.record
        if config.messages and not begun.new:
            rule = f"belong to a new session; {self._session_id} has its own conversation"
            raise RequestError(rule, field="config.messages")
        if config.messages:
            await self._store_history(config.messages)
        else:
            record = await self._turns.refreshed(self._session_id, self._caller.tenant)
        await self._turns.records.change(self._session_id, lambda fresh: _configure(fresh, config))
        return await self._view(record, output_format(config.options.output_format))

    async def _store_history(self, messages: Sequence[Message]) -> None:
        """What was said before the call; its sound lies in the input log of a turn that is never answered."""
        opened = await self._turns.open(self._session_id, self._caller)
        history, chunks = separated(opened.turn_id, messages)
        await self._turns.append(opened, chunks)

        def edit(record: SessionRecord) -> None:
            if not record.messages:
                record.messages.extend(history)

        await self._turns.records.change(self._session_id, edit)

    async def _view(self, record: SessionRecord, form: AudioFormat) -> SessionView:
        collected = await self._reopened(record)
        return SessionView(
            session_id=self._session_id,
            output_format=form,
            next_audio_index=collected.next_audio_index,
            open_turn_id=self._input.turn_id if self._input else "",
            collected=collected.messages,
            collected_pieces=collected.pieces,
            running_turn_id=record.running_turn_id,
            heard_ms=record.heard_ms or None,
            last_turn_id=record.turn_ids[-1] if record.turn_ids and not record.running_turn_id else "",
            keys=dict(record.turn_of_key),
        )

    async def _reopened(self, record: SessionRecord) -> Collected:
        """Take over the turn that collects, if there is one."""
        collected = await read_collected(self._turns, record)
        if not record.open_turn_id:
            return collected
        try:
            self._input = await self._turns.reopen(record.open_turn_id, record.caller, collected.written)
        except NotFoundError:  # it has expired: its sound is lost, its indices are not used again
            return Collected(next_audio_index=collected.next_audio_index)
        self._next_chunk = len(collected.written)
        return collected

    # ---- input ----

    async def _append(self, action: AppendAudio) -> None:
        if self._input is None:
            raise RuntimeError("there is no open turn")
        if action.collected is not None:
            await self._remember_collected(self._input.turn_id, action)
        if action.ends is not None:
            self._unstored.append(Chunk(index=self._next_chunk, input=InputAudio(clip=action.ends, clip_end=True)))
            self._next_chunk += 1
        self._unstored.append(piece_of_sound(self._next_chunk, action.clip, action.data))
        self._next_chunk += 1
        self._unstored_index = action.index

    async def _store(self) -> None:
        """Write the sound that was appended, and tell the caller that it will not be lost."""
        chunks, self._unstored = self._unstored, []
        if chunks and self._input is not None:
            await self._turns.append(self._input, chunks)
            await self._early.stored(self._input, self._input_format)
            await self._perform(self._machine.stored(self._unstored_index))

    async def _remember_collected(self, turn_id: str, action: AppendAudio) -> None:
        collected = sourced(turn_id, action.collected or ())

        def edit(record: SessionRecord) -> None:
            if record.open_turn_id != turn_id:
                record.open_turn_id, record.next_audio_index = turn_id, action.index
            del record.pending[:]
            record.pending.extend(collected)

        await self._turns.records.change(self._session_id, edit)

    async def _clear(self, action: ClearInput) -> None:
        opened, self._input = self._input, None
        await self._turns.records.change(
            self._session_id, lambda record: _take_collected(record, action.next_audio_index)
        )
        if opened is not None:
            await self._turns.cancel(opened.turn_id)

    # ---- turns ----

    async def _begin_turn(self, action: SubmitTurn | SayTurn) -> list[Action]:
        opened = self._input if isinstance(action, SubmitTurn) else None
        opened = opened or await self._turns.open(self._session_id, self._caller)
        wanted = self._wanted(action, opened.turn_id)
        if isinstance(action, SubmitTurn):
            self._input = None
            index, last = action.next_audio_index, []
            if action.ends is not None:
                end = InputAudio(clip=action.ends, clip_end=True)
                last = [Chunk(index=self._next_chunk, final=True, input=end)]
            start = self._turns.start(opened, wanted, lambda record: _take_collected(record, index), last)
        else:
            start = self._turns.start(opened, wanted)
        started = await self._desk.finish(start)
        turn_id = started if isinstance(started, str) else started.id
        told = self._machine.submitted(turn_id)
        await self._follow(turn_id, started)
        return told

    def _wanted(self, action: SubmitTurn | SayTurn, turn_id: str) -> Wanted:
        return Wanted(
            caller=self._caller,
            asked=sourced(turn_id, action.collected) if isinstance(action, SubmitTurn) else (),
            options=action.options,
            seconds=self._seconds(),
            say=action.text if isinstance(action, SayTurn) else None,
            key=action.idempotency_key,
        )

    async def _follow(self, turn_id: str, started: Turn | str = "") -> None:
        """Tell a turn from its beginning, unless it is being told. `started`: what `Turns.start` gave just now."""
        if turn_id not in self._followed:
            following = await self._turns.follow_started(started or turn_id, self._caller.tenant)
            self._followed[turn_id] = following, asyncio.create_task(self._told(following))

    async def _told(self, following: Following) -> None:
        """One turn's events up to its end. The session's edge, as `_read` is."""
        turn_id = following.turn.id
        try:
            with following:
                async with aclosing(following.events()) as events:
                    async for event in events:
                        await self._tell(event)
                head = await following.feed.ended()
                async with self._lock:
                    await self._end(following, head)
        except Exception as error:  # noqa: BLE001 - raised again where the responses are made
            await self._queue.put(error)
        finally:
            self._followed.pop(turn_id, None)
            self._touch()
            self._leave_if_idle()

    async def _end(self, following: Following, head: Head) -> None:
        settled = await self._turns.settle(head, tokens=following.tokens if following.whole else None)
        following.reports.update(settled.reports)
        if head.turn.id == self._machine.running:
            count(following, head)
        await self._perform(self._machine.ended(head.turn.id))
        await self._tell(last_event(following, head, settled.codes))

    async def _cancel(self, action: CancelTurn) -> list[Action]:
        """Barge-in: the rows are freed first, then the answer is cut to what was heard."""
        turn_id, heard = action.turn_id, action.heard_ms
        following = await self._stop_following(turn_id)
        if following is not None:
            heard = following.sent_ms if heard is None else min(heard, following.sent_ms)
        settled = await self._desk.finish(self._turns.stop(turn_id, heard))
        head = settled.head
        if following is not None:
            count(following, head)
        if head.state == "error":
            await self._tell(TurnEvent(turn_id=turn_id, failed=head.failure))
        else:
            await self._tell(cancelled_event(turn_id, settled.codes))
        return self._machine.ended(turn_id)

    async def _stop_following(self, turn_id: str) -> Following | None:
        """Tell nothing more of a turn; how far it was told, if it was."""
        if turn_id not in self._followed:
            return None
        following, task = self._followed[turn_id]
        await end([task])
        following.feed.close()  # a task that is cancelled before it began closes nothing
        self._followed.pop(turn_id, None)
        return following

    async def _refresh(self) -> None:
        """A turn of an earlier call is not followed here: see whether it has ended, before that matters."""
        running = self._machine.running
        if not running or running in self._followed:
            return
        record = await self._turns.refreshed(self._session_id, self._caller.tenant)
        if record.running_turn_id != running:
            self._machine.ended(running)


# ---- parts ------------------------------------------------------------------------------------------------------


def route_of_call(options: TurnOptions) -> tuple[StageKind, ...]:
    """The stages that turns of a call may pass."""
    return (TOKENIZER, LLM) if options.output_type == OUTPUT_TYPE_TEXT else (TOKENIZER, LLM, DETOKENIZER)


async def read_collected(turns: Turns, record: SessionRecord) -> Collected:
    """What a session has collected for its next turn, as the input log says it.

    A clip of which nothing was stored, and text after the last sound, were never confirmed to the client.
    """
    log_ = []
    if record.open_turn_id:
        log_ = await patiently(lambda: turns.journal.read(record.open_turn_id, "input"))
    stored = {chunk.input.clip for chunk in log_ if chunk.input.data}
    messages = [
        message for message in record.pending if not message.HasField("audio") or message.audio.number in stored
    ]
    while messages and not messages[-1].HasField("audio"):
        messages.pop()
    return Collected(
        messages=tuple(messages),
        next_audio_index=record.next_audio_index + sum(bool(chunk.input.data) for chunk in log_),
        written=tuple(log_),
    )


def _configure(record: SessionRecord, config: CallConfig) -> None:
    record.input_format.CopyFrom(config.input_format)
    record.options.CopyFrom(config.options)


def _take_collected(record: SessionRecord, next_audio_index: int) -> None:
    """What was collected belongs to a turn now, or is given up."""
    record.open_turn_id = ""
    record.next_audio_index = next_audio_index
    del record.pending[:]
