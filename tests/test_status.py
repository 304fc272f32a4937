"""Errors on their way: to failures, to gRPC statuses over a real socket, and back."""

import subprocess
import sys

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from kimia import errors
from kimia.errors import (
    AudioError,
    CapacityError,
    ContextLengthError,
    ConversationError,
    InternalError,
    KimiaError,
    ParameterError,
    RequestError,
    ServiceError,
    StateError,
    TurnCancelledError,
    UnavailableError,
    UnsupportedError,
)
from kimia.status import abort, from_failure, from_rpc_error, to_failure, to_status
from kimia.v1.kimi_audio_pb2 import GetSessionRequest, GetSessionResponse
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub
from kimia.v1.turn_pb2 import Failure

pytestmark = pytest.mark.unit

METHOD = "/kimia.v1.KimiAudio/GetSession"
CLASSES = sorted(
    (kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, KimiaError)),
    key=lambda kind: kind.__name__,
)
EXAMPLES = [
    ConversationError("an audio message needs audio", 2),
    ConversationError("the conversation is empty"),
    ContextLengthError("the prompt has 9000 positions; shorten it", 0),
    ParameterError("temperature must be 0 or more, got -1"),
    AudioError("the clip is empty"),
    AudioError("the clip is empty", 3),
    RequestError("give 8000, 16000, 24000 or 48000", field="config.input_format.sample_rate"),
    RequestError("too large", reason="MESSAGE_SIZE"),
    StateError("the first message must be the configuration", field="config"),
    CapacityError("every row is taken", retry_after=0.25),
    TurnCancelledError("the caller spoke"),
    InternalError("given up after 3 attempts", reason="GAVE_UP"),
    ServiceError("something else"),
]


def same(first, second):
    assert type(first) is type(second)
    assert str(first) == str(second)
    for name in ("reason", "field", "index", "rule", "retry_after"):
        assert getattr(first, name, None) == getattr(second, name, None), name


def test_sound_that_is_wrong_names_its_message():
    assert to_failure(AudioError("the clip is empty", 3)).field == "messages[3]"


def test_clients_are_not_told_where_the_parts_of_the_service_are():
    error = UnavailableError("the journal cannot be reached (connecting to 10.0.0.7:6379)", retry_after=2.0)
    error.__cause__ = ConnectionError("connecting to 10.0.0.7:6379")
    failure = to_failure(error)
    assert "10.0.0.7" not in str(failure)
    assert (failure.code, failure.reason, failure.retry_delay.seconds) == (14, "UNAVAILABLE", 2)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_a_code_and_a_reason_and_comes_back(kind):
    failure = to_failure(kind("what to do"))
    assert failure.code in {code.value[0] for code in grpc.StatusCode} - {0}
    assert failure.reason.isupper()
    back = from_failure(failure)
    assert type(back) is kind
    assert str(back) == "what to do"


@pytest.mark.parametrize(
    ("kind", "code", "reason"),
    [
        ("ConversationError", "INVALID_ARGUMENT", "INVALID_CONVERSATION"),
        ("ContextLengthError", "INVALID_ARGUMENT", "CONTEXT_LENGTH"),
        ("ParameterError", "INVALID_ARGUMENT", "INVALID_PARAMETER"),
        ("AudioError", "INVALID_ARGUMENT", "INVALID_AUDIO"),
        ("RequestError", "INVALID_ARGUMENT", "INVALID_REQUEST"),
        ("StateError", "FAILED_PRECONDITION", "WRONG_STATE"),
        ("NotFoundError", "NOT_FOUND", "NOT_FOUND"),
        ("CapacityError", "RESOURCE_EXHAUSTED", "AT_CAPACITY"),
        ("DeadlineError", "DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        ("TurnCancelledError", "CANCELLED", "CANCELLED"),
        ("UnsupportedError", "UNIMPLEMENTED", "UNSUPPORTED"),
        ("UnavailableError", "UNAVAILABLE", "UNAVAILABLE"),
        ("InternalError", "INTERNAL", "INTERNAL"),
        ("CheckpointError", "INTERNAL", "CHECKPOINT"),
        ("NumericsError", "INTERNAL", "NUMERICS"),
    ],
)
def test_codes_and_reasons_are_stable(kind, code, reason):
    failure = to_failure(getattr(errors, kind)("x"))
    assert (failure.code, failure.reason) == (grpc.StatusCode[code].value[0], reason)


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
def test_failures_carry_everything(error):
    same(from_failure(Failure.FromString(to_failure(error).SerializeToString())), error)


def test_the_message_of_a_conversation_is_named_as_a_field():
    assert to_failure(ConversationError("no audio", 2)).field == "messages[2]"


def test_capacity_always_says_when_to_try_again():
    assert to_failure(CapacityError("full")).retry_delay.seconds == 1
    assert not to_failure(StateError("no")).HasField("retry_delay")


def test_unknown_exceptions_tell_nothing():
    failure = to_failure(RuntimeError("password=swordfish"))
    assert (failure.code, failure.reason) == (grpc.StatusCode.INTERNAL.value[0], "INTERNAL")
    assert "swordfish" not in str(failure)
    assert "log" in failure.message


def test_a_kind_derived_elsewhere_counts_as_the_nearest_class():
    class Shorter(ContextLengthError):
        pass

    assert to_failure(Shorter("x")).reason == "CONTEXT_LENGTH"


def test_a_failure_of_a_newer_version_still_gives_an_error():
    error = from_failure(Failure(code=5, reason="VOICE_NOT_FOUND", message="no such voice"))
    assert (type(error).__name__, error.reason) == ("NotFoundError", "VOICE_NOT_FOUND")
    assert isinstance(from_failure(Failure(code=16, reason="KEY", message="no")), ServiceError)
    assert isinstance(from_failure(Failure(code=99, message="no")), ServiceError)


def test_statuses_have_the_standard_details():
    status = to_status(to_failure(RequestError("too long", field="text", retry_after=2)))
    kinds = [detail.TypeName() for detail in status.details]
    assert kinds == ["google.rpc.ErrorInfo", "google.rpc.BadRequest", "google.rpc.RetryInfo"]
    info = error_details_pb2.ErrorInfo()
    status.details[0].Unpack(info)
    assert (info.reason, info.domain) == ("INVALID_REQUEST", "kimia")
    assert status.message == "text: too long"


# ---- over a socket ----------------------------------------------------------------------------------------------


class Refusing(grpc.GenericRpcHandler):
    """Answers every call with what it was given."""

    def __init__(self, answer):
        self.answer = answer

    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(self.answer, GetSessionRequest.FromString)


async def serving(answer, options=()):
    server = grpc.aio.server(options=options)
    server.add_generic_rpc_handlers((Refusing(answer),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, f"127.0.0.1:{port}"


async def refused(answer, *, timeout=None, server_options=(), client_options=(), session_id=""):
    """The error that a client makes of the answer."""
    server, address = await serving(answer, server_options)
    try:
        async with grpc.aio.insecure_channel(address, options=client_options) as channel:
            with pytest.raises(grpc.RpcError) as caught:
                await KimiAudioStub(channel).GetSession(GetSessionRequest(session_id=session_id), timeout=timeout)
        return from_rpc_error(caught.value)
    finally:
        await server.stop(None)


@pytest.mark.parametrize("error", EXAMPLES, ids=repr)
async def test_errors_cross_a_socket(error):
    async def answer(request, context):
        await abort(context, error)

    same(await refused(answer), error)


async def test_errors_reach_blocking_clients():
    import asyncio

    async def answer(request, context):
        await abort(context, ContextLengthError("shorten it", 3))

    def ask(address):
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as caught:
            KimiAudioStub(channel).GetSession(GetSessionRequest())
        return from_rpc_error(caught.value)

    server, address = await serving(answer)
    same(await asyncio.to_thread(ask, address), ContextLengthError("shorten it", 3))
    await server.stop(None)


async def test_long_texts_fit_into_headers():
    async def answer(request, context):
        await abort(context, RequestError("错" * 5000, field="text"))

    error = await refused(answer)
    assert isinstance(error, RequestError)
    assert error.field == "text"
    assert error.rule.startswith("错错错")


async def test_a_message_beyond_the_servers_limit():
    options = [("grpc.max_receive_message_length", 100)]
    error = await refused(None, server_options=options, session_id="x" * 200)
    assert isinstance(error, RequestError)
    assert error.reason == "MESSAGE_SIZE"
    assert "smaller" in str(error)


async def test_a_message_beyond_the_clients_own_limit():
    error = await refused(None, client_options=[("grpc.max_send_message_length", 100)], session_id="x" * 200)
    assert (type(error), error.reason) == (RequestError, "MESSAGE_SIZE")


async def test_an_answer_beyond_the_clients_limit():
    async def answer(request, context):
        return GetSessionResponse(session_id="x" * 200).SerializeToString()

    error = await refused(answer, client_options=[("grpc.max_receive_message_length", 100)])
    assert (type(error), error.reason) == (RequestError, "MESSAGE_SIZE")


async def test_no_connection():
    server, address = await serving(None)
    await server.stop(None)
    async with grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            await KimiAudioStub(channel).GetSession(GetSessionRequest())
    error = from_rpc_error(caught.value)
    assert isinstance(error, UnavailableError)
    assert "check its address" in str(error)
    assert error.retry_after == 1.0


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.UNIMPLEMENTED, UnsupportedError),
        (grpc.StatusCode.CANCELLED, TurnCancelledError),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, CapacityError),
        (grpc.StatusCode.INTERNAL, InternalError),
        (grpc.StatusCode.PERMISSION_DENIED, ServiceError),
        (grpc.StatusCode.INVALID_ARGUMENT, RequestError),
    ],
)
async def test_statuses_of_others(code, kind):
    async def answer(request, context):
        await context.abort(code, "from a proxy")

    error = await refused(answer)
    assert type(error) is kind
    assert str(error)


async def test_a_timeout_of_the_client():
    import asyncio

    async def answer(request, context):
        await asyncio.Event().wait()

    assert type(await refused(answer, timeout=0.05)) is errors.DeadlineError


async def test_rich_statuses_of_others_are_not_taken_for_ours():
    async def answer(request, context):
        status = to_status(to_failure(RequestError("x")))
        status.details[0].Pack(error_details_pb2.ErrorInfo(reason="CONTEXT_LENGTH", domain="example.org"))
        await context.abort_with_status(rpc_status.to_status(status))

    error = await refused(answer)
    assert (type(error), error.reason) == (RequestError, "INVALID_ARGUMENT")


async def test_a_damaged_status_still_gives_an_error():
    async def answer(request, context):
        context.set_trailing_metadata((("grpc-status-details-bin", b"\xff\xff"),))
        await context.abort(grpc.StatusCode.NOT_FOUND, "gone")

    assert isinstance(await refused(answer), errors.NotFoundError)


def test_an_error_that_is_no_call():
    assert isinstance(from_rpc_error(grpc.RpcError("boom")), InternalError)


def test_the_module_imports_neither_torch_nor_redis():
    code = "import sys, kimia.status; print({'torch', 'redis', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
