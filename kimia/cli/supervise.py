"""Processes that belong together: started, shown, restarted when they die, and stopped in order."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TextIO

from kimia.errors import UnavailableError

TAIL_LINES = 15  # of a process that failed
POLL_SECONDS = 0.05
PATIENCE_SECONDS = 10.0  # between two lines about what is being waited for
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0  # seconds before a restart
HEALTHY_SECONDS = 30.0  # of life, after which a death is no repetition
LONGEST_LINE = 1 << 20  # bytes
COLOURS = ("36", "35", "33", "34", "32", "31")  # of ANSI, one per group of processes
PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str  # "llm" or, with replicas, "llm.2"
    command: Sequence[str]
    environment: Mapping[str, str]
    is_ready: Callable[[], bool]  # asked again and again
    folder: str  # working directory
    grace: float = 10.0  # seconds from SIGTERM to SIGKILL
    reset: Callable[[], None] = lambda: None  # before each start
    quiet: bool = False  # its lines are shown only when it fails

    @property
    def group(self) -> str:
        """The name without the number of the replica."""
        return self.name.partition(".")[0]


class Console:
    """Where the processes' lines go: prefixed by their names, in colour on a terminal."""

    def __init__(self, stream: TextIO, names: Sequence[str]) -> None:
        self.stream = stream
        self.width = max(map(len, names), default=0)
        self.groups = list(dict.fromkeys(name.partition(".")[0] for name in names))
        self.coloured = stream.isatty() and "NO_COLOR" not in os.environ

    def line(self, name: str, text: str) -> None:
        """One line of a process."""
        prefix = f"{name:<{self.width}} |"
        group = name.partition(".")[0]
        if self.coloured and group in self.groups:
            prefix = f"\x1b[{COLOURS[self.groups.index(group) % len(COLOURS)]}m{prefix}\x1b[0m"
        print(prefix, text, file=self.stream, flush=True)


@dataclass(eq=False)
class _Running:
    """What is known of a part while it is kept alive."""

    part: Part
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=TAIL_LINES))
    process: asyncio.subprocess.Process | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    keeper: asyncio.Task[None] | None = None


class Supervisor:
    """Keeps parts alive, from `run` until a signal comes or the work is done.

    `stages` are groups in the order in which they are started; a group is started when the one before is ready, and
    they are stopped the other way round.
    """

    def __init__(self, stages: Sequence[Sequence[Part]], console: Console) -> None:
        self.stages = [[_Running(part) for part in parts] for parts in stages]
        self.console = console
        self._stopping = False
        self._signals = 0
        self._begun = time.monotonic()
        self._failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def run(self, work: Callable[[], Awaitable[int]], interrupted: int = 0) -> int:
        """Start everything, do the work, stop everything; the work's result, `interrupted` when a signal ended it.

        Raises UnavailableError, with its last lines, when a process ends before it is ready.
        """
        doing = asyncio.ensure_future(self._start_and(work))
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt, doing)
        try:
            return await doing
        except asyncio.CancelledError:
            return interrupted
        finally:
            await self._stop_all()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    # ---- starting ----

    async def _start_and(self, work: Callable[[], Awaitable[int]]) -> int:
        for stage in self.stages:
            for running in stage:
                running.keeper = asyncio.create_task(self._keep(running))
            await self._all_ready(stage)
        return await work()

    async def _all_ready(self, stage: Sequence[_Running]) -> None:
        waiting = asyncio.create_task(_each_ready(stage))
        try:
            while not waiting.done():
                tasks = (waiting, self._failure)
                done, _ = await asyncio.wait(tasks, timeout=PATIENCE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
                if self._failure in done:
                    self._failure.result()
                if not done:
                    names = ", ".join(running.part.name for running in stage if not running.ready.is_set())
                    self.console.line("up", f"waiting for {names}")
        finally:
            waiting.cancel()

    async def _keep(self, running: _Running) -> None:
        """Run one part for ever."""
        pause = FIRST_PAUSE
        while True:
            begun = time.monotonic()
            code = await self._live(running)
            if self._stopping:
                return
            if not running.ready.is_set():
                self._fail(running, code)
                return
            if time.monotonic() - begun > HEALTHY_SECONDS:
                pause = FIRST_PAUSE
            for line in running.tail if running.part.quiet else ():
                self.console.line(running.part.name, line)
            self.console.line("up", f"{running.part.name} died ({_reason(code)}); it starts again in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _live(self, running: _Running) -> int:
        """One life of a part; its exit code, negative for a signal."""
        part = running.part
        part.reset()
        try:
            running.process = await asyncio.create_subprocess_exec(
                *part.command,
                cwd=part.folder,
                env={**os.environ, **part.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C goes to this process, which stops the others in order
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
                limit=LONGEST_LINE,
            )
        except OSError as error:
            running.tail.append(f"{part.command[0]}: {error.strerror}")
            return 127
        watching = asyncio.create_task(self._watch(running))
        try:
            await self._show(running)
            return await running.process.wait()
        finally:
            watching.cancel()

    async def _show(self, running: _Running) -> None:
        """Print a process's lines until it closes its output."""
        output = running.process.stdout if running.process else None
        while output is not None:
            try:
                line = await output.readline()
            except ValueError:  # no line but a flood; what was read of it is dropped
                continue
            if not line:
                return
            text = line.decode("utf-8", "backslashreplace").rstrip()
            running.tail.append(text)
            if not running.part.quiet:
                self.console.line(running.part.name, text)

    async def _watch(self, running: _Running) -> None:
        """Say when a process is ready."""
        while not running.part.is_ready():
            await asyncio.sleep(POLL_SECONDS)
        running.ready.set()
        self.console.line("up", f"{running.part.name} is ready ({time.monotonic() - self._begun:.1f} s)")

    def _fail(self, running: _Running, code: int) -> None:
        if not self._failure.done():
            lines = "".join(f"\n  {line}" for line in running.tail) or "\n  (it printed nothing)"
            self._failure.set_exception(
                UnavailableError(f"{running.part.name} did not start ({_reason(code)}); its last lines:{lines}")
            )

    # ---- stopping ----

    def _interrupt(self, doing: asyncio.Future[int]) -> None:
        """The first signal stops in order, the second at once."""
        self._signals += 1
        if self._signals > 1:
            self._signal_all(signal.SIGKILL)
        elif not self._stopping:
            doing.cancel()

    async def _stop_all(self) -> None:
        self._stopping = True
        for stage in reversed(self.stages):
            await asyncio.gather(*(self._stop(running) for running in stage))
        if not self._failure.done():
            self._failure.cancel()

    async def _stop(self, running: _Running) -> None:
        if running.keeper is None:
            return
        process = running.process
        if process is None or process.returncode is not None:  # between two lives
            running.keeper.cancel()
        else:
            _send(process, signal.SIGTERM)
            done, _ = await asyncio.wait((running.keeper,), timeout=running.part.grace)
            if not done:
                self.console.line("up", f"{running.part.name} does not end; it is killed")
                _send(process, signal.SIGKILL)
        await asyncio.gather(running.keeper, return_exceptions=True)

    def _signal_all(self, number: signal.Signals) -> None:
        for stage in self.stages:
            for running in stage:
                if running.process is not None:
                    _send(running.process, number)


async def _each_ready(stage: Sequence[_Running]) -> None:
    for running in stage:
        await running.ready.wait()


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(number)


def _reason(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _die_with_parent() -> None:
    """Ask the kernel to end this process when its supervisor is killed."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
