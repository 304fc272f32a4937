"""Processes that belong together: order, readiness, restarts, failures, clean ends."""

import asyncio
import io
import os
import signal
import sys
from pathlib import Path

import pytest

from kimia.cli import supervise
from kimia.cli.supervise import Console, Part, Supervisor
from kimia.errors import UnavailableError

pytestmark = pytest.mark.unit

SERVE = """
import pathlib, signal, sys, threading
name, folder = sys.argv[1], pathlib.Path(sys.argv[2])
stop = threading.Event()
def told(number, frame):
    with (folder / "ended").open("a") as ended:
        ended.write(name + "\\n")
    stop.set()
signal.signal(signal.SIGTERM, told)
with (folder / "begun").open("a") as begun:
    begun.write(name + "\\n")
print("hello from", name, flush=True)
(folder / name).write_text("ready")
stop.wait()
"""
FAILING = "import sys; print('loading'); print('the weights are missing'); sys.exit(3)"
STUBBORN = SERVE.replace("stop.set()", "pass")


def part(name: str, folder: Path, code: str = SERVE, grace: float = 5.0) -> Part:
    file = folder / name
    command = (sys.executable, "-c", code, name, str(folder))
    return Part(name, command, {}, file.exists, str(folder), grace, lambda: file.unlink(missing_ok=True))


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


def supervisor(output: io.StringIO, *stages: list[Part]) -> Supervisor:
    return Supervisor(stages, Console(output, ["up", *(part.name for stage in stages for part in stage)]))


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines()


async def seen(output: io.StringIO, text: str) -> None:
    """Wait until the console shows a text."""
    async with asyncio.timeout(10):
        while text not in output.getvalue():
            await asyncio.sleep(0.01)


async def test_stages_start_in_order_and_end_the_other_way_round(tmp_path, output) -> None:
    stages = [part("store", tmp_path)], [part("llm", tmp_path)], [part("control", tmp_path)]

    async def work() -> int:
        assert all((tmp_path / name).exists() for name in ("store", "llm", "control"))
        return 7

    assert await supervisor(output, *stages).run(work) == 7
    assert lines(tmp_path / "begun") == ["store", "llm", "control"]
    assert lines(tmp_path / "ended") == ["control", "llm", "store"]
    assert "llm     | hello from llm" in output.getvalue()
    assert "up      | llm is ready" in output.getvalue()


async def test_a_process_that_does_not_start_is_told_with_its_last_lines(tmp_path, output) -> None:
    stages = [part("store", tmp_path)], [part("llm", tmp_path, FAILING), part("tokenizer", tmp_path)]
    with pytest.raises(UnavailableError, match=r"llm did not start \(exit code 3\)") as raised:
        await supervisor(output, *stages).run(asyncio.Event().wait)
    assert "the weights are missing" in str(raised.value)
    assert "store" in lines(tmp_path / "ended")


async def test_a_program_that_does_not_exist(tmp_path, output) -> None:
    missing = Part("store", ("/no/such/program",), {}, lambda: False, str(tmp_path))
    with pytest.raises(UnavailableError, match="No such file"):
        await supervisor(output, [missing]).run(asyncio.Event().wait)


async def test_a_dead_process_starts_again(tmp_path, output, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "FIRST_PAUSE", 0.01)
    keeping = supervisor(output, [part("llm", tmp_path)])

    async def work() -> int:
        os.kill(keeping.stages[0][0].process.pid, signal.SIGKILL)
        await seen(output, "died (SIGKILL)")
        async with asyncio.timeout(10):
            while lines(tmp_path / "begun") != ["llm", "llm"] or not (tmp_path / "llm").exists():
                await asyncio.sleep(0.01)
        return 0

    assert await keeping.run(work) == 0
    assert lines(tmp_path / "ended") == ["llm"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_ends_everything(tmp_path, output, number) -> None:
    async def work() -> int:
        os.kill(os.getpid(), number)
        return await asyncio.get_running_loop().create_future()

    stages = [part("store", tmp_path)], [part("llm", tmp_path)]
    assert await supervisor(output, *stages).run(work, interrupted=130) == 130
    assert lines(tmp_path / "ended") == ["llm", "store"]


async def test_a_signal_during_the_start_ends_what_was_started(tmp_path, output) -> None:
    never = Part("llm", part("llm", tmp_path).command, {}, lambda: False, str(tmp_path))
    running = asyncio.create_task(supervisor(output, [part("store", tmp_path)], [never]).run(asyncio.Event().wait))
    await seen(output, "hello from llm")
    os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert lines(tmp_path / "ended") == ["llm", "store"]


async def test_a_process_that_does_not_end_is_killed(tmp_path, output) -> None:
    async def work() -> int:
        return 0

    await supervisor(output, [part("llm", tmp_path, STUBBORN, grace=0.05)]).run(work)
    assert "llm does not end; it is killed" in output.getvalue()


async def test_a_flood_without_line_ends_is_survived(tmp_path, output, monkeypatch) -> None:
    monkeypatch.setattr(supervise, "LONGEST_LINE", 1024)
    code = SERVE.replace("print(", "print('x' * 100_000); print(")

    async def work() -> int:
        await seen(output, "hello from llm")
        return 0

    assert await supervisor(output, [part("llm", tmp_path, code)]).run(work) == 0


def test_colour_is_for_terminals(monkeypatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    screen = Terminal()
    Console(screen, ["llm.1", "llm.2", "valkey"]).line("llm.2", "text")
    assert screen.getvalue() == "\x1b[36mllm.2  |\x1b[0m text\n"
    monkeypatch.setenv("NO_COLOR", "1")
    plain = Terminal()
    Console(plain, ["llm.1", "llm.2", "valkey"]).line("llm.2", "text")
    assert plain.getvalue() == "llm.2  | text\n"
