"""A real gRPC server whose answers a test writes down: what it says, where it breaks off, what it was asked."""

import contextlib
from collections.abc import AsyncIterator, Callable

import grpc
import grpc.aio

from kimia.client import ClientOptions
from kimia.status import abort
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioServicer, add_KimiAudioServicer_to_server
from kimia.v1.turn_pb2 import STOP_REASON_AUDIO_EOD

FAST = ClientOptions(
    attempts=4,
    first_delay=0.001,
    longest_delay=0.005,
    channel=(("grpc.initial_reconnect_backoff_ms", 10), ("grpc.max_reconnect_backoff_ms", 20)),
)
NATIVE = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=24000)
TURN = "session.turn"

REST = object()  # an entry of a call's script: read until the client has finished


class Drop(Exception):
    """The connection breaks here."""

    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        self.code = code


def started(turn_id: str = TURN) -> pb.TurnEvent:
    return pb.TurnEvent(turn_id=turn_id, started=pb.TurnStarted(seed=7, session_id="session", output_format=NATIVE))


def text(index: int, characters: str = "", turn_id: str = TURN) -> pb.TurnEvent:
    return pb.TurnEvent(turn_id=turn_id, text=pb.TextDelta(index=index, text=characters or f"t{index} "))


def audio(index: int, turn_id: str = TURN) -> pb.TurnEvent:
    return pb.TurnEvent(turn_id=turn_id, audio=pb.AudioChunk(index=index, data=bytes([index, 0]) * 10))


def done(characters: str = "t0 t1 ", turn_id: str = TURN) -> pb.TurnEvent:
    usage = pb.Usage(prompt_positions=33, steps=20, audio_codes=5, audio_samples=9600)
    return pb.TurnEvent(turn_id=turn_id, done=pb.TurnDone(text=characters, stop=STOP_REASON_AUDIO_EOD, usage=usage))


WHOLE = [started(), text(0), audio(0), text(1), audio(1), done()]


class Scripted(KimiAudioServicer):
    """`generate`, `resume` and `converse` hold one list of events for each call that is expected, in order.

    An entry of such a list is an event, a Drop, an exception for `context.abort_with_status`, or, in a call, a
    function that is given the stream and may read from it.
    """

    def __init__(self) -> None:
        self.target = ""
        self.generate: list[list[object]] = []
        self.resume: list[list[object]] = []
        self.converse: list[list[object]] = []
        self.sessions: list[object] = []
        self.requests: list[object] = []
        self.heard: list[list[pb.ConverseRequest]] = []  # of each call, what was read by the script

    async def Generate(self, request, context):
        async for event in self._play(request, context, self.generate):
            yield pb.GenerateResponse(event=event)

    async def Resume(self, request, context):
        async for event in self._play(request, context, self.resume):
            yield pb.ResumeResponse(event=event)

    async def Converse(self, request_iterator, context):
        self.heard.append([])
        for entry in self.converse.pop(0):
            if entry is REST:
                self.heard[-1].extend([request async for request in request_iterator])
            elif callable(entry):
                self.heard[-1].extend([await anext(request_iterator) for _ in range(entry())])
            else:
                await self._break(entry, context)
                yield entry if isinstance(entry, pb.ConverseResponse) else pb.ConverseResponse(event=entry)

    async def GetSession(self, request, context):
        return await self._unary(request, context)

    async def DeleteSession(self, request, context):
        return await self._unary(request, context)

    async def _unary(self, request, context):
        self.requests.append(request)
        entry = self.sessions.pop(0)
        await self._break(entry, context)
        return entry

    async def _play(self, request, context, scripts):
        self.requests.append(request)
        for entry in scripts.pop(0):
            await self._break(entry, context)
            yield entry

    async def _break(self, entry, context):
        if isinstance(entry, Drop):
            await context.abort(entry.code, "cut by the test")
        if isinstance(entry, Exception):
            await abort(context, entry)


def ready(next_audio_index: int = 0) -> pb.ConverseResponse:
    return pb.ConverseResponse(
        ready=pb.CallReady(session_id="session", next_audio_index=next_audio_index, output_format=NATIVE)
    )


def received(index: int) -> pb.ConverseResponse:
    return pb.ConverseResponse(audio_received=pb.AudioReceived(index=index))


def read(count: int) -> Callable[[], int]:
    """An entry of a call's script: read so many requests."""
    return lambda: count


@contextlib.asynccontextmanager
async def serving(servicer: KimiAudioServicer, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The address of a server with this servicer."""
    server = grpc.aio.server(options=[("grpc.max_receive_message_length", 8 << 20)])
    add_KimiAudioServicer_to_server(servicer, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)
