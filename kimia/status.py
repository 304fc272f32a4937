"""Errors as they travel: KimiaError <-> Failure (turn events, heads) <-> google.rpc rich status (gRPC calls).

| error | gRPC code | reason |
|---|---|---|
| ConversationError | INVALID_ARGUMENT | INVALID_CONVERSATION |
| ParameterError | INVALID_ARGUMENT | INVALID_PARAMETER |
| AudioError | INVALID_ARGUMENT | INVALID_AUDIO |
| ContextLengthError | INVALID_ARGUMENT | CONTEXT_LENGTH |
| RequestError | INVALID_ARGUMENT | INVALID_REQUEST or its own |
| StateError | FAILED_PRECONDITION | WRONG_STATE or its own |
| NotFoundError | NOT_FOUND | NOT_FOUND or its own |
| CapacityError | RESOURCE_EXHAUSTED with RetryInfo | AT_CAPACITY or its own |
| DeadlineError | DEADLINE_EXCEEDED | DEADLINE_EXCEEDED or its own |
| TurnCancelledError | CANCELLED | CANCELLED or its own |
| UnsupportedError | UNIMPLEMENTED | UNSUPPORTED or its own |
| UnavailableError | UNAVAILABLE | UNAVAILABLE or its own |
| CheckpointError and its kinds, NumericsError, GoldenSetError, SettingsError | INTERNAL | named after the class |
| InternalError | INTERNAL | INTERNAL or its own |
| any other exception | INTERNAL | INTERNAL; its text stays in the service's log |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Never, TypeVar, cast

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2 as details
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from kimia.errors import (
    AudioError,
    CapacityError,
    CheckpointError,
    ConfigError,
    ContextLengthError,
    ConversationError,
    DeadlineError,
    GoldenSetError,
    InternalError,
    KimiaError,
    NotFoundError,
    NumericsError,
    ParameterError,
    RequestError,
    ServiceError,
    SettingsError,
    StateError,
    TurnCancelledError,
    UnavailableError,
    UnsupportedError,
    WeightsError,
)
from kimia.v1.turn_pb2 import Failure

T = TypeVar("T")

__all__ = ["abort", "from_failure", "from_rpc_error", "to_failure", "to_status"]

DOMAIN = "kimia"
RETRY_SECONDS = 1.0  # where an error that passes does not say when
LONGEST_TEXT = 1000  # bytes; gRPC carries a status in headers, 8 KiB in all, and this text up to three times

# Errors of the library: the reason alone tells the class.
_LIBRARY: dict[type[KimiaError], tuple[grpc.StatusCode, str]] = {
    ConversationError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_CONVERSATION"),
    ContextLengthError: (grpc.StatusCode.INVALID_ARGUMENT, "CONTEXT_LENGTH"),
    ParameterError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_PARAMETER"),
    AudioError: (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_AUDIO"),
    CheckpointError: (grpc.StatusCode.INTERNAL, "CHECKPOINT"),
    ConfigError: (grpc.StatusCode.INTERNAL, "CONFIG"),
    WeightsError: (grpc.StatusCode.INTERNAL, "WEIGHTS"),
    NumericsError: (grpc.StatusCode.INTERNAL, "NUMERICS"),
    GoldenSetError: (grpc.StatusCode.INTERNAL, "GOLDEN_SET"),
    SettingsError: (grpc.StatusCode.INTERNAL, "SETTINGS"),
    KimiaError: (grpc.StatusCode.INTERNAL, "KIMIA"),
}
# Errors of the service: the code alone tells the class; the reason may be more exact.
_SERVICE: dict[type[ServiceError], grpc.StatusCode] = {
    RequestError: grpc.StatusCode.INVALID_ARGUMENT,
    StateError: grpc.StatusCode.FAILED_PRECONDITION,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    TurnCancelledError: grpc.StatusCode.CANCELLED,
    UnsupportedError: grpc.StatusCode.UNIMPLEMENTED,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    InternalError: grpc.StatusCode.INTERNAL,
    ServiceError: grpc.StatusCode.UNKNOWN,
}
_CODES: dict[int, grpc.StatusCode] = {code.value[0]: code for code in grpc.StatusCode}
_BY_REASON = {reason: kind for kind, (_, reason) in _LIBRARY.items()}
_BY_CODE = {code: kind for kind, code in _SERVICE.items()}


# ---- errors and failures ----------------------------------------------------------------------------------------


def to_failure(error: BaseException) -> Failure:
    """What is told of an error. Of an exception that is no KimiaError nothing is told: its text may hold anything."""
    if isinstance(error, UnavailableError) and error.__cause__ is not None:  # it names addresses within the service
        rule = "a part of the service cannot be reached; try again"
        return _failure(_of_class(_SERVICE, error), error.reason, rule, retry_after=_delay(error))
    if isinstance(error, ServiceError):
        code = _of_class(_SERVICE, error)
        return _failure(code, error.reason, error.rule, error.field, _delay(error))
    if isinstance(error, ConversationError | AudioError):
        code, reason = _of_class(_LIBRARY, error)
        return _failure(code, reason, error.rule, "" if error.index is None else f"messages[{error.index}]")
    if isinstance(error, KimiaError):
        code, reason = _of_class(_LIBRARY, error)
        return _failure(code, reason, str(error))
    return _failure(grpc.StatusCode.INTERNAL, "INTERNAL", "the service failed; the cause is in the service's log")


def from_failure(failure: Failure) -> KimiaError:
    """The error that `to_failure` was given: same class, same text, same field."""
    kind = _BY_REASON.get(failure.reason)
    if kind is not None and issubclass(kind, ConversationError | AudioError):
        index = re.fullmatch(r"messages\[(\d+)\].*", failure.field)
        return kind(failure.message, int(index[1]) if index else None)
    if kind is not None:
        return kind(failure.message)
    delay = failure.retry_delay.ToNanoseconds() / 1e9 if failure.HasField("retry_delay") else None
    service = _BY_CODE.get(_CODES.get(failure.code, grpc.StatusCode.UNKNOWN), InternalError)
    return service(failure.message, reason=failure.reason or None, field=failure.field, retry_after=delay)


def _failure(
    code: grpc.StatusCode, reason: str, message: str, field: str = "", retry_after: float | None = None
) -> Failure:
    failure = Failure(code=code.value[0], reason=reason, message=message, field=field)
    if retry_after is not None:
        failure.retry_delay.CopyFrom(_duration(retry_after))
    return failure


def _of_class(table: Mapping[Any, T], error: BaseException) -> T:
    """The entry of the error's class, or of the nearest class above it."""
    return next(table[kind] for kind in type(error).__mro__ if kind in table)


def _delay(error: ServiceError) -> float | None:
    """Seconds; an error of capacity always passes."""
    if error.retry_after is None and isinstance(error, CapacityError):
        return RETRY_SECONDS
    return error.retry_after


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(round(max(seconds, 0.0) * 1e9))
    return duration


# ---- failures and calls -----------------------------------------------------------------------------------------


def to_status(failure: Failure) -> Status:
    """A failure as a google.rpc rich status: ErrorInfo always, BadRequest with a field, RetryInfo with a delay."""
    message = _cut(failure.message)
    status = Status(code=failure.code, message=f"{failure.field}: {message}" if failure.field else message)
    status.details.add().Pack(details.ErrorInfo(reason=failure.reason, domain=DOMAIN))
    if failure.field:
        violation = details.BadRequest.FieldViolation(field=failure.field, description=message)
        status.details.add().Pack(details.BadRequest(field_violations=[violation]))
    if failure.HasField("retry_delay"):
        status.details.add().Pack(details.RetryInfo(retry_delay=failure.retry_delay))
    return status


def _cut(text: str) -> str:
    data = text.encode()
    return text if len(data) <= LONGEST_TEXT else data[:LONGEST_TEXT].decode(errors="ignore") + " ..."


def _of_status(status: Status) -> Failure | None:
    """The failure that a rich status tells of; None if the status is not one of ours."""
    failure, info = Failure(code=status.code, message=status.message), details.ErrorInfo()
    request, retry = details.BadRequest(), details.RetryInfo()
    for detail in status.details:
        if detail.Unpack(info):
            failure.reason = info.reason
        elif detail.Unpack(request) and request.field_violations:
            failure.field = request.field_violations[0].field
            failure.message = request.field_violations[0].description
        elif detail.Unpack(retry):
            failure.retry_delay.CopyFrom(retry.retry_delay)
    return failure if info.domain == DOMAIN else None


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> Never:
    """End a call with the rich status of an error."""
    await context.abort_with_status(rpc_status.to_status(to_status(to_failure(error))))


def from_rpc_error(error: grpc.RpcError) -> KimiaError:
    """The error that ended a call, of a blocking or an asyncio client: ours where the status carries one."""
    if not callable(getattr(error, "trailing_metadata", None)):
        return InternalError(f"the call failed: {error}")
    call = cast("grpc.Call", error)  # the errors of both kinds of client are calls too
    try:
        status = rpc_status.from_call(call)
        failure = None if status is None else _of_status(status)
    except (ValueError, DecodeError):  # something on the way has changed the status
        failure = None
    return _plain(call.code(), call.details() or "") if failure is None else from_failure(failure)


def _plain(code: grpc.StatusCode, text: str) -> KimiaError:
    """The error for a status that gRPC or something on the way made."""
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return _exhausted(text)
    if code is grpc.StatusCode.UNAVAILABLE:
        advice = "cannot reach the service; check its address and that it is running"
        return UnavailableError(f"{advice} ({text})", retry_after=RETRY_SECONDS)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError("the call took longer than its timeout; allow more time")
    if code is grpc.StatusCode.CANCELLED:
        return TurnCancelledError("the call was cancelled")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return UnsupportedError(f"the server at this address does not offer this method; check the address ({text})")
    kind = _BY_CODE.get(code, ServiceError)
    return kind(text or f"the call failed with {code.name}", reason=code.name)


def _exhausted(text: str) -> KimiaError:
    if "larger than max" in text:
        return RequestError(f"a message is larger than allowed; send smaller pieces ({text})", reason="MESSAGE_SIZE")
    return CapacityError(f"the service is at capacity; try again later ({text})", retry_after=RETRY_SECONDS)
