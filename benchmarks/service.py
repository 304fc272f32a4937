"""A service under `kimia up`, as its users start it: with a store, restarts, and processes that can be looked at."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fleet import ROOT, TICKS

START_SECONDS = 300.0  # a real model takes its time
STOP_SECONDS = 60.0
PAGE = os.sysconf("SC_PAGE_SIZE")
READY = re.compile(r"ready at (\S+)")
STORE = re.compile(r"kimia ps --redis (\S+)")
READY_FILE = re.compile(rb"(?:^|\0)KIMIA_READY_FILE=([^\0]+)")


@dataclass(frozen=True)
class Service:
    """A running service. `supervisor` is the pid of `kimia up`; None: somebody else's service."""

    address: str
    redis_url: str | None = None
    supervisor: int | None = None

    def processes(self) -> dict[str, int]:
        """The pid that each process has now; one that is being started again may be missing."""
        if self.supervisor is None:
            return {}
        pids = map(int, Path(f"/proc/{self.supervisor}/task/{self.supervisor}/children").read_text("ascii").split())
        return {name: pid for pid in pids if (name := _name(pid))}


def _name(pid: int) -> str:
    """`llm.2` or the like, from the file that a process of `kimia up` writes when ready; the store writes none."""
    with suppress(OSError):
        found = READY_FILE.search(Path(f"/proc/{pid}/environ").read_bytes())
        return Path(os.fsdecode(found[1])).name if found else "store"
    return ""


@dataclass(frozen=True)
class Use:
    """What a process has used since its start, and the bytes of memory it has now."""

    cpu_seconds: float
    rss: int
    waited_seconds: float = 0.0  # its main thread was ready to run and had no core


def use(pid: int) -> Use | None:
    """None when there is no such process."""
    with suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        waited = int(Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()[1]) / 1e9
        return Use((int(fields[11]) + int(fields[12])) / TICKS, int(fields[21]) * PAGE, waited)
    return None


@contextmanager
def up(arguments: Sequence[str], environment: Mapping[str, str]) -> Iterator[Service]:
    """`kimia up` with these arguments on a free port. Raises RuntimeError when it does not start."""
    command = [sys.executable, "-m", "kimia.cli", "up", "--port", "0", *arguments]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield _ready(process, output.fileno())
        finally:
            process.terminate()
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(process: subprocess.Popen[bytes], output: int) -> Service:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        words = os.pread(output, 1 << 20, 0).decode("utf-8", "replace")
        address, url = READY.search(words), STORE.search(words)
        if address and url:
            return Service(address[1], url[1], process.pid)
        time.sleep(0.05)
    raise RuntimeError(f"the service did not start; its last words:\n{os.pread(output, 1 << 20, 0)[-2000:].decode()}")
