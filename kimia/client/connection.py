"""How the service is reached: channel, credentials, message limits; and how often a lost stream is tried again."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import grpc
from google.protobuf.message import Message as Proto
from grpc_status import rpc_status

from kimia.errors import CapacityError, DeadlineError, KimiaError, RequestError, UnavailableError
from kimia.status import from_rpc_error
from kimia.v1.turn_pb2 import Caller

DEFAULT_TARGET = "localhost:50051"
MEBIBYTE = 1 << 20
# Codes with which a connection may end between two events; without details of the service they speak of transport.
TRANSPORT_CODES = (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN, grpc.StatusCode.CANCELLED)


@dataclass(frozen=True)
class ClientOptions:
    """Limits and patience of a client."""

    attempts: int = 16  # in a row without a new event; about 22 s: a process that starts again needs several
    first_delay: float = 0.1  # seconds before the second attempt; doubles
    longest_delay: float = 2.0  # seconds
    patience: float = 0.0  # seconds to go on asking for a row when the service is at capacity
    timeout: float | None = None  # seconds for one answer; None: the service's own limit
    max_request_bytes: int = 8 * MEBIBYTE  # what the service accepts (KIMIA_MAX_MESSAGE_BYTES)
    keepalive_seconds: float = 30.0
    channel: Sequence[tuple[str, Any]] = ()  # further options of gRPC


DEFAULTS = ClientOptions()


@dataclass(frozen=True)
class Identity:
    """On whose account requests run."""

    tenant: str = ""
    key_id: str = ""
    traceparent: str = ""

    def caller(self) -> Caller:
        """The same in the contract."""
        return Caller(tenant=self.tenant, key_id=self.key_id, traceparent=self.traceparent)


def channel_options(options: ClientOptions) -> list[tuple[str, Any]]:
    """Options of gRPC for a client: fast reconnection, keepalive that the service agrees with."""
    return [
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.keepalive_time_ms", int(options.keepalive_seconds * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # else a quiet call is pinged twice, and then for a minute no more
        ("grpc.http2.ping_timeout_ms", 10_000),  # else a service that is cut off is waited for for a minute
        ("grpc.max_receive_message_length", 64 * MEBIBYTE),
        ("grpc.max_send_message_length", -1),  # checked by check_size, with a sentence
        *options.channel,
    ]


def check_size(request: Proto, limit: int) -> None:
    """Raise RequestError when the service would refuse the request for its size."""
    size = request.ByteSize()
    if size > limit:
        raise RequestError(
            f"the request has {size / MEBIBYTE:.1f} MiB and the service takes {limit / MEBIBYTE:.1f}; "
            "send FLAC or OGG instead of WAV, or stream the sound with converse()",
            field="messages",
        )


def unreachable(target: str) -> UnavailableError:
    """What to say when nobody answers."""
    return UnavailableError(f"nothing answers at {target}; is the service running? Start one: kimia up --model DIR")


def is_lost(error: grpc.RpcError) -> bool:
    """Whether the connection ended rather than the request: worth another attempt."""
    code = error.code()
    return code is grpc.StatusCode.UNAVAILABLE or (code in TRANSPORT_CODES and not _has_details(error))


def _has_details(error: grpc.RpcError) -> bool:
    try:
        return rpc_status.from_call(cast(grpc.Call, error)) is not None
    except ValueError:  # details that contradict the status: not the service's
        return False


class Deadline:
    """Time that is left of an answer, however many connections it takes."""

    def __init__(self, seconds: float | None) -> None:
        self.seconds = seconds
        self.begun = time.monotonic()

    def left(self) -> float | None:
        """Seconds; None: no limit. Raises DeadlineError when there are none."""
        if self.seconds is None:
            return None
        left = self.begun + self.seconds - time.monotonic()
        if left <= 0:
            raise DeadlineError(
                f"there was no whole answer within {self.seconds:g} s; allow more by ClientOptions.timeout"
            )
        return left


class Patience:
    """How long to wait before the next attempt, bounded; progress resets it."""

    def __init__(self, options: ClientOptions) -> None:
        self.options = options
        self.failures = 0
        self.waited = 0.0

    def progress(self) -> None:
        """Something new arrived."""
        self.failures = 0

    def delay(self, error: grpc.RpcError | None) -> float:
        """Seconds to wait; None stands for a stream that ended too early. Raises KimiaError when it is no use."""
        if error is None:
            return self._next(UnavailableError("the service ended the stream in the middle of the turn; try again"))
        if is_lost(error):
            return self._next(from_rpc_error(error))
        return self._capacity(from_rpc_error(error))

    def _next(self, error: KimiaError) -> float:
        self.failures += 1
        if self.failures >= self.options.attempts:
            raise error
        bound: float = min(self.options.first_delay * 2 ** (self.failures - 1), self.options.longest_delay)
        return bound * random.uniform(0.75, 1.0)  # clients that were cut off together do not come back together

    def _capacity(self, error: KimiaError) -> float:
        if not isinstance(error, CapacityError) or error.retry_after is None:
            raise error
        self.waited += error.retry_after
        if self.waited > self.options.patience:
            raise error
        return error.retry_after
