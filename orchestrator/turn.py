"""Turns from a request to the session's memory: prepared, started, followed, settled.

A turn is prepared from what the session remembers and what is asked; from `start` on it goes on by itself, whoever
follows it. When it has ended it is settled: the conversation takes the question and the answer in. Any process may do
that, and does so when it next needs the session, so nothing is lost with the process that started the turn.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from kimia.errors import KimiaError, NotFoundError, StateError
from kimia.model.philox import SEED_LIMIT
from kimia.model.schedule import default_name
from kimia.runtime.logs import get_logger
from kimia.stage import LLM, TOKENIZER
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.early import Early
from kimia.streams.inbox import Inbox
from kimia.streams.journal import Head, Journal
from kimia.streams.patience import end
from kimia.streams.wire import Wire
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_BOTH, Message, TurnOptions
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import JOB_CLASS_INTERACTIVE, Caller, Chunk, InputAudio, JobClass, StageReport, Turn
from orchestrator.copies import APPENDED_AT_ONCE, Copies, TurnCopy
from orchestrator.following import Following, Position
from orchestrator.memory import (
    answer_of,
    clips_of,
    codes_heard,
    conversation,
    cut_answer,
    end_turn,
    feature_keys,
    forget_blobs,
    remember,
    route_for,
)
from orchestrator.records import Records, Seen, patiently
from orchestrator.session import LARGEST_PIECE
from orchestrator.sound import output_format

STARTING_SECONDS = 1.0  # after which a turn that was claimed and not submitted is submitted by whoever needs it
STARTING_PAUSE = 0.02  # seconds between two looks

log = get_logger()


@dataclass(frozen=True)
class Wanted:
    """A turn as a request asks for it."""

    caller: Caller
    asked: Sequence[Message]  # clips without data, their sources set
    options: TurnOptions
    seconds: float  # until the turn is dropped
    say: str | None = None
    key: str = ""  # of idempotency
    job_class: JobClass.ValueType = JOB_CLASS_INTERACTIVE


# ---- preparing --------------------------------------------------------------------------------------------------


def filled_options(options: TurnOptions) -> TurnOptions:
    """Options with what the control plane decides: output type, preset, format; sampling is left to the model."""
    filled = TurnOptions()
    filled.CopyFrom(options)
    filled.output_type = options.output_type or OUTPUT_TYPE_BOTH
    filled.preset = options.preset or default_name()
    filled.output_format.CopyFrom(output_format(options.output_format))
    return filled


def prepared(turn_id: str, history: Sequence[Message], wanted: Wanted) -> Turn:
    """The final spec of a turn. Raises ConversationError."""
    messages = conversation(turn_id, history, wanted.asked)
    options = filled_options(wanted.options)
    turn = Turn(
        id=turn_id,
        session_id=keys.session_of(turn_id),
        caller=wanted.caller,
        idempotency_key=wanted.key,
        seed=options.seed if options.HasField("seed") else secrets.randbelow(SEED_LIMIT),
        route=[kind.number for kind in route_for(messages, options)],
        job_class=wanted.job_class or JOB_CLASS_INTERACTIVE,
        messages=messages,
        say=wanted.say,
        options=options,
    )
    turn.deadline.FromMicroseconds(round((time.time() + wanted.seconds) * 1e6))
    return turn


def separated(turn_id: str, messages: Iterable[Message]) -> tuple[list[Message], list[Chunk]]:
    """Messages without their sound, and the input log of the turn that takes it."""
    copies: list[Message] = []
    chunks: list[Chunk] = []
    count = 0  # clips
    for message in messages:
        copy = Message()
        copy.CopyFrom(message)
        copies.append(copy)
        for clip in clips_of([copy]):
            data = clip.data
            clip.ClearField("data")
            if message.HasField("audio") or not clip.codes:
                clip.source_turn, clip.source_number = turn_id, count
                clip.number = count
                for start in range(0, len(data), LARGEST_PIECE):
                    end = start + LARGEST_PIECE
                    chunks.append(piece_of_sound(len(chunks), count, data[start:end], ends=end >= len(data)))
                count += 1
    if chunks:
        chunks[-1].final = True
    return copies, chunks


def piece_of_sound(index: int, clip: int, data: bytes, *, ends: bool = False) -> Chunk:
    """A chunk of an input log, filled in place: a message that is given to another one is copied with all its sound."""
    chunk = Chunk(index=index)
    chunk.input.clip, chunk.input.data, chunk.input.clip_end = clip, data, ends
    return chunk


# ---- running ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settled:
    """How a turn ended, and what is left of its answer."""

    head: Head
    reports: dict[str, StageReport]
    codes: int


class Turns:
    """Starts, follows and settles turns."""

    def __init__(self, wire: Wire, inbox: Inbox) -> None:
        self.journal = Journal(wire)
        self.inbox = inbox
        self.blobs = Blobs(wire)
        self.copies = Copies(self.journal, inbox)
        self.records = Records(wire, self.journal, self.copies)
        self.early = Early(wire)
        self._rescues: dict[str, asyncio.Task[None]] = {}

    async def aclose(self) -> None:
        """End what goes on beside the calls."""
        await end(list(self._rescues.values()))
        await self.copies.aclose()

    async def open(self, session_id: str, caller: Caller, turn_id: str = "") -> TurnCopy:
        """A new turn of the session, ready for input. Raises NotFoundError for a deleted session."""
        turn = Turn(id=turn_id or keys.new_turn_id(session_id), session_id=session_id, caller=caller)
        opened = await patiently(lambda: self.journal.open_turn(turn, self.inbox.owner))
        return self._kept(TurnCopy(turn, opened.token))

    async def reopen(self, turn_id: str, caller: Caller, written: Sequence[Chunk]) -> TurnCopy:
        """An open turn, taken over from whoever has written its input, which is given. Raises NotFoundError."""
        turn = Turn(id=turn_id, session_id=keys.session_of(turn_id), caller=caller)
        return self._kept(TurnCopy(turn, await self._take_reader(turn_id), list(written)))

    async def append(self, opened: TurnCopy, chunks: Sequence[Chunk]) -> None:
        """Write input. Raises StateError, TurnCancelledError, NotFoundError."""
        opened.add(chunks)
        for start in range(0, len(chunks), APPENDED_AT_ONCE):
            some = chunks[start : start + APPENDED_AT_ONCE]
            await self._written(opened, lambda some=some: self.journal.append_input(opened.turn_id, opened.token, some))  # type: ignore[misc]

    async def cancel(self, turn_id: str) -> None:
        """Stop a turn, if it has not ended."""
        copy = self.copies.turns.get(turn_id)
        if copy is not None:
            copy.cancelled = True
        await patiently(lambda: self.journal.cancel(turn_id))

    async def delete(self, session_id: str) -> None:
        """Delete a session for good. Raises NotFoundError."""
        self.copies.deleted(session_id)
        await patiently(lambda: self.journal.delete_session(session_id))

    def _kept(self, copy: TurnCopy) -> TurnCopy:
        self.copies.turns.keep(copy.turn_id, copy)
        return copy

    async def _written(self, opened: TurnCopy, write: Callable[[], Awaitable[object]]) -> None:
        """Write for a turn of which a copy is kept; what it lacks is written again before."""
        self._kept(opened)
        await patiently(lambda: self.copies.surely(write))

    async def _take_reader(self, turn_id: str) -> int:
        return await patiently(lambda: self.copies.surely(lambda: self.journal.take_reader(turn_id, self.inbox.owner)))

    async def _head(self, turn_id: str) -> Head:
        return await patiently(lambda: self.copies.surely(lambda: self.journal.head(turn_id)))

    async def start(
        self,
        opened: TurnCopy,
        wanted: Wanted,
        also: Callable[[SessionRecord], None] | None = None,
        last: Sequence[Chunk] = (),
        begun: Seen | None = None,
    ) -> Turn | str:
        """Let the turn be answered; the turn, or the id of the one that the same idempotency key has started.

        Its input must be complete but for `last`. `also` changes the session in the same write; `begun` is a session
        that has just begun. Raises StateError when its last turn is still running, ConversationError, NotFoundError.
        """
        session_id = keys.session_of(opened.turn_id)
        seen = begun if begun and begun.new else await self._refreshed(session_id, wanted.caller.tenant)
        missing = await patiently(lambda: self._missing_blobs(seen.record.messages))

        def claim(record: SessionRecord) -> Turn | str:
            known = record.turn_of_key.get(wanted.key, "") if wanted.key else ""
            if known and known != opened.turn_id:
                return known
            if not known and record.running_turn_id != opened.turn_id:
                check_idle(record)
                if also is not None:
                    also(record)
                forget_blobs(record.messages, missing)
                record.asked.extend(wanted.asked)
                record.running_turn_id = opened.turn_id
                record.turn_ids.append(opened.turn_id)
                record.starting.CopyFrom(prepared(opened.turn_id, record.messages, wanted))
                record.starting.ClearField("messages")
                if wanted.key:
                    record.turn_of_key[wanted.key] = opened.turn_id
            opened.worker = record.llm_worker
            return starting(record)

        turn = await self.records.change(session_id, claim, seen)
        if isinstance(turn, Turn):
            await self._submit(turn, opened, last)
        return turn

    async def _submit(self, turn: Turn, opened: TurnCopy, last: Sequence[Chunk]) -> None:
        try:
            await self.append(opened, last)
            await self._written(opened, lambda: self.journal.submit(turn, opened.token, opened.worker))
            opened.turn, opened.submitted = turn, True
        except KimiaError:
            if await self._is_anothers(opened):  # who has submitted it, or is about to
                return
            await self.records.change(turn.session_id, lambda record: _end(record, turn.id))
            raise
        log.info("turn submitted", turn=turn.id, stages=len(turn.route), messages=len(turn.messages))

    async def _is_anothers(self, opened: TurnCopy) -> bool:
        try:
            head = await self._head(opened.turn_id)
        except NotFoundError:
            return False
        return bool(head.submitted) or head.reader_token > opened.token

    async def _submitted(self, turn_id: str) -> Head:
        """The head of a turn once it is submitted: soon, or now, where its process died between two writes.

        Raises NotFoundError; StateError for a turn that is only collecting.
        """
        latest = time.monotonic() + STARTING_SECONDS
        while True:
            head = await self._head(turn_id)
            if head.state != "open":
                return head
            record, _ = await self.records.latest(keys.session_of(turn_id))
            if record.running_turn_id != turn_id:
                raise StateError(f"turn {turn_id} was never committed; commit it first", field="turn_id")
            if time.monotonic() > latest:
                with suppress(StateError):  # fenced off: somebody else is at it
                    await self._submit_again(record)
            await asyncio.sleep(STARTING_PAUSE)

    def _rescue(self, turn_id: str) -> None:
        """See to it that a turn that was claimed is submitted, beside whatever needs it."""
        if turn_id not in self._rescues:
            self._rescues[turn_id] = asyncio.create_task(self._rescued(turn_id))
            self._rescues[turn_id].add_done_callback(lambda _: self._rescues.pop(turn_id))

    async def _rescued(self, turn_id: str) -> None:
        try:
            await self._submitted(turn_id)
        except KimiaError as error:
            log.warning("turn not submitted", turn=turn_id, error=str(error))

    async def _submit_again(self, record: SessionRecord) -> None:
        """Do what is left of a start: the end of the input, the submission. Whoever else tries is fenced off."""
        turn = starting(record)
        written = await patiently(lambda: self.journal.read(turn.id, "input"))
        opened = await self.reopen(turn.id, record.caller, written)
        opened.worker = record.llm_worker
        last = []
        if written and not written[-1].final:
            clip_end = InputAudio(clip=written[-1].input.clip, clip_end=True)
            last = [Chunk(index=len(written), final=True, input=clip_end)]
        log.warning("turn submitted again", turn=turn.id)
        await self._submit(turn, opened, last)

    async def _missing_blobs(self, messages: Sequence[Message]) -> list[str]:
        names = feature_keys(messages)
        return await self.blobs.renew(names) if names else []

    # ---- following ----

    async def follow(self, turn_id: str, tenant: str, position: Position) -> Following:
        """Read a turn of this tenant, here from now on. Raises NotFoundError; StateError while it is not submitted."""
        feed = self.inbox.feed(turn_id)
        try:
            head = await self._head(turn_id)
            if head.turn.caller.tenant != tenant:
                raise NotFoundError(
                    f"no turn {turn_id}: it has expired or was deleted; open a new one", field="turn_id"
                )
            head = await self._submitted(turn_id)
            if head.reader != self.inbox.owner or self.copies.turns.get(turn_id) is None:
                await self._take_over(head)
            if not head.submitted:
                raise StateError(f"turn {turn_id} was never committed; commit it first", field="turn_id")
        except BaseException:
            feed.close()
            raise
        return Following(feed, head.turn, position)

    async def follow_started(self, started: Turn | str, tenant: str) -> Following:
        """Read what `start` gave from its beginning. Where this process has just submitted it, nothing is looked up."""
        if isinstance(started, str):
            return await self.follow(started, tenant, Position())
        copy = self.copies.turns.get(started.id)
        if copy is None or not copy.submitted:  # somebody else has done what was left of the start
            return await self.follow(started.id, tenant, Position())
        return Following(self.inbox.feed(started.id), copy.turn)

    async def _take_over(self, head: Head) -> None:
        """Read a submitted turn from now on, and keep what whoever has started it kept."""
        turn_id = head.turn.id
        written = await patiently(lambda: self.journal.read(turn_id, "input")) if head.next["input"] else []
        token = await self._take_reader(turn_id)
        self._kept(TurnCopy(head.turn, token, written, submitted=bool(head.submitted)))

    # ---- settling ----

    async def refreshed(self, session_id: str, tenant: str) -> SessionRecord:
        """The session, its last turn settled if it has ended. Raises NotFoundError."""
        return (await self._refreshed(session_id, tenant)).record

    async def _refreshed(self, session_id: str, tenant: str) -> Seen:
        seen = await self.records.seen(session_id, tenant)
        running = seen.record.running_turn_id
        if not running:
            return seen
        try:
            head = await self._head(running)
        except NotFoundError:
            await self.records.change(session_id, lambda fresh: _end(fresh, running))
            return await self.records.seen(session_id, tenant)
        if head.state == "open":
            self._rescue(head.turn.id)
        if not head.over:
            return seen
        await self.settle(head)
        return await self.records.seen(session_id, tenant)

    async def settle(self, head: Head, heard_ms: int | None = None, tokens: Sequence[Chunk] | None = None) -> Settled:
        """Take a turn that has ended into its session's conversation, once.

        `heard_ms` cuts the answer; without it a cancelled turn is cut to what its caller is known to have heard.
        `tokens` is the whole log, where it was read already.
        """
        turn_id = head.turn.id
        encoded: list[Chunk] = []
        if head.next["encoded"]:
            encoded = await patiently(lambda: self.journal.read(turn_id, "encoded"))
        steps = await patiently(lambda: self.journal.read(turn_id, "tokens")) if tokens is None else tokens
        codes = await self.records.change(
            head.turn.session_id, lambda record: _take_in(record, head, encoded, steps, heard_ms)
        )
        return Settled(head, _reports({TOKENIZER.name: encoded, LLM.name: steps}), codes)

    async def stop(self, turn_id: str, heard_ms: int | None) -> Settled:
        """Cancel a turn and settle it. Raises NotFoundError when it is gone."""
        await self.cancel(turn_id)
        return await self.settle(await self._head(turn_id), heard_ms)

    async def cut(self, turn_id: str, heard_ms: int | None) -> int:
        """Cut the answer of a turn that was settled to what was heard; the codes that are left of it."""
        answer = None
        if heard_ms is not None:
            tokens = await patiently(lambda: self.journal.read(turn_id, "tokens"))
            answer = answer_of(tokens, codes_heard(heard_ms))
        return await self.records.change(keys.session_of(turn_id), lambda record: cut_answer(record, turn_id, answer))


def check_idle(record: SessionRecord) -> None:
    """Raise StateError while a turn of the session is running."""
    if record.running_turn_id:
        raise StateError(
            f"turn {record.running_turn_id} of the session is being answered; cancel it first, or wait for it"
        )


def starting(record: SessionRecord) -> Turn:
    """The running turn of a session, whole."""
    turn = Turn()
    turn.CopyFrom(record.starting)
    turn.messages.extend(conversation(turn.id, record.messages, record.asked))
    return turn


def _end(record: SessionRecord, turn_id: str) -> None:
    if record.running_turn_id == turn_id:
        end_turn(record)


def _take_in(
    record: SessionRecord, head: Head, encoded: Sequence[Chunk], tokens: Sequence[Chunk], heard_ms: int | None
) -> int:
    """Settle a turn in its session's record; the codes of the answer that are remembered."""
    if head.state == "cancelled" and heard_ms is None:
        heard_ms = max(record.heard_ms, head.heard_ms)
    answer = answer_of(tokens, None if heard_ms is None else codes_heard(heard_ms))
    if record.running_turn_id != head.turn.id:  # somebody else has settled it
        return cut_answer(record, head.turn.id, None if heard_ms is None else answer)
    if head.state == "error":
        end_turn(record)
        return 0
    if LLM.name in head.stages:
        record.llm_worker = head.stages[LLM.name].consumer
    dropped = tokens[-1].report.dropped_messages if tokens else 0
    remember(record, head.turn, encoded, answer.message, dropped)
    return answer.codes


def _reports(logs: dict[str, Sequence[Chunk]]) -> dict[str, StageReport]:
    return {name: log[-1].report for name, log in logs.items() if log and log[-1].HasField("report")}
