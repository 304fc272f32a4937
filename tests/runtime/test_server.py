"""The server over a real socket: limits, errors, closing, TLS settings, reflection."""

import asyncio
import socket

import grpc
import grpc.aio
import pytest
import structlog
from grpc_reflection.v1alpha import reflection_pb2
from grpc_reflection.v1alpha.reflection_pb2_grpc import ServerReflectionStub

from kimia.errors import ContextLengthError, DeadlineError, InternalError, NumericsError, RequestError, SettingsError
from kimia.runtime.server import bind, build_server, offer_reflection
from kimia.runtime.settings import Settings
from kimia.status import from_rpc_error
from kimia.v1.kimi_audio_pb2 import (
    AudioChunk,
    ConverseRequest,
    ConverseResponse,
    GenerateRequest,
    GenerateResponse,
    GetSessionRequest,
    GetSessionResponse,
    TurnEvent,
)
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioServicer, KimiAudioStub, add_KimiAudioServicer_to_server

pytestmark = pytest.mark.unit

SETTINGS = Settings(listen="127.0.0.1:0")
SERVICE = "kimia.v1.KimiAudio"


class Scripted(KimiAudioServicer):
    """Does what a test says: unary, unary to stream, stream to stream."""

    def __init__(self, error=None, payload=b"", count=1):
        self.error = error
        self.payload = payload
        self.count = count
        self.closed = asyncio.Event()
        self.written = 0

    async def GetSession(self, request, context):
        if self.error:
            raise self.error
        return GetSessionResponse(session_id=request.session_id)

    async def Generate(self, request, context):
        try:
            for index in range(self.count):
                yield GenerateResponse(event=TurnEvent(audio=AudioChunk(index=index, data=self.payload)))
                self.written += 1
            if self.error:
                raise self.error
            await asyncio.Event().wait()
        finally:
            self.closed.set()

    async def Converse(self, request_iterator, context):
        async for _ in request_iterator:
            if self.error:
                raise self.error
            yield ConverseResponse()

    Resume = DeleteSession = None


class Serving:
    """A server with a servicer and a connected client."""

    def __init__(self, servicer, settings=SETTINGS, **options):
        self.servicer, self.settings, self.options = servicer, settings, options

    async def __aenter__(self):
        self.server = build_server(self.settings, **self.options)
        add_KimiAudioServicer_to_server(self.servicer, self.server)
        self.address = bind(self.server, self.settings)
        await self.server.start()
        self.channel = grpc.aio.insecure_channel(self.address)
        return KimiAudioStub(self.channel)

    async def __aexit__(self, *_):
        await self.channel.close()
        await self.server.stop(None)


async def error_of(awaitable):
    with pytest.raises(grpc.RpcError) as caught:
        await awaitable
    return from_rpc_error(caught.value)


async def collect(call):
    return [response async for response in call]


async def test_calls_go_through():
    async with Serving(Scripted()) as stub:
        assert (await stub.GetSession(GetSessionRequest(session_id="s"))).session_id == "s"
        call = stub.Converse(iter([ConverseRequest(), ConverseRequest()]))
        assert len(await collect(call)) == 2


@pytest.mark.parametrize("error", [ContextLengthError("shorten it", 1), RequestError("too long", field="say.text")])
async def test_errors_of_every_kind_of_method_reach_the_client(error):
    async with Serving(Scripted(error)) as stub:
        for call in (
            stub.GetSession(GetSessionRequest()),
            collect(stub.Generate(GenerateRequest())),
            collect(stub.Converse(iter([ConverseRequest()]))),
        ):
            told = await error_of(call)
            assert (type(told), str(told)) == (type(error), str(error))


async def test_unknown_exceptions_go_to_the_log_only():
    with structlog.testing.capture_logs() as logs:
        async with Serving(Scripted(RuntimeError("swordfish"))) as stub:
            for call in (stub.GetSession(GetSessionRequest()), collect(stub.Generate(GenerateRequest()))):
                told = await error_of(call)
                assert type(told) is InternalError
                assert "swordfish" not in str(told)
    failed = [entry for entry in logs if entry["event"] == "call failed"]
    assert {entry["method"] for entry in failed} == {f"/{SERVICE}/GetSession", f"/{SERVICE}/Generate"}
    assert all(entry["exc_info"] for entry in failed)


async def test_refusals_are_logged_without_the_sentence():
    with structlog.testing.capture_logs() as logs:
        async with Serving(Scripted(RequestError("swordfish", field="text"))) as stub:
            await error_of(stub.GetSession(GetSessionRequest()))
    (entry,) = [entry for entry in logs if entry["event"] == "call refused"]
    assert (entry["log_level"], entry["reason"], entry["field"]) == ("info", "INVALID_REQUEST", "text")
    assert "swordfish" not in str(entry)


async def test_internal_kimia_errors_are_logged_with_their_cause():
    with structlog.testing.capture_logs() as logs:
        async with Serving(Scripted(NumericsError("NaN in layer 3"))) as stub:
            assert type(await error_of(stub.GetSession(GetSessionRequest()))) is NumericsError
    (entry,) = [entry for entry in logs if entry["event"] == "call refused"]
    assert entry["log_level"] == "error"
    assert isinstance(entry["exc_info"], NumericsError)


async def test_a_generator_is_closed_when_its_client_vanishes():
    servicer = Scripted()
    async with Serving(servicer) as stub:
        call = stub.Generate(GenerateRequest())
        await call.read()
        call.cancel()
        await servicer.closed.wait()


async def test_a_client_that_does_not_read_is_given_up():
    servicer = Scripted(payload=bytes(1 << 20), count=10_000)
    async with Serving(servicer, stalled_seconds=0.1) as stub:
        call = stub.Generate(GenerateRequest())
        await servicer.closed.wait()
        assert servicer.written < 100
        told = await error_of(collect(call))
        assert type(told) is DeadlineError
        assert "read the answer" in str(told)


async def test_messages_beyond_the_limit_are_refused():
    async with Serving(Scripted(), Settings(listen="127.0.0.1:0", max_message_bytes=1 << 16)) as stub:
        assert (await stub.GetSession(GetSessionRequest(session_id="x" * 60_000))).session_id
        told = await error_of(stub.GetSession(GetSessionRequest(session_id="x" * 70_000)))
        assert (type(told), told.reason) == (RequestError, "MESSAGE_SIZE")


async def test_messages_far_beyond_the_limit_are_not_read():
    async with Serving(Scripted(), Settings(listen="127.0.0.1:0", max_message_bytes=1 << 16)) as stub:
        told = await error_of(stub.GetSession(GetSessionRequest(session_id="x" * 200_000)))
        assert (type(told), told.reason) == (RequestError, "MESSAGE_SIZE")


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x0a\x03\xff\xfe\xfd"], ids=["no message", "no UTF-8"])
async def test_bytes_that_are_no_message_are_refused(data):
    serving = Serving(Scripted())
    async with serving:
        one = serving.channel.unary_unary(f"/{SERVICE}/GetSession", request_serializer=bytes)
        many = serving.channel.stream_stream(f"/{SERVICE}/Converse", request_serializer=bytes)
        for call in (one(data), collect(many(iter([data]))), collect(many(iter([b"", data])))):
            told = await error_of(call)
            assert (type(told), told.reason) == (RequestError, "MALFORMED")


async def test_calls_beyond_the_limit_are_refused():
    async with Serving(Scripted(), Settings(listen="127.0.0.1:0", max_rpcs=1)) as stub:
        first = stub.Generate(GenerateRequest())
        await first.read()
        told = await error_of(stub.GetSession(GetSessionRequest()))
        assert type(told).__name__ == "CapacityError"
        first.cancel()


async def test_a_port_in_use_is_an_error():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        settings = Settings(listen=f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(SettingsError, match="KIMIA_LISTEN"):
            bind(build_server(settings), settings)


async def test_two_servers_do_not_share_a_port():
    async with Serving(Scripted()) as stub:
        assert stub
        taken = Settings(listen="127.0.0.1:0")
        first = build_server(taken)
        address = bind(first, taken)
        with pytest.raises(SettingsError, match="in use"):
            bind(build_server(taken), Settings(listen=address))


async def test_keepalive_and_its_counterpart_agree():
    from kimia.runtime.server import _options

    options = dict(_options(Settings(keepalive_seconds=30, max_connection_age_seconds=1e9)))
    assert options["grpc.keepalive_time_ms"] == 30_000
    assert options["grpc.http2.min_recv_ping_interval_without_data_ms"] <= options["grpc.keepalive_time_ms"]
    assert max(options.values()) < 2**31


@pytest.mark.parametrize(("present", "named"), [(False, "KIMIA_TLS_KEY"), (True, "KIMIA_TLS_CERTIFICATE")])
async def test_unusable_tls_files_are_named(tmp_path, present, named):
    key, chain = tmp_path / "key.pem", tmp_path / "chain.pem"
    if present:
        key.write_text("no key")
        chain.write_text("no certificate")
    settings = Settings(listen="127.0.0.1:0", tls_certificate=str(chain), tls_key=str(key))
    with pytest.raises(SettingsError, match=named):
        bind(build_server(settings), settings)


async def test_reflection_names_the_services():
    server = build_server(SETTINGS)
    offer_reflection(server, [SERVICE])
    address = bind(server, SETTINGS)
    await server.start()
    async with grpc.aio.insecure_channel(address) as channel:
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        (answer,) = await collect(ServerReflectionStub(channel).ServerReflectionInfo(iter([asked])))
    await server.stop(None)
    assert SERVICE in [service.name for service in answer.list_services_response.service]
