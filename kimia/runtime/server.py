"""The gRPC server of every process: limits, keepalive, TLS, and one place where errors become statuses.

server = build_server(settings)
add_KimiAudioServicer_to_server(servicer, server)
health = Health(server, ["kimia.v1.KimiAudio"])
address = bind(server, settings)
await server.start()
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_reflection.v1alpha import reflection

from kimia.errors import DeadlineError, KimiaError, RequestError, SettingsError, UnavailableError
from kimia.runtime.logs import get_logger
from kimia.runtime.settings import Settings
from kimia.status import abort, to_failure

__all__ = ["ErrorsToStatuses", "bind", "build_server", "offer_reflection"]

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Behavior: TypeAlias = Callable[[Any, Context], Any]

STALLED_SECONDS = 60.0  # a client that reads nothing for so long is given up, so that it holds no row
PING_TIMEOUT_SECONDS = 10.0
EXPLAINED = 2  # times the largest message: messages that are read to say why they are refused
LINGER_SECONDS = 0.5  # to read what a client is still sending when its call has failed
PAUSE_SECONDS = 0.05  # without a message: the client waits for an answer

log = get_logger()


def build_server(settings: Settings, *, stalled_seconds: float = STALLED_SECONDS) -> grpc.aio.Server:
    """A server without services and without a port yet. Must be called where an event loop runs."""
    return grpc.aio.server(
        interceptors=[ErrorsToStatuses(stalled_seconds, settings.max_message_bytes)],
        options=_options(settings),
        maximum_concurrent_rpcs=settings.max_rpcs,
    )


def _options(settings: Settings) -> list[tuple[str, int]]:
    """Channel arguments; times in milliseconds."""
    keepalive = _milliseconds(settings.keepalive_seconds)
    return [
        # What is beyond it is refused by gRPC, which says no more than RESOURCE_EXHAUSTED; up to there it is explained.
        ("grpc.max_receive_message_length", min(EXPLAINED * settings.max_message_bytes, 2**31 - 1)),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", _milliseconds(PING_TIMEOUT_SECONDS)),
        ("grpc.http2.ping_timeout_ms", _milliseconds(PING_TIMEOUT_SECONDS)),  # else 60 s, whatever the line above says
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients ping as often as the server does; half of it leaves room for jitter. Else: GOAWAY too_many_pings.
        ("grpc.http2.min_recv_ping_interval_without_data_ms", keepalive // 2),
        ("grpc.max_connection_age_ms", _milliseconds(settings.max_connection_age_seconds)),
        ("grpc.max_connection_age_grace_ms", _milliseconds(settings.connection_grace_seconds)),
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server that gets half of the calls
    ]


def _milliseconds(seconds: float) -> int:
    return min(round(seconds * 1000), 2**31 - 1)


# ---- address ----------------------------------------------------------------------------------------------------


def bind(server: grpc.aio.Server, settings: Settings) -> str:
    """Take the port that the settings name, with TLS if they do; the address as host:port. Raises SettingsError."""
    try:
        if settings.tls_certificate:
            port = server.add_secure_port(settings.listen, _credentials(settings))
        else:
            port = server.add_insecure_port(settings.listen)
    except RuntimeError as error:
        raise SettingsError(f"KIMIA_LISTEN: cannot listen on {settings.listen}; is the port in use?") from error
    return f"{settings.listen.rpartition(':')[0]}:{port}"


def _credentials(settings: Settings) -> grpc.ServerCredentials:
    authority = _pem("KIMIA_TLS_CLIENT_CA", settings.tls_client_ca) if settings.tls_client_ca else None
    key = _pem("KIMIA_TLS_KEY", settings.tls_key)
    chain = _pem("KIMIA_TLS_CERTIFICATE", settings.tls_certificate)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except ssl.SSLError as error:  # gRPC would only say that it cannot listen
        advice = "give a PEM certificate and the key that belongs to it"
        raise SettingsError(f"KIMIA_TLS_CERTIFICATE and KIMIA_TLS_KEY: {advice} ({error.reason})") from error
    return grpc.ssl_server_credentials([(key, chain)], authority, require_client_auth=authority is not None)


def _pem(name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise SettingsError(f"{name}: {path} cannot be read ({error.strerror})") from error


def offer_reflection(server: grpc.aio.Server, services: Sequence[str]) -> None:
    """Let clients such as grpcurl ask which services there are."""
    reflection.enable_server_reflection([*services, reflection.SERVICE_NAME], server)


# ---- errors -----------------------------------------------------------------------------------------------------


class ErrorsToStatuses(grpc.aio.ServerInterceptor):
    """The edge of every servicer: KimiaError becomes a rich status, anything else is logged and becomes INTERNAL.

    It also sees to it that a generator is closed the moment its client vanishes, and gives up clients that do not read.
    """

    def __init__(self, stalled_seconds: float = STALLED_SECONDS, largest: int = 8 << 20) -> None:
        self.stalled_seconds = stalled_seconds
        self.largest = largest  # bytes of a message

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The method's own functions, with this edge around them."""
        method = await continuation(handler_call_details)
        if method is None:
            return None
        make, behavior = _parts(method)
        guarded = self._guarded(behavior, handler_call_details.method, method.request_streaming)
        return make(guarded, _reader(method.request_deserializer, self.largest), method.response_serializer)

    def _guarded(self, behavior: Behavior, name: str, streaming: bool) -> Behavior:
        run = self._streamed(behavior) if inspect.isasyncgenfunction(behavior) else behavior

        async def guarded(request: Any, context: Context) -> Any:
            try:
                if not streaming:
                    return await run(_readable(request), context)
                async with aclosing(_Readable(request)) as messages:
                    return await run(messages, context)
            except KimiaError as error:
                _log_refusal(name, error)
                await _abort(context, error, streaming)
            except (grpc.aio.AbortError, grpc.RpcError):
                raise
            except Exception as error:  # the servicer edge: the cause goes to the log, not to the client
                log.exception("call failed", method=name)
                await _abort(context, error, streaming)

        return guarded

    def _streamed(self, behavior: Behavior) -> Behavior:
        """A generator's messages, written one by one; gRPC would leave an abandoned generator to the collector."""

        async def streamed(request: Any, context: Context) -> None:
            responses: AsyncGenerator[Any, None] = behavior(request, context)
            async with aclosing(responses):
                async for response in responses:
                    await self._write(context, response)

        return streamed

    async def _write(self, context: Context, response: Any) -> None:
        try:
            async with asyncio.timeout(self.stalled_seconds):
                await context.write(response)
        except TimeoutError as error:
            raise DeadlineError(
                f"nothing was read for {self.stalled_seconds:g} s; read the answer as it comes"
            ) from error


async def _abort(context: Context, error: Exception, streaming: bool) -> None:
    """End a call with a status. What its client is still sending is read first, for a short while.

    An asyncio client whose write meets the end of its call reports "Internal error from Core" and forgets the status
    (grpc/grpc issue 36066).
    """
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LINGER_SECONDS):
            while streaming and await _more(context):
                pass
    await abort(context, error)


async def _more(context: Context) -> bool:
    """Read and forget one message; False when the client has finished or pauses."""
    try:
        async with asyncio.timeout(PAUSE_SECONDS):
            return await context.read() is not grpc.aio.EOF
    except TimeoutError:
        return False


# ---- messages that cannot be read -------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Refused:
    """Stands for a message that is no message; gRPC would make UNKNOWN of an exception here."""

    error: RequestError


def _reader(parse: Callable[[bytes], Any] | None, largest: int) -> Callable[[bytes], Any]:
    """The method's own parser, which says what is wrong instead of failing."""

    def read(data: bytes) -> Any:
        if len(data) > largest:
            rule = f"the message has {len(data)} bytes, at most {largest} are taken; send smaller ones"
            return _Refused(RequestError(rule, reason="MESSAGE_SIZE"))
        try:
            return data if parse is None else parse(data)
        except DecodeError:
            rule = "the message cannot be read: it is no message of this method, or a text in it is no UTF-8"
            return _Refused(RequestError(rule, reason="MALFORMED"))

    return read


def _readable(message: Any) -> Any:
    if isinstance(message, _Refused):
        raise message.error
    return message


class _Readable:
    """The messages of a stream. Raises RequestError at one that cannot be read."""

    def __init__(self, messages: AsyncIterator[Any]) -> None:
        self._messages: Any = aiter(messages)

    async def aclose(self) -> None:
        """Read no more. Left to the collector, gRPC's generator might outlive the loop."""
        with contextlib.suppress(RuntimeError):  # somebody still reads: that is ended elsewhere
            await self._messages.aclose()

    def __aiter__(self) -> _Readable:
        return self

    async def __anext__(self) -> Any:
        return _readable(await anext(self._messages))


def _parts(method: Any) -> tuple[Callable[..., Any], Behavior]:
    """What makes a method of its kind, and its function."""
    if method.request_streaming and method.response_streaming:
        return grpc.stream_stream_rpc_method_handler, method.stream_stream
    if method.request_streaming:
        return grpc.stream_unary_rpc_method_handler, method.stream_unary
    if method.response_streaming:
        return grpc.unary_stream_rpc_method_handler, method.unary_stream
    return grpc.unary_unary_rpc_method_handler, method.unary_unary


def _log_refusal(name: str, error: KimiaError) -> None:
    """The sentence stays out, since it may quote the caller, unless it tells of the service itself."""
    failure = to_failure(error)
    internal = failure.code == grpc.StatusCode.INTERNAL.value[0]
    if isinstance(error, UnavailableError):
        log.warning("call refused", method=name, reason=failure.reason, error=str(error))
    elif internal:
        log.error("call refused", method=name, reason=failure.reason, field=failure.field, exc_info=error)
    else:
        log.info("call refused", method=name, reason=failure.reason, field=failure.field)
