"""A small house for tests: workers on one journal, turns asked of them, and their logs when they have ended."""

import asyncio

import pytest

from kimia.runtime.fake import build
from kimia.runtime.local import run_route
from kimia.runtime.rows import Rows
from kimia.runtime.worker import Worker
from kimia.stage import DETOKENIZER, LLM, STAGES, TOKENIZER
from kimia.streams import keys
from kimia.streams.inbox import Inbox
from kimia.streams.journal import Journal
from kimia.streams.keys import LOGS
from kimia.streams.wire import Wire
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message, Text
from kimia.v1.turn_pb2 import Chunk, InputAudio, Turn

ROUTE = (TOKENIZER, LLM, DETOKENIZER)
FORMAT = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
SECONDS = 10  # no test waits longer


def sound(codes, salt=1):
    return bytes((salt * 31 + i // 2560 * 7 + i) % 251 for i in range(codes * 2560))


def input_log(*clips, size=5000):
    """The input log of clips (number, bytes)."""
    parts = [(n, data[at : at + size], at + size >= len(data)) for n, data in clips for at in range(0, len(data), size)]
    return [
        Chunk(index=i, input=InputAudio(clip=n, data=data, clip_end=end), final=i == len(parts) - 1)
        for i, (n, data, end) in enumerate(parts)
    ]


def new_turn(*messages, route=ROUTE, session="", **fields):
    session = session or keys.new_session_id()
    made = messages or (Message(role=ROLE_USER, text=Text(text="hello")),)
    numbers = [kind.number for kind in route]
    return Turn(id=keys.new_turn_id(session), session_id=session, seed=7, route=numbers, messages=made, **fields)


def heard(number, **clip):
    return Message(role=ROLE_USER, audio=Clip(format=FORMAT, number=number, **clip))


def content(chunk):
    """What must be the same whoever computed it, and when."""
    copy = Chunk.FromString(chunk.SerializeToString())
    if copy.HasField("report"):
        copy.report.worker = ""
        copy.report.compute_seconds = 0
    if copy.HasField("encoded"):
        copy.encoded.features = b""
        copy.encoded.feature_key = ""
    if copy.HasField("speech"):
        copy.speech.mel = b""
        copy.speech.mel_key = ""
    return copy


class House:
    """Workers, and what an orchestrator does. Close it in the end."""

    def __init__(self, wire):
        self.wire = wire
        self.journal = Journal(wire)
        self.inbox = Inbox(wire, "orchestrator", look=0.05)  # nobody points it to the log `encoded`
        self.running = {}
        self.count = 0

    async def __aenter__(self):
        await self.inbox.__aenter__()
        return self

    async def __aexit__(self, *_):
        for worker in list(self.running):
            await self.kill(worker)
        await self.inbox.__aexit__()

    def start(self, stage, rows=4):
        self.count += 1
        worker = Worker(stage, self.wire, Rows(rows), f"{stage.kind.name}-{self.count}", "weights")
        self.running[worker] = asyncio.create_task(worker.run())
        return worker

    def start_fakes(self, timing, rows=4):
        return {name: self.start(build(name, timing), rows) for name in STAGES}

    async def kill(self, worker):
        """As when its process dies: nothing is given back."""
        task = self.running.pop(worker)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    async def leave(self, worker, seconds):
        await worker.drain(seconds)
        await self.running.pop(worker)

    async def ask(self, turn, given=(), worker=None):
        opened = await self.journal.open_turn(turn, "orchestrator")
        await self.journal.append_input(turn.id, opened.token, given)
        await self.journal.submit(turn, opened.token, worker)
        return turn.id

    async def ended(self, turn_id):
        with self.inbox.feed(turn_id) as feed:
            async with asyncio.timeout(SECONDS):
                return await feed.ended()

    async def until(self, turn_id, log, count):
        """Until a log has so many chunks."""
        with self.inbox.feed(turn_id) as feed:
            async with asyncio.timeout(SECONDS):
                async for chunk in feed.chunks(log):
                    if chunk.index + 1 >= count:
                        return

    async def logs(self, turn_id):
        return {name: [content(c) for c in await self.journal.read(turn_id, name)] for name in LOGS if name != "input"}


async def computed(turn, given, timing):
    """The same logs, by stages in one process."""
    logs = {"encoded": [], "tokens": [], "audio": []}
    stages = {name: build(name, timing) for name in STAGES}
    async for kind, chunk in run_route(stages, turn, given):
        logs[kind.writes].append(content(chunk))
    return logs


async def eventually(condition):
    """Until something is so that nobody announces."""
    async with asyncio.timeout(SECONDS):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.fixture
async def house(valkey_url):
    """Workers on a real server: none yet."""
    wire = await Wire.connect(valkey_url)
    async with House(wire) as house:
        yield house
    await wire.aclose()
