"""The whole service on this machine without a model: an embedded Valkey with AOF, fake stages, an orchestrator."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kimia.cli.up import answers, free_port, store_binary

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("tokenizer", "llm", "detokenizer")
START_SECONDS = 60.0
STOP_SECONDS = 10.0
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Timing:
    """How long the fake stages take, in seconds (KIMIA_FAKE_*), and the steps of an answer."""

    clip_seconds: float = 0.0
    prefill_seconds: float = 0.0
    step_seconds: float = 0.0
    realtime_factor: float = 0.0
    steps: int = 40

    def environment(self) -> dict[str, str]:
        return {f"KIMIA_FAKE_{name.upper()}": str(value) for name, value in vars(self).items()}


ZERO = Timing()
GPU = Timing(clip_seconds=0.05, prefill_seconds=0.1, step_seconds=0.02, realtime_factor=0.1)  # one busy GPU


@dataclass(frozen=True)
class Plan:
    """What is started: processes and rows of each stage, and how fast they are."""

    timing: Timing = ZERO
    replicas: Mapping[str, int] = field(default_factory=dict)  # those not named: 1
    rows: Mapping[str, int] = field(default_factory=dict)  # of one process; those not named: more than ever needed
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fleet:
    """A running service."""

    address: str
    redis_url: str
    processes: Mapping[str, int]  # name -> pid
    logs: Mapping[str, Path]  # name -> what the process said; gone with the fleet

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time that each process, and this one as its client, has used so far."""
        used = {name: _cpu_seconds(pid) for name, pid in self.processes.items()}
        return {**used, "client": _cpu_seconds(os.getpid())}


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


@contextmanager
def valkey(*, append_only: bool = True) -> Iterator[tuple[str, int]]:
    """An embedded store in a folder of its own; its URL and pid. Its AOF is rewritten only when it is told to."""
    with tempfile.TemporaryDirectory(prefix="kimia-bench-", ignore_cleanup_errors=True) as folder:
        port = free_port()
        settings = {
            "bind": "127.0.0.1",
            "port": port,
            "dir": folder,
            "save": "",
            "appendonly": "yes" if append_only else "no",
            "auto-aof-rewrite-percentage": 0,
            "loglevel": "warning",
        }
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        with _process([store_binary(), *words], {}, Path(folder) / "log") as process:
            _wait(lambda: answers(port), process, "valkey", Path(folder) / "log")
            yield f"redis://127.0.0.1:{port}/0", process.pid


@contextmanager
def running(plan: Plan) -> Iterator[Fleet]:
    """Start everything of a plan; stop it in the end."""
    with ExitStack() as stack:
        url, pid = stack.enter_context(valkey())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="kimia-bench-")))
        pids = {"valkey": pid}
        started = []
        for name, module, extra in _modules(plan):
            file, log = folder / name, folder / f"{name}.log"
            environment = {
                "KIMIA_REDIS_URL": url,
                "KIMIA_LISTEN": "127.0.0.1:0",
                "KIMIA_READY_FILE": str(file),
                "KIMIA_DRAIN_SECONDS": "1",
                "KIMIA_LOG_LEVEL": "warning",
                "KIMIA_TURN_TTL_SECONDS": "60",
                **plan.timing.environment(),
                **plan.environment,
                **extra,
            }
            process = stack.enter_context(_process([sys.executable, "-m", *module], environment, log))
            started.append((name, process, file, log))
            pids[name] = process.pid
        for name, process, file, log in started:
            _wait(file.exists, process, name, log)
        logs = {name: log for name, _, _, log in started}
        yield Fleet((folder / "orchestrator").read_text(encoding="ascii").strip(), url, pids, logs)


def _modules(plan: Plan) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """(name, module and arguments, environment) of every process."""
    for stage in STAGES:
        count = plan.replicas.get(stage, 1)
        for number in range(1, count + 1):
            name = stage if count == 1 else f"{stage}.{number}"
            yield name, ["kimia.runtime.fake", stage], {"KIMIA_ROWS": str(plan.rows.get(stage, 1024))}
    yield "orchestrator", ["orchestrator"], {}


@contextmanager
def _process(command: list[str], environment: Mapping[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A child process whose output goes to a file."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], name: str, log: Path) -> None:
    """Until a process is ready. Raises RuntimeError with its last words when it ends or takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            words = log.read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(f"{name} did not start; its last words:\n{words}")
        time.sleep(0.02)


def run(main: Coroutine[Any, Any, T]) -> T:
    """asyncio.run on uvloop, as the service's processes do."""
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
