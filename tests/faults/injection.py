"""Faults at the boundaries of a part: around what it says to the journal, and around its gRPC messages.

Nothing of the service knows of it: the wire is a subclass with clients of its own, gRPC has interceptors.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Protocol, TypeVar
from unittest.mock import patch

import grpc
import grpc.aio
import redis.asyncio as redis
from redis.asyncio.client import Pipeline
from redis.exceptions import BusyLoadingError, OutOfMemoryError, ReadOnlyError
from redis.exceptions import ConnectionError as RedisConnectionError

from kimia.client import AsyncKimia
from kimia.client.connection import channel_options
from kimia.runtime import server
from kimia.streams.wire import Wire, WireOptions, script_names, script_text
from tests.faults import schedule
from tests.faults.schedule import Boundary, Fault

T = TypeVar("T")

UNNOTICED = 0.05  # seconds until who asked gives up on what was lost

SCRIPTS: dict[str, Boundary] = {
    **dict.fromkeys(("publish", "open", "append", "submit", "save", "reader", "restore", "playback"), "publish"),
    **dict.fromkeys(("take", "recover", "claim"), "claim"),
    "heartbeat": "heartbeat",
    **dict.fromkeys(("finish", "release", "rewind", "drop"), "ack"),
}
ASIDE = ("delete", "depth", "join", "leave", "note_blobs")  # and the ledger: no part of a turn
READS = ("XRANGE", "XREVRANGE", "XREAD", "HGETALL", "HMGET", "GET", "MGET", "GETEX")
FINAL = 7  # where `publish` says in its arguments that the chunk is the final one, which acknowledges the job
REFUSALS = (  # by the passage, so that a schedule stays a pure function of its seed
    lambda: RedisConnectionError("connection reset"),
    lambda: BusyLoadingError("the server is loading its data"),
    lambda: ReadOnlyError("you cannot write against a replica"),
    lambda: OutOfMemoryError("command not allowed when used memory > 'maxmemory'"),
)


class Body(Protocol):
    """A part that may end or stand still."""

    async def alive(self) -> None:
        """Wait while it stands still; for ever once it has ended."""

    async def die(self) -> None:
        """End; never returns."""

    async def pause(self, seconds: float) -> None:
        """Stand still for so long."""


class Injector:
    """Counts the passages of one part, and does there what its schedule says. `fired` is what it has done."""

    def __init__(
        self,
        place: str,
        faults: Sequence[Fault],
        body: Body,
        tell: Callable[[Fault], None] = lambda fault: None,
    ) -> None:
        self.fired: list[Fault] = []
        self.passages: Counter[str] = Counter()
        self._due = {(fault.boundary, fault.nth): fault for fault in faults if fault.place == place}
        self._body = body
        self._tell = tell

    async def around(
        self, boundary: Boundary | None, call: Callable[[], Awaitable[T]], refusal: Callable[[int], Exception]
    ) -> T:
        """The call, or what the schedule has in its place. None is no boundary: only the dead do not pass it."""
        await self._body.alive()
        fault = self._passed(boundary) if boundary else None
        answer = await (call() if fault is None else self._disturbed(fault, call, refusal))
        await self._body.alive()
        return answer

    def _passed(self, boundary: Boundary) -> Fault | None:
        self.passages[boundary] += 1
        fault = self._due.get((boundary, self.passages[boundary]))
        if fault is not None:
            self.fired.append(fault)
            self._tell(fault)
        return fault

    async def _disturbed(
        self, fault: Fault, call: Callable[[], Awaitable[T]], refusal: Callable[[int], Exception]
    ) -> T:
        lost = RedisConnectionError("connection lost") if fault.boundary[:4] != "grpc" else refusal(0)
        match fault.action:
            case schedule.DELAY:
                await asyncio.sleep(fault.seconds)
            case schedule.LOSE_REQUEST:
                await asyncio.sleep(UNNOTICED)
                raise lost
            case schedule.LOSE_ANSWER:
                await call()
                raise lost
            case schedule.DUPLICATE:
                await call()
            case schedule.ERROR:
                raise refusal(fault.nth)
            case schedule.KILL_BEFORE:
                await self._body.die()
            case schedule.KILL_AFTER:
                await call()
                await self._body.die()
            case schedule.PAUSE_BEFORE:
                await self._body.pause(fault.seconds)
        return await call()


# ---- the journal ------------------------------------------------------------------------------------------------


class DisturbedWire(Wire):
    """A wire whose clients pass an injector. `injector` is set by a subclass, one for each part."""

    injector: ClassVar[Injector]

    def __init__(self, journal: redis.Redis, blobs: redis.Redis, options: WireOptions) -> None:
        ours = self._disturbed(journal)
        super().__init__(ours, ours if blobs is journal else self._disturbed(blobs), options)

    def blocking(self) -> redis.Redis:
        """A client for blocked reads, behind the injector too."""
        plain = super().blocking()
        self._blocking.remove(plain)
        client = self._disturbed(plain)
        self._blocking.append(client)
        return client

    def _disturbed(self, client: redis.Redis) -> redis.Redis:
        ours = DisturbedRedis.from_pool(client.connection_pool)
        ours.injector = self.injector
        return ours


def wire_of(injector: Injector) -> type[DisturbedWire]:
    """The wire of one part."""
    return type("PartWire", (DisturbedWire,), {"injector": injector})


class DisturbedRedis(redis.Redis):
    """A client whose commands and pipelines pass an injector."""

    injector: Injector

    async def execute_command(self, *args: Any, **options: Any) -> Any:
        """One command."""
        call = super().execute_command
        return await self.injector.around(_boundary([args]), lambda: call(*args, **options), _refusal)

    def pipeline(self, transaction: bool = True, shard_hint: str | None = None) -> DisturbedPipeline:
        """Many commands of one round trip, which is one passage."""
        pipe = DisturbedPipeline(self.connection_pool, self.response_callbacks, transaction, shard_hint)
        pipe.injector = self.injector
        return pipe


class DisturbedPipeline(Pipeline):
    """Commands that are lost, late or repeated together."""

    injector: Injector

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        """One round trip."""
        commands = list(self.command_stack)
        send = super().execute

        async def call() -> list[Any]:
            self.command_stack = list(commands)
            return await send(raise_on_error)

        return await self.injector.around(_boundary([args for args, _ in commands]), call, _refusal)


def _boundary(commands: Sequence[Sequence[Any]]) -> Boundary | None:
    """Which boundary a round trip passes; None for what is no part of a turn (greetings, the ledger)."""
    name, *args = commands[0]
    if name in READS:
        return "read"
    if name not in ("EVALSHA", "EVAL"):
        return None
    script = _scripts().get(args[0], "")
    if script == "publish" and any(_is_final(command) for command in commands):
        return "ack"
    return SCRIPTS.get(script)


def _is_final(command: Sequence[Any]) -> bool:
    _, _, count, *rest = command
    return bool(rest[count + FINAL])


def _scripts() -> dict[str, str]:
    return {text: name for name in script_names() for text in script_text(name)}


def _refusal(nth: int) -> Exception:
    return REFUSALS[nth % len(REFUSALS)]()


# ---- gRPC -------------------------------------------------------------------------------------------------------


class DisturbedServer(grpc.aio.ServerInterceptor):
    """Requests that are read and responses that are written, of the service's own methods."""

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method with the injector around its messages."""
        method = await continuation(handler_call_details)
        if method is None or not handler_call_details.method.startswith("/kimia.v1.KimiAudio/"):
            return method
        make, behavior = server._parts(method)
        disturbed = self._disturbed(behavior)
        return make(disturbed, method.request_deserializer, method.response_serializer)

    def _disturbed(self, behavior: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
        async def run(request: Any, context: Any) -> Any:
            ours = _Context(context, self.injector)
            return await behavior(await ours.received(request), ours)

        return run


class _Lost(Exception):
    """The connection ends here."""


class _Context:
    """A call whose messages pass an injector; where one is lost, the call ends as with its connection."""

    def __init__(self, context: Any, injector: Injector) -> None:
        self._context = context
        self._injector = injector

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    async def received(self, request: Any) -> Any:
        """A request."""

        async def read() -> Any:
            return request

        return await self._through("grpc_read", read)

    async def write(self, response: Any) -> None:
        """A response."""
        await self._through("grpc_write", lambda: self._context.write(response))

    async def _through(self, boundary: Boundary, call: Callable[[], Awaitable[T]]) -> T:
        try:
            return await self._injector.around(boundary, call, lambda _nth: _Lost())
        except _Lost:
            await self._context.abort(grpc.StatusCode.UNAVAILABLE, "connection lost")
            raise


@contextmanager
def disturbed_server(injector: Injector) -> Iterator[None]:
    """Servers that are built meanwhile have the injector before everything else."""
    build = grpc.aio.server

    def built(*, interceptors: Sequence[Any], **options: Any) -> grpc.aio.Server:
        return build(interceptors=[DisturbedServer(injector), *interceptors], **options)

    with patch.object(grpc.aio, "server", built):
        yield


class DisturbedClient(grpc.aio.UnaryStreamClientInterceptor):
    """Requests that are written and events that are read."""

    def __init__(self, injector: Injector) -> None:
        self.injector = injector

    async def intercept_unary_stream(
        self, continuation: Callable[..., Awaitable[Any]], client_call_details: Any, request: Any
    ) -> AsyncIterator[Any]:
        """The call's events."""
        calls: list[Any] = []

        async def send() -> None:
            calls.append(await continuation(client_call_details, request))
            await calls[-1].wait_for_connection()  # sent for certain

        try:
            await self.injector.around("grpc_write", send, _cut)
        except BaseException:
            _cancel(calls)
            raise
        _cancel(calls[:-1])
        return self._events(calls[-1])

    async def _events(self, call: Any) -> AsyncIterator[Any]:
        events = aiter(call)
        found: list[Any] = []

        async def read() -> None:
            found.append(found[-1] if found else await anext(events))

        try:
            while True:
                found.clear()
                await self.injector.around("grpc_read", read, _cut)
                for event in tuple(found):
                    yield event
        except StopAsyncIteration:
            return
        finally:
            call.cancel()


def _cancel(calls: Sequence[Any]) -> None:
    for call in calls:
        call.cancel()


def _cut(_nth: int) -> Exception:
    """What a client hears when its connection ends."""
    return grpc.aio.AioRpcError(
        grpc.StatusCode.UNAVAILABLE, grpc.aio.Metadata(), grpc.aio.Metadata(), "connection lost"
    )


class DisturbedKimia(AsyncKimia):
    """The SDK over a channel that passes an injector."""

    injector: Injector

    def _open_channel(self) -> grpc.aio.Channel:
        if self._channel is None:
            ours = [DisturbedClient(self.injector)]
            self._channel = grpc.aio.insecure_channel(self.target, channel_options(self.options), interceptors=ours)
        return self._channel
