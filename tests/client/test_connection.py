"""How often a lost stream is tried again, and what is no use."""

import grpc
import grpc.aio
import pytest
from grpc_status import rpc_status

from kimia.client.connection import (
    ClientOptions,
    Deadline,
    Identity,
    Patience,
    channel_options,
    check_size,
    is_lost,
    unreachable,
)
from kimia.errors import CapacityError, DeadlineError, InternalError, RequestError, UnavailableError
from kimia.status import to_failure, to_status
from kimia.v1 import kimi_audio_pb2 as pb

pytestmark = pytest.mark.unit


def lost(code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> grpc.RpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), "cut")


def refused(error: Exception) -> grpc.RpcError:
    status = rpc_status.to_status(to_status(to_failure(error)))
    trailing = grpc.aio.Metadata(*status.trailing_metadata)
    return grpc.aio.AioRpcError(status.code, grpc.aio.Metadata(), trailing, status.details)


def test_what_is_a_lost_connection() -> None:
    assert is_lost(lost())
    assert is_lost(lost(grpc.StatusCode.INTERNAL))
    assert is_lost(refused(UnavailableError("the store is away")))
    assert not is_lost(refused(InternalError("a stage failed")))
    assert not is_lost(lost(grpc.StatusCode.INVALID_ARGUMENT))
    assert not is_lost(lost(grpc.StatusCode.DEADLINE_EXCEEDED))


def test_delays_grow_up_to_a_bound_and_end() -> None:
    patience = Patience(ClientOptions(attempts=5, first_delay=1.0, longest_delay=3.0))
    delays = [patience.delay(lost()) for _ in range(4)]
    assert [0.75 * bound <= delay <= bound for bound, delay in zip((1, 2, 3, 3), delays, strict=True)] == [True] * 4
    with pytest.raises(UnavailableError):
        patience.delay(lost())


def test_progress_begins_anew() -> None:
    patience = Patience(ClientOptions(attempts=2))
    for _ in range(5):
        assert patience.delay(None) > 0
        patience.progress()
    patience.delay(None)
    with pytest.raises(UnavailableError, match="in the middle of the turn"):
        patience.delay(None)


def test_a_full_service_is_asked_again_as_it_says() -> None:
    full = refused(CapacityError("full", retry_after=2.0))
    patience = Patience(ClientOptions(patience=5.0))
    assert [patience.delay(full), patience.delay(full)] == [2.0, 2.0]
    with pytest.raises(CapacityError):
        patience.delay(full)


def test_a_deadline_counts_all_connections(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr("kimia.client.connection.time.monotonic", lambda: now)
    deadline = Deadline(5.0)
    now = 103.0
    assert deadline.left() == 2.0
    now = 105.0
    with pytest.raises(DeadlineError, match="within 5 s"):
        deadline.left()
    assert Deadline(None).left() is None


def test_large_requests_are_told_what_to_do() -> None:
    request = pb.GenerateRequest(say="x" * 1000)
    check_size(request, 1100)
    with pytest.raises(RequestError, match="FLAC or OGG") as raised:
        check_size(request, 1000)
    assert raised.value.field == "messages"


def test_own_options_of_the_channel_come_last() -> None:
    options = channel_options(ClientOptions(channel=(("grpc.keepalive_time_ms", 5),)))
    assert options[-1] == ("grpc.keepalive_time_ms", 5)
    assert ("grpc.keepalive_time_ms", 30000) in options
    assert ("grpc.http2.ping_timeout_ms", 10000) in options


def test_identity_and_address() -> None:
    caller = Identity("acme", "key-1", "00-1").caller()
    assert (caller.tenant, caller.key_id, caller.traceparent) == ("acme", "key-1", "00-1")
    assert "here:7" in str(unreachable("here:7"))
