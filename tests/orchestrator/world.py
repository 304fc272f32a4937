"""A whole service in one event loop: a real journal, workers with fake stages, orchestrators behind real sockets."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager

import grpc
import pytest

from kimia.errors import KimiaError
from kimia.runtime.fake import FakeTiming
from kimia.runtime.server import build_server
from kimia.runtime.settings import Settings
from kimia.status import from_rpc_error
from kimia.streams.inbox import Inbox
from kimia.streams.ledger import Ledger
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT, ROLE_USER, Message, Text, TurnOptions
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub, add_KimiAudioServicer_to_server
from kimia.v1.turn_pb2 import Turn
from orchestrator.admission import Admission
from orchestrator.desk import Desk, Limits
from orchestrator.servicer import KimiAudio
from orchestrator.turn import Turns
from tests.runtime.workers import SECONDS, House

QUICK = FakeTiming(steps=40)
STEADY = FakeTiming(steps=60, step_seconds=0.002, realtime_factor=0.005)
ENDLESS = FakeTiming(steps=100_000, step_seconds=0.002, realtime_factor=0.002)

FORMAT = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
NATIVE = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=24000)
TEXT_ONLY = TurnOptions(output_type=OUTPUT_TYPE_TEXT)
PIECE = 3200  # bytes: 100 ms in FORMAT


def sound(pieces, salt=1):
    return bytes((salt * 17 + at // 320 + at) % 253 for at in range(pieces * PIECE))


def asks(text="hello"):
    return Message(role=ROLE_USER, text=Text(text=text))


def speaks(pieces=5, salt=1):
    return Message(role=ROLE_USER, audio=Clip(format=FORMAT, data=sound(pieces, salt)))


class Host:
    """One orchestrator."""

    def __init__(self, wire, owner, window, limits, settings):
        self.inbox = Inbox(wire, owner, look=0.5)
        self.desk = Desk(Turns(wire, self.inbox), Admission(Ledger(wire), window=window), limits)
        self.servicer = KimiAudio()
        self.server = build_server(settings)
        self.stub = None
        self.target = ""

    @asynccontextmanager
    async def running(self):
        add_KimiAudioServicer_to_server(self.servicer, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.target = f"127.0.0.1:{port}"
        async with self.inbox:
            self.servicer.open(self.desk)
            await self.server.start()
            options = [("grpc.use_local_subchannel_pool", 1)]
            async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options) as channel:
                self.stub = KimiAudioStub(channel)
                yield self
            await self.server.stop(0)
            await self.servicer.ended(SECONDS)
            await self.desk.aclose()


class World(House):
    """Workers, orchestrators, and what a client does."""

    def __init__(self, wire):
        super().__init__(wire)
        self.stack = AsyncExitStack()
        self.hosts = []

    async def __aexit__(self, *exc):
        await self.stack.aclose()
        await super().__aexit__(*exc)

    async def begin(self, timing=QUICK, rows=4, **settings):
        """Workers of all stages, known to the ledger, and one orchestrator."""
        self.start_fakes(timing, rows)
        await self.settled(rows)
        return await self.host(**settings)

    async def settled(self, rows):
        """Until the ledger knows so many rows in every stage."""
        async with asyncio.timeout(SECONDS):
            while any(stage.capacity != rows for stage in (await Ledger(self.wire).usage()).values()):
                await asyncio.sleep(0.002)

    async def host(self, window=30.0, limits=None, settings=None, wire=None):
        """One orchestrator, on a line of its own to the journal where one is given."""
        owner, settings = f"orchestrator-{len(self.hosts)}", settings or Settings(listen="127.0.0.1:0")
        host = Host(wire or self.wire, owner, window, limits or Limits(), settings)
        self.hosts.append(await self.stack.enter_async_context(host.running()))
        return host

    @property
    def stub(self):
        return self.hosts[0].stub

    # ---- clients ----

    async def generate(self, *messages, host=0, **fields):
        """All events of a turn."""
        request = pb.GenerateRequest(messages=messages or [asks()], **fields)
        async with asyncio.timeout(SECONDS):
            return [response.event async for response in self.hosts[host].stub.Generate(request)]

    async def resume(self, turn_id, last_audio=None, last_text=None, host=0):
        request = pb.ResumeRequest(turn_id=turn_id, last_audio_index=last_audio, last_text_index=last_text)
        async with asyncio.timeout(SECONDS):
            return [response.event async for response in self.hosts[host].stub.Resume(request)]

    async def session(self, session_id, tenant=""):
        request = pb.GetSessionRequest(session_id=session_id)
        request.caller.tenant = tenant
        return await self.stub.GetSession(request)

    @asynccontextmanager
    async def call(self, host=0, **config):
        """A call that is configured."""
        config.setdefault("input_format", FORMAT)
        call = Line(self.hosts[host].stub.Converse())
        await call.send(config=pb.CallConfig(**config))
        try:
            yield call
        finally:
            call.stream.cancel()

    # ---- what is left ----

    async def keys(self, session_id):
        return sorted([key.decode() async for key in self.wire.journal.scan_iter(f"*{session_id}*")])

    async def reserved(self):
        return {name: stage.reserved for name, stage in (await Ledger(self.wire).usage()).items()}

    def rows_used(self):
        return sum(worker._rows.used for worker in self.running)

    async def afterwards(self, calls=0):
        """Until so many calls are left, and everything is done that follows those that have ended."""
        desk, servicer = self.hosts[0].desk, self.hosts[0].servicer

        async def done():
            return servicer._running == calls and not desk._background

        await self.until_async(done)

    async def spec(self, turn_id):
        """The turn as the stages see it."""
        return (await self.journal.head(turn_id)).turn

    async def until_async(self, condition):
        async with asyncio.timeout(SECONDS):
            while not await condition():
                await asyncio.sleep(0.005)


class Line:
    """A client's end of a call."""

    def __init__(self, stream):
        self.stream = stream
        self.next_audio = 0
        self.seen = []

    async def send(self, **content):
        await self.stream.write(pb.ConverseRequest(**content))

    async def speak(self, pieces=5, salt=1):
        """Send sound and wait until it is stored."""
        data = sound(pieces, salt)
        for start in range(0, len(data), PIECE):
            piece = pb.CallerAudio(index=self.next_audio, data=data[start : start + PIECE])
            await self.send(audio=piece)
            self.next_audio += 1
        await self.until(lambda response: response.audio_received.index == self.next_audio - 1, "audio_received")

    async def read(self):
        """The next response. Raises the call's error."""
        async with asyncio.timeout(SECONDS):
            try:
                response = await self.stream.read()
            except grpc.RpcError as error:
                raise from_rpc_error(error) from None
        if response is not grpc.aio.EOF:
            self.seen.append(response)
            return response
        return None

    async def until(self, condition, content):
        """Read up to a response of this kind."""
        while (response := await self.read()) is not None:
            if response.WhichOneof("content") == content and condition(response):
                return response
        raise AssertionError(f"the call ended without {content}")

    async def ready(self):
        return (await self.until(lambda _: True, "ready")).ready

    async def event(self, kind):
        """Read up to an event of this kind."""
        return (await self.until(lambda response: response.event.HasField(kind), "event")).event

    async def turn(self):
        """All events of a turn, up to its end."""
        events = []
        while not events or events[-1].WhichOneof("content") not in ("done", "cancelled", "failed"):
            events.append((await self.until(lambda _: True, "event")).event)
        return events

    async def answer(self, **commit):
        """Commit, and wait for the end."""
        await self.send(commit=pb.Commit(**commit))
        return await self.turn()

    async def error(self):
        """The error that ends the call."""
        with pytest.raises(KimiaError) as caught:
            await self.until(lambda _: False, "")
        return caught.value


def kinds(events):
    return [event.WhichOneof("content") for event in events]


def text_of(events):
    deltas = [event.text for event in events if event.HasField("text")]
    return "".join(delta.text for delta in deltas)


def pcm_of(events):
    return b"".join(event.audio.data for event in events if event.HasField("audio"))


def indices(events, kind):
    return [getattr(event, kind).index for event in events if event.HasField(kind)]


def by_kind(events):
    """Events without the order of text and speech among one another, which nothing decides."""
    return {kind: [event for event in events if event.WhichOneof("content") == kind] for kind in kinds(events)}


def known(turn: Turn):
    """(codes, feature keys) of each clip of a spec."""
    clips = [m.audio if m.HasField("audio") else m.spoken.clip for m in turn.messages if not m.HasField("text")]
    return [(len(clip.codes), len(clip.feature_keys)) for clip in clips]
