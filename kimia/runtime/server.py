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
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from pathlib import Path
from typing import Any, TypeAlias

import grpc
import grpc.aio
from grpc_reflection.v1alpha import reflection

from kimia.errors import DeadlineError, KimiaError, SettingsError
from kimia.runtime.logs import get_logger
from kimia.runtime.settings import Settings
from kimia.status import abort, to_failure

__all__ = ["ErrorsToStatuses", "bind", "build_server", "offer_reflection"]

Context: TypeAlias = grpc.aio.ServicerContext[Any, Any]
Behavior: TypeAlias = Callable[[Any, Context], Any]

STALLED_SECONDS = 60.0  # a client that reads nothing for so long is given up, so that it holds no row
PING_TIMEOUT_SECONDS = 10.0
LINGER_SECONDS = 0.5  # to read what a client is still sending when its call has failed
PAUSE_SECONDS = 0.05  # without a message: the client waits for an answer

log = get_logger()


def build_server(settings: Settings, *, stalled_seconds: float = STALLED_SECONDS) -> grpc.aio.Server:
    """A server without services and without a port yet. Must be called where an event loop runs."""
    return grpc.aio.server(
        interceptors=[ErrorsToStatuses(stalled_seconds)],
        options=_options(settings),
        maximum_concurrent_rpcs=settings.max_rpcs,
    )


def _options(settings: Settings) -> list[tuple[str, int]]:
    """Channel arguments; times in milliseconds."""
    keepalive = _milliseconds(settings.keepalive_seconds)
    return [
        ("grpc.max_receive_message_length", settings.max_message_bytes),
        ("grpc.max_send_message_length", settings.max_message_bytes),
        ("grpc.keepalive_time_ms", keepalive),
        ("grpc.keepalive_timeout_ms", _milliseconds(PING_TIMEOUT_SECONDS)),
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

    def __init__(self, stalled_seconds: float = STALLED_SECONDS) -> None:
        self.stalled_seconds = stalled_seconds

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
        return make(guarded, method.request_deserializer, method.response_serializer)

    def _guarded(self, behavior: Behavior, name: str, streaming: bool) -> Behavior:
        run = self._streamed(behavior) if inspect.isasyncgenfunction(behavior) else behavior

        async def guarded(request: Any, context: Context) -> Any:
            try:
                return await run(request, context)
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
    """The sentence stays out: it may quote the caller."""
    failure = to_failure(error)
    internal = failure.code == grpc.StatusCode.INTERNAL.value[0]
    write = log.error if internal else log.info
    write("call refused", method=name, reason=failure.reason, field=failure.field, exc_info=error if internal else None)
