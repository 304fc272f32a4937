"""The gRPC adapter: a stage for clients that need only this one, on the same rows as the pipeline.

The turn comes first, then the chunks that the stage reads; what it yields goes back. A client that vanishes closes the
stage's generator and frees row and reservation.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc.aio

from kimia.errors import CapacityError, DeadlineError, KimiaError, RequestError, UnavailableError
from kimia.model.philox import SEED_LIMIT
from kimia.runtime.logs import bound_turn, get_logger
from kimia.runtime.metrics import REFUSED, TURNS
from kimia.runtime.rows import Rows
from kimia.runtime.settings import Settings
from kimia.stage import LLM, Log, Stage, StageKind
from kimia.v1 import stages_pb2, stages_pb2_grpc
from kimia.v1.stages_pb2 import (
    EncodeRequest,
    EncodeResponse,
    LanguageModelGenerateRequest,
    LanguageModelGenerateResponse,
    SynthesizeRequest,
    SynthesizeResponse,
)
from kimia.v1.turn_pb2 import Chunk, Turn

if TYPE_CHECKING:
    from kimia.streams.ledger import Ledger

__all__ = ["Direct", "register"]

Request: TypeAlias = EncodeRequest | LanguageModelGenerateRequest | SynthesizeRequest
Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]

PAYLOADS: dict[Log, str] = {"input": "input", "encoded": "encoded", "tokens": "step", "audio": "speech"}
RESERVED_SECONDS = 30.0  # a reservation outlives its process by no more than this
RETRY_SECONDS = 1.0

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,129}")

log = get_logger()


class Direct:
    """Admission, checks and run of direct turns. Refuses everything until opened and again once closed."""

    def __init__(self, kind: StageKind, rows: Rows, settings: Settings) -> None:
        self.kind = kind
        self._rows = rows
        self._settings = settings
        self._stage: Stage | None = None
        self._ledger: Ledger | None = None

    def open(self, stage: Stage, ledger: Ledger | None = None) -> None:
        """Serve from now on. With a ledger, every turn reserves its row among those of all workers."""
        self._stage, self._ledger = stage, ledger

    def close(self) -> None:
        """Refuse new turns; those that run go on."""
        self._stage = None

    async def run(self, requests: AsyncIterator[Any], context: Context) -> AsyncGenerator[Chunk, None]:
        """The chunks of one turn. Raises KimiaError."""
        stage = self._stage
        if stage is None:
            rule = f"this {self.kind.name} is starting or stopping; connect again"
            raise UnavailableError(rule, retry_after=RETRY_SECONDS)
        deadline = asyncio.get_running_loop().time() + self._seconds(context)
        requests = aiter(requests)
        turn = self._completed(_turn_of(await _before(deadline, requests)), deadline)
        outcome = "error"
        try:
            with bound_turn(turn.id):
                async with self._admitted(turn), aclosing(self._computed(stage, turn, requests, deadline)) as chunks:
                    async for chunk in chunks:
                        yield chunk
            outcome = "done"
        except (asyncio.CancelledError, GeneratorExit):
            outcome = "cancelled"
            raise
        finally:
            TURNS.labels(stage=self.kind.name, outcome=outcome).inc()

    async def _computed(
        self, stage: Stage, turn: Turn, requests: AsyncIterator[Any], deadline: float
    ) -> AsyncGenerator[Chunk, None]:
        inbox = self._inbox(turn, requests)
        async with aclosing(inbox), _closing(stage.run(turn, inbox)) as chunks:
            while (chunk := await _before(deadline, chunks)) is not None:
                if chunk.HasField("speech"):
                    chunk.speech.ClearField("mel")  # only for a worker that goes on behind it
                yield chunk

    async def _inbox(self, turn: Turn, requests: AsyncIterator[Any]) -> AsyncGenerator[Chunk, None]:
        checks = _Checks(self.kind, self._settings, turn.ByteSize())
        async for request in requests:
            chunk = _chunk_of(request)
            checks.feed(chunk)
            yield chunk
        checks.end()

    def _seconds(self, context: Context) -> float:
        """Time that the turn may take: what the client gives it, but no more than the settings."""
        remaining: float | None = context.time_remaining()
        limit = self._settings.turn_deadline_seconds
        return limit if remaining is None else min(remaining, limit)

    def _completed(self, turn: Turn, deadline: float) -> Turn:
        """The turn with what its client left out. Raises RequestError, DeadlineError."""
        if turn.options.HasField("seed"):
            turn.seed = turn.options.seed
        elif not turn.seed:
            turn.seed = secrets.randbelow(SEED_LIMIT)
        if turn.seed >= SEED_LIMIT:
            raise RequestError("a seed is at most 2**63 - 1", field="turn.seed")
        for field, name in (("id", turn.id), ("session_id", turn.session_id), ("caller.tenant", turn.caller.tenant)):
            if name and not _NAME.fullmatch(name):
                raise RequestError("must be 1 to 129 letters, digits, '_', '.' or '-'", field=f"turn.{field}")
        session = turn.session_id or f"direct-{secrets.token_hex(8)}"  # left out: no later turn is to be prepared for
        turn.id = turn.id or f"{session}.{secrets.token_hex(8)}"
        turn.caller.tenant = turn.caller.tenant or "default"
        turn.route[:] = [self.kind.number]
        _set_deadline(turn, deadline - asyncio.get_running_loop().time())
        return turn

    # ---- admission ----

    @asynccontextmanager
    async def _admitted(self, turn: Turn) -> AsyncIterator[None]:
        """A row here and, with a ledger, a reservation. Raises CapacityError."""
        if not self._rows.try_acquire(for_good=True):  # a call is never parked: it keeps its row
            REFUSED.labels(stage=self.kind.name).inc()
            raise CapacityError(
                f"all {self._rows.count} rows of this {self.kind.name} are taken; try again, or ask another one",
                retry_after=RETRY_SECONDS,
            )
        try:
            if self._ledger is None:
                yield
            else:
                async with self._reserved(self._ledger, turn):
                    yield
        finally:
            self._rows.release()

    @asynccontextmanager
    async def _reserved(self, ledger: Ledger, turn: Turn) -> AsyncIterator[None]:
        session = f"direct-{secrets.token_hex(16)}"  # never a session's own: its reservation is not ours to release
        limit = self._settings.tenant_sessions or None
        try:
            await ledger.reserve(session, turn.caller.tenant, [self.kind], RESERVED_SECONDS, limit)
        except CapacityError:
            REFUSED.labels(stage=self.kind.name).inc()
            raise
        renewing = asyncio.create_task(_renew(ledger, session))
        try:
            yield
        finally:
            renewing.cancel()
            await asyncio.shield(_released(ledger, session))


async def _renew(ledger: Ledger, session: str) -> None:
    while True:
        await asyncio.sleep(RESERVED_SECONDS / 3)
        try:
            await ledger.renew(session, RESERVED_SECONDS)
        except KimiaError as error:  # the turn goes on; the next attempt may reach the ledger again
            log.warning("reservation not renewed", reason=type(error).__name__)


async def _released(ledger: Ledger, session: str) -> None:
    try:
        await ledger.release(session)
    except KimiaError as error:  # it ends by itself
        log.warning("reservation not released", reason=type(error).__name__)


@asynccontextmanager
async def _closing(chunks: AsyncIterator[Chunk]) -> AsyncIterator[AsyncIterator[Chunk]]:
    """A stage's generator, closed in the end whatever happens. The protocol promises an iterator only."""
    try:
        yield chunks
    finally:
        close = getattr(chunks, "aclose", None)
        if close is not None:
            await close()


async def _before(deadline: float, items: AsyncIterator[Any]) -> Any:
    """The next item, None at the end. Raises DeadlineError at `deadline`, a time of the loop's clock."""
    try:
        async with asyncio.timeout_at(deadline) as limit:
            return await anext(items, None)
    except TimeoutError as error:
        if not limit.expired():  # the stage's own
            raise
        raise DeadlineError("the turn took longer than its deadline; allow more time, or shorten it") from error


def _set_deadline(turn: Turn, remaining: float) -> None:
    """The earlier one of the turn's and the call's. Raises DeadlineError when it has passed, RequestError."""
    now = time.time()
    try:
        call, own = now + remaining, turn.deadline.ToNanoseconds() / 1e9
    except ValueError as error:
        raise RequestError("is no time; leave it out, or give one to come", field="turn.deadline") from error
    if turn.HasField("deadline") and own <= now:
        raise DeadlineError("the deadline of the turn has passed; start another")
    if not turn.HasField("deadline") or call < own:
        turn.deadline.FromNanoseconds(round(call * 1e9))


# ---- checks -----------------------------------------------------------------------------------------------------


class _Checks:
    """Order, kind and size of the chunks of one turn."""

    def __init__(self, kind: StageKind, settings: Settings, turn_bytes: int) -> None:
        self._payload = PAYLOADS[kind.reads]
        self._optional = kind is LLM  # a conversation in text needs no clip
        self._settings = settings
        self._next = 0
        self._ended = False
        self._total = turn_bytes
        self._clips: Counter[int] = Counter()

    def feed(self, chunk: Chunk) -> None:
        """Check the next chunk. Raises RequestError, naming the field."""
        if self._ended:
            raise RequestError("nothing may follow the chunk marked final", field="chunk")
        if chunk.WhichOneof("payload") != self._payload:
            raise RequestError(f"this stage reads chunks with `{self._payload}`", field="chunk.payload")
        if chunk.index != self._next:
            raise RequestError(f"chunks are counted without gap; expected {self._next}", field="chunk.index")
        self._next += 1
        self._ended = chunk.final
        self._weigh(chunk)

    def end(self) -> None:
        """The client sends no more. Raises RequestError."""
        if not self._next and self._optional:
            return
        if not self._ended:
            raise RequestError("the last chunk must be marked final", field="chunk.final")

    def _weigh(self, chunk: Chunk) -> None:
        size, most = chunk.ByteSize(), self._settings
        self._total += size
        if self._total > most.max_turn_bytes:
            raise RequestError(f"a turn has at most {most.max_turn_bytes} bytes; shorten it", field="chunk")
        if self._payload != "step":
            clip = chunk.input.clip if self._payload == "input" else chunk.encoded.clip
            self._clips[clip] += size
            if self._clips[clip] > most.max_clip_bytes:
                rule = f"a clip has at most {most.max_clip_bytes} bytes; split it into several"
                raise RequestError(rule, field=f"chunk.{self._payload}")


def _turn_of(request: Request | None) -> Turn:
    if request is None or request.WhichOneof("content") != "turn":
        raise RequestError("the first message carries the turn", field="turn")
    return request.turn


def _chunk_of(request: Request) -> Chunk:
    if request.WhichOneof("content") != "chunk":
        raise RequestError("every message after the first one carries a chunk", field="chunk")
    return request.chunk


# ---- servicers --------------------------------------------------------------------------------------------------


class _Tokenizer(stages_pb2_grpc.TokenizerServicer):
    def __init__(self, direct: Direct) -> None:
        self._direct = direct

    async def Encode(
        self, request_iterator: AsyncIterator[EncodeRequest], context: Context
    ) -> AsyncGenerator[EncodeResponse, None]:
        """Sound to semantic tokens and features."""
        async with aclosing(self._direct.run(request_iterator, context)) as chunks:
            async for chunk in chunks:
                yield EncodeResponse(chunk=chunk)


class _LanguageModel(stages_pb2_grpc.LanguageModelServicer):
    def __init__(self, direct: Direct) -> None:
        self._direct = direct

    async def Generate(
        self, request_iterator: AsyncIterator[LanguageModelGenerateRequest], context: Context
    ) -> AsyncGenerator[LanguageModelGenerateResponse, None]:
        """Conversation to steps of text and semantic tokens."""
        async with aclosing(self._direct.run(request_iterator, context)) as chunks:
            async for chunk in chunks:
                yield LanguageModelGenerateResponse(chunk=chunk)


class _Detokenizer(stages_pb2_grpc.DetokenizerServicer):
    def __init__(self, direct: Direct) -> None:
        self._direct = direct

    async def Synthesize(
        self, request_iterator: AsyncIterator[SynthesizeRequest], context: Context
    ) -> AsyncGenerator[SynthesizeResponse, None]:
        """Steps to speech."""
        async with aclosing(self._direct.run(request_iterator, context)) as chunks:
            async for chunk in chunks:
                yield SynthesizeResponse(chunk=chunk)


def register(direct: Direct, server: grpc.aio.Server) -> str:
    """Offer the stage's service on a server; the service's full name."""
    if direct.kind.name == "tokenizer":
        stages_pb2_grpc.add_TokenizerServicer_to_server(_Tokenizer(direct), server)
        name = "Tokenizer"
    elif direct.kind is LLM:
        stages_pb2_grpc.add_LanguageModelServicer_to_server(_LanguageModel(direct), server)
        name = "LanguageModel"
    else:
        stages_pb2_grpc.add_DetokenizerServicer_to_server(_Detokenizer(direct), server)
        name = "Detokenizer"
    full_name: str = stages_pb2.DESCRIPTOR.services_by_name[name].full_name
    return full_name
