"""The co-located host on a real server: the same turn, its death, its end, and whose fault a failure is."""

import asyncio
import shutil
import signal
import subprocess
import sys
from contextlib import asynccontextmanager

import pytest

import services.detokenizer.stage
import services.llm.stage
import services.tokenizer.stage
from kimia.errors import CheckpointError, UnavailableError
from kimia.runtime.fake import FakeTokenizer
from kimia.runtime.service import StageService, serve
from kimia.runtime.settings import Settings
from kimia.sound import encode
from kimia.stage import DETOKENIZER, LLM, TOKENIZER
from kimia.streams.ledger import Ledger
from services.colocated.host import STAGES, Host, check_memory, settings_of
from tests.golden_data import golden
from tests.model.plain_encoder import speech_like
from tests.runtime.test_service import Scripted
from tests.runtime.workers import input_log
from tests.services.turns import PCM16, heard, turn

pytestmark = [pytest.mark.parity, pytest.mark.timeout(300)]

HALT = 40  # steps: there is speech by then, and more to come
SOUND = encode(speech_like(20_000), PCM16)


@pytest.fixture
def settings(valkey_url) -> Settings:
    model = golden("e2e") / "model"
    return Settings(
        redis_url=valkey_url, model=str(model), device="cpu", listen="127.0.0.1:0", threads=1, llm_rows=2, preset=""
    )


@asynccontextmanager
async def living(service, settings: Settings):
    """(task, signals) of a service in this process; killed in the end, if it has not ended."""
    signals: asyncio.Queue[str] = asyncio.Queue()
    task = asyncio.create_task(serve(service, settings, signals))
    try:
        yield task, signals
    finally:
        await killed(task)


async def killed(task: asyncio.Task) -> None:
    """As when its process dies: nothing is given back."""
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


class Halting:
    """A stage that stops in the middle of a turn until it is told to go on."""

    def __init__(self, stage, after: int, go: asyncio.Event) -> None:
        self.kind, self._stage, self._after, self._go = stage.kind, stage, after, go
        self.warm_up = stage.warm_up

    async def run(self, turn, inbox, published=()):
        async for chunk in self._stage.run(turn, inbox, published):
            if turn.id and chunk.index >= self._after:
                await self._go.wait()
            yield chunk


def halting_host(settings: Settings, after: int, go: asyncio.Event) -> Host:
    """A host whose language model halts."""
    builds = {**STAGES, LLM: lambda found: Halting(STAGES[LLM](found), after, go)}
    return Host([StageService(build, kind, settings_of(kind, settings)) for kind, build in builds.items()])


def question(session: str):
    asked = turn([heard(0, PCM16)], seed=4, max_new_tokens=60)
    asked.id, asked.session_id, asked.caller.tenant = f"{session}.1", session, session  # nobody's sound is known
    return asked


async def answered(house, session: str) -> dict[str, list]:
    """The logs of a spoken turn."""
    asked = question(session)
    await house.ask(asked, input_log((0, SOUND), size=6400))
    await finished(house, asked.id)
    return await house.logs(asked.id)


async def finished(house, turn_id: str) -> None:
    with house.inbox.feed(turn_id) as feed:
        assert (await feed.ended()).state == "done"


async def reached(house, turn_id: str, log: str, count: int) -> None:
    with house.inbox.feed(turn_id) as feed:
        async for chunk in feed.chunks(log):
            if chunk.index + 1 >= count:
                return


# ---- turns ------------------------------------------------------------------------------------------------------


async def test_a_spoken_turn_is_that_of_stages_by_themselves_also_when_a_host_dies_in_it(settings, house):
    alone = [StageService(STAGES[kind], kind, settings_of(kind, settings)) for kind in STAGES]
    async with living(alone[0], settings), living(alone[1], settings), living(alone[2], settings):
        expected = await answered(house, "alone")
    assert len(expected["audio"]) > 1
    async with living(Host.of(settings), settings):
        assert await answered(house, "together") == expected
    asked = question("survivor")
    async with living(halting_host(settings, HALT, asyncio.Event()), settings):
        await house.ask(asked, input_log((0, SOUND), size=6400))
        await reached(house, asked.id, "tokens", HALT)
        await reached(house, asked.id, "audio", 1)
    before = await house.logs(asked.id)
    assert len(before["tokens"]) == HALT
    async with living(Host.of(settings), settings):
        await finished(house, asked.id)
    assert await house.logs(asked.id) == expected
    head = await house.journal.head(asked.id)
    assert {name: head.stages[name].take_overs for name in ("llm", "detokenizer")} == {"llm": 1, "detokenizer": 1}


async def announced(house) -> dict[str, list[int]]:
    """Rows of the workers of each stage."""
    usage = await Ledger(house.wire).usage()
    return {name: [worker.rows for worker in stage.workers.values()] for name, stage in usage.items()}


async def test_a_signal_drains_all_stages(settings, house):
    go, asked = asyncio.Event(), question("drained")
    async with living(halting_host(settings, HALT, go), settings) as (task, signals):
        await house.ask(asked, input_log((0, SOUND), size=6400))
        await reached(house, asked.id, "audio", 1)
        assert await announced(house) == {"tokenizer": [4], "llm": [2], "detokenizer": [4]}
        signals.put_nowait("SIGTERM")
        while any((await announced(house)).values()):  # nothing new is claimed, of any stage
            await asyncio.sleep(0.01)
        assert not task.done()
        go.set()
        assert await task == 0
    await finished(house, asked.id)


# ---- whose fault it is ------------------------------------------------------------------------------------------


def part(kind, build, settings: Settings) -> StageService:
    return StageService(build, kind, settings.model_copy(update={"redis_url": ""}))


def fails(_):
    raise CheckpointError("the weights are not there")


async def test_a_stage_that_does_not_load_ends_the_host_by_its_name(settings):
    built = []
    parts = [
        part(TOKENIZER, lambda _: built.append("tokenizer") or FakeTokenizer(), settings),
        part(LLM, fails, settings),
        part(DETOKENIZER, lambda _: built.append("detokenizer"), settings),
    ]
    async with living(Host(parts), settings) as (task, _):
        with pytest.raises(UnavailableError, match=r"^llm: the weights are not there$"):
            await task
    assert built == ["tokenizer"]


async def test_a_worker_that_fails_ends_the_others():
    well, ill = Scripted(), Scripted(run_error=CheckpointError("lost"))
    ill.name = "llm"
    with pytest.raises(UnavailableError, match=r"^llm: lost$"):
        await Host([well, ill]).run()
    assert well.log == ill.log == ["run"]
    assert not well.drained.is_set()  # it was ended, not drained


async def test_what_does_not_fit_is_said_before_anything_is_loaded(settings):
    built = []
    host = Host([part(LLM, lambda _: built.append("llm"), settings)], lambda: fails(None))
    with pytest.raises(CheckpointError):
        await host.start()
    assert not built


async def test_all_servers_that_compute_for_stages_must_answer():
    told, one, two = [], Watched("tokenizer"), Watched("detokenizer")
    watching = asyncio.create_task(Host([one, two]).watch(told.append))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    for part, answers in ((one, False), (two, False), (one, True), (two, True)):
        part.tell(answers)
    watching.cancel()
    assert told == [False, False, False, True]


class Watched:
    """A part whose server is told by the test."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def watch(self, tell) -> None:
        self.tell = tell
        await asyncio.Event().wait()


@pytest.mark.parametrize("kind", STAGES, ids=lambda kind: kind.name)
def test_the_language_model_alone_is_urgent(settings, monkeypatch, kind):
    asked = []
    for module in (services.tokenizer.stage, services.llm.stage, services.detokenizer.stage):
        monkeypatch.setattr(module, "own_stream", lambda device, urgent=False: asked.append((device.type, urgent)))
    STAGES[kind](settings)
    assert asked == [("cpu", kind is LLM)]


def test_rows_of_a_stage(settings):
    assert [settings_of(kind, settings).rows for kind in (TOKENIZER, LLM, DETOKENIZER)] == [4, 2, 4]
    check_memory(settings)  # on a CPU there is nothing to compare


# ---- as a process -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "its vocoder is damaged"])
def test_a_process_of_its_own(tmp_path, monkeypatch, whole):
    model = shutil.copytree(golden("e2e") / "model", tmp_path / "model")
    if not whole:
        (model / "vocoder" / "model.pt").write_bytes(b"no weights")
    vq = golden("e2e") / "glm-4-voice-tokenizer"
    chosen = {"MODEL": model, "VQ_TOKENIZER": vq, "REDIS_URL": "", "DEVICE": "cpu", "LISTEN": "127.0.0.1:0"}
    for name, value in chosen.items():
        monkeypatch.setenv(f"KIMIA_{name}", str(value))
    process = subprocess.Popen([sys.executable, "-m", "services.colocated"], stderr=subprocess.PIPE, text=True)
    lines = []
    for line in process.stderr:
        lines.append(line)
        if '"serving"' in line:
            process.send_signal(signal.SIGTERM)
    assert process.wait(60) == (0 if whole else 1), "".join(lines)
    process.stderr.close()
    if not whole:
        assert "detokenizer: " in lines[-1]
        assert not any("serving" in line for line in lines)
