"""The life of a process: settings, logs, metrics, server, readiness, work, drain, exit code.

    raise SystemExit(run_stage(LanguageModelStage.load, LLM))      # a stage
    raise SystemExit(run_service(Orchestrator))                    # anything else that is a Service

1. settings are read, logs and metrics set up; the gRPC server answers, health says NOT_SERVING
2. `start`: weights are loaded, the stage warmed up, Redis reached (waiting for it as long as it takes)
3. health says SERVING, the ready file is written, `run` works
4. SIGTERM or SIGINT: health says NOT_SERVING, new work is refused, running turns end or are handed over within the
   drain time; exit code 0. A second signal hands over at once.

An error of `start` or `run` is one line in the log and exit code 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import grpc.aio

from kimia.errors import KimiaError, UnavailableError
from kimia.model.preset_file import adopt
from kimia.runtime import direct
from kimia.runtime.health import Health
from kimia.runtime.logs import configure, get_logger
from kimia.runtime.metrics import PARKED, ROWS, ROWS_USED, MetricsServer, start_metrics
from kimia.runtime.rows import Rows
from kimia.runtime.server import bind, build_server, offer_reflection
from kimia.runtime.settings import Settings, read_settings
from kimia.stage import LLM, Stage, StageKind
from kimia.streams.patience import end

if TYPE_CHECKING:
    from kimia.runtime.triton import TritonHost
    from kimia.runtime.worker import Worker
    from kimia.streams.ledger import Ledger
    from kimia.streams.wire import Wire

__all__ = ["Service", "StageService", "connect", "consumer_name", "in_thread", "run_service", "run_stage"]

FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 0.1, 5.0  # between attempts to reach Redis

PATIENCE_SECONDS = 5.0  # for a drain that does not keep to its time

BUILD = "build"  # name of a thread that may outlive the work

T = TypeVar("T")

log = get_logger()


class Service(Protocol):
    """What a process does besides being a process."""

    name: str  # on every log line

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """Add the servicers; the full names of their services. They refuse with UNAVAILABLE until `start` is done."""

    async def start(self) -> None:
        """Get ready, however long it takes. May be cancelled. Raises KimiaError when that is impossible."""

    async def run(self) -> None:
        """Work until drained."""

    async def drain(self, seconds: float) -> None:
        """Refuse new work; return when nothing runs any more, at the latest after so many seconds."""

    async def aclose(self) -> None:
        """Give back what `start` has taken, whether or not it was finished."""


@runtime_checkable
class Dependent(Protocol):
    """A service that cannot work without another server besides Redis."""

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Tell whenever that server falls silent or answers again."""


def run_stage(build: Callable[[Settings], Stage], kind: StageKind, settings: Settings | None = None) -> int:
    """One stage as a process: the pipeline's worker and the stage's own gRPC service. Returns the exit code."""
    return run_service(lambda found: StageService(build, kind, found), kind.name, settings)


def run_service(make: Callable[[Settings], Service], name: str, settings: Settings | None = None) -> int:
    """A service as a process, until SIGTERM or SIGINT. Returns the exit code."""
    try:
        found = settings or read_settings()
        adopt(filter(None, found.presets.split(",")), found.preset)
    except KimiaError as error:
        configure(Settings.model_construct(), name)
        log.error("not started", error=str(error))
        return 1
    configure(found, name)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code = runner.run(_supervised(make, found))
    _leave_builders(code)
    return code


def _leave_builders(code: int) -> None:
    """End here where something is still being built: a thread that comes back from torch into an interpreter that is
    being taken down aborts the process.
    """
    if any(thread.name == BUILD and thread.is_alive() for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop


# ---- the life of a process --------------------------------------------------------------------------------------


async def _supervised(make: Callable[[Settings], Service], settings: Settings) -> int:
    try:
        return await serve(make(settings), settings, _signals())
    except KimiaError as error:
        log.error("failed", error=str(error))
    except Exception:  # the process's edge
        log.exception("failed")
    return 1


def _signals() -> asyncio.Queue[str]:
    """SIGTERM and SIGINT as they come."""
    queue: asyncio.Queue[str] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, queue.put_nowait, number.name)
    return queue


async def serve(service: Service, settings: Settings, signals: asyncio.Queue[str]) -> int:
    """Live until a signal comes; the exit code. Raises what `start` and `run` raise."""
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(service.aclose)
        server = build_server(settings)
        names = service.register(server)
        health = Health(server, names)
        if settings.reflection:
            offer_reflection(server, names)
        address = bind(server, settings)
        stack.enter_context(_metrics(settings))
        await server.start()
        stack.push_async_callback(server.stop, None)
        log.info("listening", address=address, pid=os.getpid(), tls=bool(settings.tls_certificate))
        if not await _unless_signalled(service.start(), signals):
            log.info("stopped", before="ready")
            return 0
        working = asyncio.create_task(service.run())
        stack.push_async_callback(end, [working])
        with _ready_file(settings.ready_file, address):
            health.set(True)
            log.info("serving", address=address)
            async with _watched(service, health):
                await _unless_signalled(asyncio.shield(working), signals)
        health.close()
        await _drained(service, server, settings.drain_seconds, signals)
        await _ended(working)
        log.info("stopped")
        return 0


@contextlib.asynccontextmanager
async def _watched(service: Service, health: Health) -> AsyncIterator[None]:
    """Health follows what the service depends on, for as long as it serves."""
    if not isinstance(service, Dependent):
        yield
        return
    watching = asyncio.create_task(service.watch(health.set))
    try:
        yield
    finally:
        await end([watching])


async def _drained(service: Service, server: grpc.aio.Server, seconds: float, signals: asyncio.Queue[str]) -> None:
    """Let what runs end; another signal hands it over at once."""
    log.info("draining", seconds=seconds)
    if not await _unless_signalled(_drain(service, server, seconds), signals):
        await _drain(service, server, 0.0)


async def _drain(service: Service, server: grpc.aio.Server, seconds: float) -> None:
    """Calls go on being answered, if only by a refusal, until the service is drained."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    try:
        async with asyncio.timeout(seconds + PATIENCE_SECONDS):
            await service.drain(seconds)
    except TimeoutError:
        log.error("not drained in time")
    await server.stop(max(end - loop.time(), 0.0))


async def _ended(working: asyncio.Task[None]) -> None:
    """Wait for the work to notice that it is drained, but not for ever. Raises what it raises."""
    await asyncio.wait({working}, timeout=PATIENCE_SECONDS)
    if working.done():
        await working


async def _unless_signalled(work: Awaitable[Any], signals: asyncio.Queue[str]) -> bool:
    """Wait for the work; False when a signal came first, and the work is cancelled. Raises what the work raises."""
    working, signalled = asyncio.ensure_future(work), asyncio.create_task(signals.get())
    try:
        await asyncio.wait({working, signalled}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            log.info("signalled", signal=signalled.result())
            return False
        await working
        return True
    finally:
        await end([signalled, working])


@contextlib.contextmanager
def _metrics(settings: Settings) -> Iterator[None]:
    server: MetricsServer | None = None
    if settings.metrics_port:
        server = start_metrics(settings.metrics_port, settings.host)
    try:
        yield
    finally:
        if server is not None:
            server.close()


@contextlib.contextmanager
def _ready_file(name: str, address: str) -> Iterator[None]:
    """The address in a file for as long as the process serves; written whole or not at all."""
    if not name:
        yield
        return
    path = Path(name)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(f"{address}\n", encoding="ascii")
    draft.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


# ---- a stage ----------------------------------------------------------------------------------------------------


class StageService:
    """A stage with its rows, shared by the pipeline's worker and direct clients."""

    def __init__(self, build: Callable[[Settings], Stage], kind: StageKind, settings: Settings) -> None:
        self.name = kind.name
        self._build = build
        self._kind = kind
        self._settings = settings
        self._rows = Rows(settings.rows)
        self._direct = direct.Direct(kind, self._rows, settings)
        self._wire: Wire | None = None
        self._worker: Worker | None = None
        self._drained = asyncio.Event()
        self._host: TritonHost | None = None
        ROWS.labels(stage=kind.name).set(self._rows.count)
        ROWS_USED.labels(stage=kind.name).set_function(lambda: self._rows.used)
        PARKED.labels(stage=kind.name).set_function(lambda: self._rows.parked)

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """The stage's own service."""
        return [direct.register(self._direct, server)]

    async def start(self) -> None:
        """Load the weights, warm up, reach Redis. Raises CheckpointError and the like."""
        stage = await in_thread(lambda: self._build(self._settings))
        log.info("loaded")
        self._host = getattr(stage, "host", None)
        await stage.warm_up()
        log.info("warmed up")
        if not self._settings.redis_url:
            self._direct.open(stage)
            return
        from kimia.runtime.worker import Worker
        from kimia.streams.ledger import Ledger

        self._wire = await connect(self._settings)
        consumer = consumer_name(self.name, self._settings.quantize if self._kind is LLM else "")
        self._worker = Worker(stage, self._wire, self._rows, consumer, checkpoint_name(stage, self._settings))
        log.info("joining", consumer=consumer, rows=self._rows.count)
        ledger = Ledger(self._wire)
        await self._compare(ledger, consumer)
        self._direct.open(stage, ledger)

    async def _compare(self, ledger: Ledger, consumer: str) -> None:
        """A language model takes its place among those that are there, since their turns may become its own.

        Raises SettingsError when their weights are quantised otherwise. Where they compute another number of turns at
        once, that is said. It works; but products of another shape round otherwise, so a turn that changes hands may
        draw other ids.
        """
        if self._kind is not LLM:
            return
        with contextlib.suppress(UnavailableError):  # the worker waits until it can be reached
            await ledger.announce(self._kind, consumer, self._rows.count, 0)
            workers = (await ledger.usage())[self._kind.name].workers.values()
            others = sorted({worker.rows for worker in workers} - {self._rows.count})
            if others:
                log.warning("other workers have other KIMIA_ROWS", rows=self._rows.count, others=others)

    async def run(self) -> None:
        """Serve the pipeline; without one, wait for the end."""
        await (self._drained.wait() if self._worker is None else self._worker.run())

    async def watch(self, tell: Callable[[bool], None]) -> None:
        """Of the server that computes for the stage, if there is one."""
        if self._host is not None:
            await self._host.watch(tell)

    async def drain(self, seconds: float) -> None:
        """Refuse direct clients, hand the pipeline's turns over that do not end in time."""
        self._direct.close()
        self._drained.set()
        if self._worker is not None:
            await self._worker.drain(seconds)

    async def aclose(self) -> None:
        """Leave Redis, and the server that computes for the stage."""
        if self._wire is not None:
            await self._wire.aclose()
        if self._host is not None:
            await self._host.aclose()


def consumer_name(kind: str, mark: str = "") -> str:
    """A name that no other process has, and that tells an operator which one it is.

    Workers with another `mark` do not serve beside it (`Ledger.announce`).
    """
    kind = f"{kind}+{mark}" if mark else kind
    return f"{kind}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def checkpoint_name(stage: Stage, settings: Settings) -> str:
    """What features depend on besides the sound: the stage's own fingerprint, else the names of the models."""
    names = f"{settings.model}\0{settings.vq_tokenizer}\0{settings.dtype}".encode()
    return getattr(stage, "fingerprint", "") or hashlib.sha256(names).hexdigest()[:16]


async def connect(settings: Settings) -> Wire:
    """Reach Redis, trying again until it is there. Raises SettingsError where others use it with other partitions."""
    pause = FIRST_RETRY_SECONDS
    while True:
        try:
            return await _agreed(settings)
        except UnavailableError as error:
            log.warning("waiting for redis", error=str(error), retry_seconds=pause)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_RETRY_SECONDS)


async def _agreed(settings: Settings) -> Wire:
    from kimia.streams.wire import Wire

    wire = await Wire.connect(settings.redis_url, settings.blob_url or None, settings.wire_options())
    try:
        await wire.agree()
    except BaseException:
        await wire.aclose()
        raise
    return wire


async def in_thread(work: Callable[[], T]) -> T:
    """Run something long in a thread that does not keep the process from ending when it is told to meanwhile."""
    result: Future[T] = Future()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:  # noqa: BLE001  # raised where the result is awaited
            result.set_exception(error)

    threading.Thread(target=run, name=BUILD, daemon=True).start()
    return await asyncio.wrap_future(result)
