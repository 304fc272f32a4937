"""The whole service as real processes: an embedded store, three stages, an orchestrator."""

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
READY = re.compile(r"ready at (\S+)")
STORE = re.compile(r"kimia ps --redis (\S+)")


@dataclass(frozen=True)
class Service:
    """Where a running service is reached."""

    address: str
    redis_url: str


@contextmanager
def running(*arguments: str) -> Iterator[Service]:
    """`kimia up` with these arguments on a free port, stopped at the end."""
    command = [sys.executable, "-m", "kimia.cli", "up", "--port", "0", *arguments]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1", "KIMIA_THREADS": "1"}  # sums in the order of this process
    process = subprocess.Popen(
        command, cwd=ROOT, env=one_thread, text=True, stdout=subprocess.PIPE, stderr=(log := _Log()).writer()
    )
    try:
        yield _ready(process, log)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()
        log.close()


class _Log:
    """The last lines of a process, to be shown when it does not start; reading them never stops."""

    def __init__(self) -> None:
        read, self._write = os.pipe()
        self._reader = os.fdopen(read, errors="replace")
        self.lines: list[str] = []
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def writer(self) -> int:
        return self._write

    def close(self) -> None:
        os.close(self._write)
        self._thread.join(10)
        self._reader.close()

    def _follow(self) -> None:
        for line in self._reader:
            self.lines = [*self.lines[-40:], line]


def _ready(process: subprocess.Popen, log: _Log) -> Service:
    address = None
    for line in process.stdout:
        if found := READY.search(line):
            address = found[1]
        if (found := STORE.search(line)) and address:
            return Service(address, found[1])
    raise AssertionError("the service did not start:\n" + "".join(log.lines))
