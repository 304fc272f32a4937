"""The life of a process: in this one with signals from a queue, and as a real process with real signals."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import grpc.aio
import pytest
import structlog

from kimia.errors import CheckpointError, SettingsError, UnavailableError
from kimia.runtime.fake import FakeDetokenizer, FakeLanguageModel, FakeTokenizer
from kimia.runtime.health import Health, probe
from kimia.runtime.service import StageService, checkpoint_name, consumer_name, in_thread, run_stage, serve
from kimia.runtime.settings import Settings
from kimia.stage import DETOKENIZER, LLM
from kimia.streams.ledger import Ledger
from kimia.streams.wire import Wire, WireOptions
from kimia.v1.stages_pb2 import SynthesizeRequest
from kimia.v1.stages_pb2_grpc import DetokenizerStub
from kimia.v1.turn_pb2 import Chunk, Step, Turn

pytestmark = pytest.mark.unit


class Scripted:
    """A service whose every phase waits for the test."""

    name = "scripted"

    def __init__(self, start_error=None, run_error=None, stubborn=False):
        self.start_error, self.run_error, self.stubborn = start_error, run_error, stubborn
        self.may_start, self.may_end, self.drained = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.draining = asyncio.Event()
        self.log = []

    def register(self, server):
        return ["kimia.v1.KimiAudio"]

    async def start(self):
        await self.may_start.wait()
        self.log.append("start")
        if self.start_error:
            raise self.start_error

    async def run(self):
        self.log.append("run")
        if self.run_error:
            raise self.run_error
        await self.drained.wait()

    async def drain(self, seconds):
        self.log.append(f"drain {seconds:g}")
        self.draining.set()
        if seconds:
            await self.may_end.wait()
        self.drained.set()

    async def aclose(self):
        self.log.append("close")


def until(path):
    """The address in a ready file, once it is there."""

    async def wait():
        while not path.exists():
            await asyncio.sleep(0.005)
        return path.read_text().strip()

    return wait()


@asynccontextmanager
async def living(service, tmp_path, **settings):
    """(task, signals, ready file) of a service that lives in this process."""
    ready, signals = tmp_path / "ready", asyncio.Queue()
    found = Settings(listen="127.0.0.1:0", ready_file=str(ready), drain_seconds=7, **settings)
    task = asyncio.create_task(serve(service, found, signals))
    yield task, signals, ready
    assert task.done()


async def test_a_life_from_start_to_drain(tmp_path, monkeypatch):
    service, states = Scripted(), []
    set_health = Health.set
    monkeypatch.setattr(Health, "set", lambda self, value: (states.append(value), set_health(self, value)))
    async with living(service, tmp_path) as (task, signals, ready):
        assert not ready.exists()
        service.may_start.set()
        address = await until(ready)
        assert states == [True]
        assert await asyncio.to_thread(probe, address) == "SERVING"
        assert await asyncio.to_thread(probe, address, "kimia.v1.KimiAudio") == "SERVING"
        signals.put_nowait("SIGTERM")
        await service.draining.wait()
        assert states == [True, False]  # said before anything is refused
        assert not ready.exists()
        assert await asyncio.to_thread(probe, address) == "NOT_SERVING"
        service.may_end.set()
        assert await task == 0
    assert service.log == ["start", "run", "drain 7", "close"]


async def test_until_it_is_ready_health_says_no(tmp_path):
    service = Scripted()
    with structlog.testing.capture_logs() as logs:
        async with living(service, tmp_path) as (task, signals, ready):
            while not (listening := [entry for entry in logs if entry["event"] == "listening"]):
                await asyncio.sleep(0)
            address = listening[0]["address"]
            assert await asyncio.to_thread(probe, address) == "NOT_SERVING"
            service.may_start.set()
            assert await until(ready) == address
            service.may_end.set()
            signals.put_nowait("SIGTERM")
            assert await task == 0
    order = [entry["event"] for entry in logs]
    assert order == ["listening", "serving", "signalled", "draining", "stopped"]


async def test_a_signal_before_it_is_ready_ends_it_cleanly(tmp_path):
    service = Scripted()
    async with living(service, tmp_path) as (task, signals, _):
        signals.put_nowait("SIGTERM")
        assert await task == 0
    assert service.log == ["close"]


async def test_a_second_signal_hands_over_at_once(tmp_path):
    service = Scripted()
    service.may_start.set()
    async with living(service, tmp_path) as (task, signals, ready):
        await until(ready)
        signals.put_nowait("SIGINT")
        await service.draining.wait()
        signals.put_nowait("SIGINT")
        assert await task == 0
    assert service.log == ["start", "run", "drain 7", "drain 0", "close"]


@pytest.mark.parametrize("phase", ["start_error", "run_error"])
async def test_errors_end_the_process(tmp_path, phase):
    service = Scripted(**{phase: CheckpointError("no such folder")})
    service.may_start.set()
    async with living(service, tmp_path) as (task, _, ready):
        with pytest.raises(CheckpointError):
            await task
        assert not ready.exists()
    assert service.log[-1] == "close"


async def test_what_blocks_in_a_thread_does_not_block_the_loop():
    import threading

    release = threading.Event()
    waiting = asyncio.create_task(in_thread(lambda: release.wait() and 3))
    await asyncio.sleep(0)
    assert not waiting.done()
    release.set()
    assert await waiting == 3
    with pytest.raises(ZeroDivisionError):
        await in_thread(lambda: 1 / 0)


def test_consumers_have_names_of_their_own():
    first, second = consumer_name("llm"), consumer_name("llm")
    assert first != second
    assert first.startswith("llm-")
    assert str(os.getpid()) in first


def test_features_are_named_after_what_made_them():
    stage = FakeTokenizer()
    names = {checkpoint_name(stage, Settings(model=name, dtype=dtype)) for name in "ab" for dtype in ("", "float16")}
    assert len(names) == 4
    stage.fingerprint = "0123abcd"
    assert checkpoint_name(stage, Settings()) == "0123abcd"


# ---- a stage ----------------------------------------------------------------------------------------------------


async def speak(address):
    """One direct turn; its last chunk."""
    async with grpc.aio.insecure_channel(address) as channel:
        step = Chunk(step=Step(code=5), final=True)
        call = DetokenizerStub(channel).Synthesize(
            iter([SynthesizeRequest(turn=Turn()), SynthesizeRequest(chunk=step)])
        )
        return [response.chunk async for response in call][-1]


async def test_a_stage_without_redis_serves_direct_clients(tmp_path):
    settings = Settings(redis_url="")
    service = StageService(lambda _: FakeDetokenizer(), DETOKENIZER, settings)
    async with living(service, tmp_path) as (task, signals, ready):
        assert (await speak(await until(ready))).final
        signals.put_nowait("SIGTERM")
        assert await task == 0


async def test_a_stage_with_redis_joins_the_pipeline_and_leaves_it(tmp_path, valkey_url):
    settings = Settings(redis_url=valkey_url, rows=3, lease_seconds=1)
    service = StageService(lambda _: FakeDetokenizer(), DETOKENIZER, settings)
    wire = await Wire.connect(valkey_url)
    ledger = Ledger(wire)
    async with living(service, tmp_path) as (task, signals, ready):
        address = await until(ready)
        while not (usage := (await ledger.usage())["detokenizer"]).workers:
            await asyncio.sleep(0.01)
        assert usage.capacity == 3
        for session in "abc":
            await ledger.reserve(session, "default", [DETOKENIZER], seconds=30)
        with pytest.raises(grpc.RpcError, match="reserved"):  # all rows are free, but promised to others
            await speak(address)
        for session in "abc":
            await ledger.release(session)
        assert (await speak(address)).final
        signals.put_nowait("SIGTERM")
        assert await task == 0
    usage = (await ledger.usage())["detokenizer"]
    assert (usage.capacity, usage.reserved) == (0, 0)
    await wire.aclose()


async def test_a_stage_with_other_partitions_than_the_others_does_not_start(tmp_path, valkey_url):
    wire = await Wire.connect(valkey_url, options=WireOptions(partitions=16))
    await wire.agree()
    service = StageService(lambda _: FakeDetokenizer(), DETOKENIZER, Settings(redis_url=valkey_url))
    async with living(service, tmp_path) as (task, _, _):
        with pytest.raises(SettingsError, match="used with 16 partitions, not with 1"):
            await asyncio.wait_for(task, 10)
    await wire.aclose()


@pytest.mark.parametrize(("kind", "rows", "said"), [(LLM, 3, False), (LLM, 4, True), (DETOKENIZER, 4, False)])
async def test_a_language_model_with_other_rows_than_its_neighbours_says_so(kind, rows, said, tmp_path, valkey_url):
    wire = await Wire.connect(valkey_url)
    ledger = Ledger(wire)
    await ledger.announce(kind, "beside", 3, 0)
    fake = {LLM: FakeLanguageModel, DETOKENIZER: FakeDetokenizer}[kind]
    service = StageService(lambda _: fake(), kind, Settings(redis_url=valkey_url, rows=rows))
    with structlog.testing.capture_logs() as logs:
        async with living(service, tmp_path) as (task, signals, ready):
            await until(ready)
            signals.put_nowait("SIGTERM")
            assert await task == 0
    found = [entry for entry in logs if entry["event"] == "other workers have other KIMIA_ROWS"]
    assert [(entry["rows"], entry["others"]) for entry in found] == [(4, [3])] * said
    await ledger.withdraw(kind, "beside")
    await wire.aclose()


@pytest.mark.parametrize(
    ("kind", "beside", "scheme", "refused"),
    [
        (LLM, "llm-1", "int8", True),
        (LLM, "llm+int8-1", "", True),
        (LLM, "llm+fp8-1", "int8", True),
        (LLM, "llm+int8-1", "int8", False),
        (LLM, "llm-1", "", False),
        (DETOKENIZER, "detokenizer-1", "int8", False),  # the setting is the language model's
    ],
)
async def test_workers_whose_weights_are_unlike_do_not_serve_together(
    kind, beside, scheme, refused, tmp_path, valkey_url
):
    wire = await Wire.connect(valkey_url)
    ledger = Ledger(wire)
    await ledger.announce(kind, beside, 4, 0)
    fake = {LLM: FakeLanguageModel, DETOKENIZER: FakeDetokenizer}[kind]
    service = StageService(lambda _: fake(), kind, Settings(redis_url=valkey_url, quantize=scheme))
    async with living(service, tmp_path) as (task, signals, ready):
        if refused:
            with pytest.raises(SettingsError, match=f"beside {re.escape(beside)}: .* KIMIA_QUANTIZE; set it alike"):
                await task
            assert (await ledger.usage())[kind.name].workers.keys() == {beside}
        else:
            await until(ready)
            signals.put_nowait("SIGTERM")
            assert await task == 0
    await ledger.withdraw(kind, beside)
    await wire.aclose()


async def test_while_the_pipeline_drains_direct_clients_are_refused(tmp_path):
    class SlowToLeave:
        def __init__(self):
            self.asked, self.may_end = asyncio.Event(), asyncio.Event()

        async def run(self):  # the service may come to it only now
            await self.may_end.wait()

        async def drain(self, seconds):
            self.asked.set()
            await self.may_end.wait()

    service, worker = StageService(lambda _: FakeDetokenizer(), DETOKENIZER, Settings(redis_url="")), SlowToLeave()
    async with living(service, tmp_path) as (task, signals, ready):
        address = await until(ready)
        service._worker = worker
        signals.put_nowait("SIGTERM")
        await worker.asked.wait()
        with pytest.raises(grpc.RpcError, match="starting or stopping"):
            await speak(address)
        worker.may_end.set()
        assert await task == 0


async def test_health_follows_the_server_that_computes_for_the_stage(tmp_path):
    class Host:
        def __init__(self):
            self.states, self.closed = asyncio.Queue(), False

        async def watch(self, tell):
            while True:
                tell(await self.states.get())

        async def aclose(self):
            self.closed = True

    stage = FakeDetokenizer()
    stage.host = Host()
    async with living(StageService(lambda _: stage, DETOKENIZER, Settings(redis_url="")), tmp_path) as (
        task,
        signals,
        ready,
    ):
        address = await until(ready)
        for there, state in ((False, "NOT_SERVING"), (True, "SERVING")):
            stage.host.states.put_nowait(there)
            while await asyncio.to_thread(probe, address) != state:
                await asyncio.sleep(0.005)
        signals.put_nowait("SIGTERM")
        assert await task == 0
    assert stage.host.closed


async def test_redis_may_come_later(tmp_path, valkey_url, monkeypatch):
    attempts, reach = [], Wire.connect

    async def connect(*arguments):
        attempts.append(arguments)
        if len(attempts) < 3:
            raise UnavailableError("the journal cannot be reached")
        return await reach(*arguments)

    monkeypatch.setattr(Wire, "connect", connect)
    monkeypatch.setattr("kimia.runtime.service.FIRST_RETRY_SECONDS", 0.001)
    service = StageService(lambda _: FakeDetokenizer(), DETOKENIZER, Settings(redis_url=valkey_url))
    with structlog.testing.capture_logs() as logs:
        async with living(service, tmp_path) as (task, signals, ready):
            await until(ready)
            signals.put_nowait("SIGTERM")
            assert await task == 0
    assert [entry["event"] for entry in logs].count("waiting for redis") == 2


async def test_a_signal_ends_the_wait_for_redis(tmp_path):
    service = StageService(lambda _: FakeDetokenizer(), DETOKENIZER, Settings(redis_url="redis://127.0.0.1:1/0"))
    with structlog.testing.capture_logs() as logs:
        async with living(service, tmp_path) as (task, signals, _):
            while "waiting for redis" not in [entry["event"] for entry in logs]:
                await asyncio.sleep(0)
            signals.put_nowait("SIGTERM")
            assert await task == 0


# ---- as a process -----------------------------------------------------------------------------------------------


class Process:
    """A stage as a child process; its log lines as they come."""

    def __init__(self, *command, **environment):
        settings = {"KIMIA_LISTEN": "127.0.0.1:0", "KIMIA_REDIS_URL": "", **environment}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("KIMIA_")}
        self.child = subprocess.Popen(
            [sys.executable, *command], env={**inherited, **settings}, stderr=subprocess.PIPE, text=True
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.child.kill()
        self.child.wait()
        self.child.stderr.close()

    def event(self, name):
        """The next log line of this event."""
        for line in self.child.stderr:
            entry = json.loads(line)
            if entry["event"] == name:
                return entry
        raise AssertionError(f"no line {name}")

    def end(self, number=None):
        """(exit code, remaining log lines)."""
        if number is not None:
            self.child.send_signal(number)
        lines = [json.loads(line) for line in self.child.stderr]
        return self.child.wait(), lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_process_says_where_it_listens_and_ends_when_told(number):
    with Process("-m", "kimia.runtime.fake", "detokenizer") as process:
        address = process.event("serving")["address"]
        assert asyncio.run(speak(address)).final
        code, lines = process.end(number)
        assert code == 0
        assert [line["event"] for line in lines][-3:] == ["signalled", "draining", "stopped"]


BROKEN = """
import sys
from kimia.errors import CheckpointError, SettingsError, UnavailableError
from kimia.runtime.service import run_stage
from kimia.stage import LLM
def build(settings):
    raise {error}
sys.exit(run_stage(build, LLM))
"""


def test_a_model_that_cannot_be_loaded_is_one_line_and_exit_code_1():
    with Process("-c", BROKEN.format(error="CheckpointError('no folder /models/x')")) as process:
        code, lines = process.end()
    assert code == 1
    (failed,) = [line for line in lines if line["level"] == "error"]
    assert (failed["event"], failed["error"]) == ("failed", "no folder /models/x")
    assert "exception" not in failed


def test_an_unforeseen_error_has_its_traceback_in_the_log():
    with Process("-c", BROKEN.format(error="RuntimeError('odd')")) as process:
        code, lines = process.end()
    assert code == 1
    assert "RuntimeError: odd" in lines[-1]["exception"]


def test_wrong_settings_are_one_line_and_exit_code_1():
    with Process("-m", "kimia.runtime.fake", "llm", KIMIA_ROWS="none") as process:
        code, lines = process.end()
    assert code == 1
    assert [line["event"] for line in lines] == ["not started"]
    assert "KIMIA_ROWS" in lines[0]["error"]


BUILDS_FOR_EVER = """
import sys
import torch
from kimia.runtime.service import run_stage
from kimia.stage import LLM
def build(settings):
    while True:  # what comes back from torch while Python ends aborts the process, if it may
        torch.mm(torch.ones(200, 200), torch.ones(200, 200))
sys.exit(run_stage(build, LLM))
"""


def test_a_process_that_still_loads_ends_when_told():
    with Process("-c", BUILDS_FOR_EVER) as process:
        process.event("listening")
        code, lines = process.end(signal.SIGTERM)
    assert code == 0
    assert lines[-1]["event"] == "stopped"


def test_settings_may_be_given_instead_of_read(monkeypatch):
    monkeypatch.setenv("KIMIA_ROWS", "none")
    monkeypatch.setattr("kimia.runtime.service.configure", lambda *_: None)  # the logs of the tests stay as they are
    settings = Settings.model_construct(listen="999.0.0.1:x", redis_url="")
    assert run_stage(lambda _: FakeLanguageModel(), FakeLanguageModel.kind, settings) == 1
