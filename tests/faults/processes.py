"""The service of `kimia up` as processes for tests that disturb it: kept alive by the same supervisor."""

from __future__ import annotations

import argparse
import io
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

from kimia.cli import supervise, up
from kimia.cli.supervise import Console, Part, Supervisor

TWO_EACH = ("--port", "0", "--replicas", *(f"{stage}=2" for stage in up.STAGES))
STORE = "valkey"
INTERRUPTED = 130


@dataclass
class Service:
    """The processes of a service, and what they have said."""

    plan: up.Plan
    parts: list[list[Part]]
    said: io.StringIO
    supervisor: Supervisor | None = None

    def processes(self) -> Mapping[str, int]:
        """Pids by name of those that live."""
        found = [running for group in self.supervisor.stages for running in group] if self.supervisor else []
        alive = [(running.part.name, running.process) for running in found]
        pids = {name: process.pid for name, process in alive if process and process.returncode is None}
        return {"store" if name == STORE else name: pid for name, pid in pids.items()}

    def change(self, edit: Callable[[Part], Part]) -> None:
        """Change what is started."""
        self.parts = [[edit(part) for part in group] for group in self.parts]

    def disturb(self) -> None:
        """Let every part but the store run its schedule: see `tests.faults.process`."""
        module = ("-m", "tests.faults.process")

        def disturbed(part: Part) -> Part:
            python, _, *words = part.command
            return replace(part, command=(python, *module, part.name, *words)) if part.name != STORE else part

        self.change(disturbed)

    async def run(self, work: Callable[[], Awaitable[int]]) -> None:
        """Start everything, do the work, stop everything. Who was killed starts again at once: it was no crash.

        Raises KeyboardInterrupt after a signal.
        """
        self.supervisor = Supervisor(self.parts, Console(self.said, []))
        with patch.object(supervise, "LONGEST_PAUSE", supervise.FIRST_PAUSE):
            if await self.supervisor.run(work, interrupted=INTERRUPTED) == INTERRUPTED:
                raise KeyboardInterrupt

    def errors(self) -> list[str]:
        """Lines that processes have logged as errors."""
        return [line for line in self.said.getvalue().splitlines() if '"level": "error"' in line]


@contextmanager
def service(*arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Service]:
    """The service that `kimia up` would start with these arguments, with a store of its own; nothing runs yet."""
    parser = argparse.ArgumentParser()
    up.configure(parser)
    args = parser.parse_args([*TWO_EACH, *arguments])
    args.port = up.free_port()
    every = {"KIMIA_LOG_FORMAT": "json", "KIMIA_LOG_LEVEL": "warning", "KIMIA_THREADS": "1", **(environment or {})}
    with up.store(None, None) as (url, store), up.scratch() as ready:
        plan = up.Plan(args, up.checkout_root(), url, ready)
        groups = [[store] if store else [], plan.stages(up.read_replicas(args.replicas)), [plan.orchestrator()]]
        found = Service(plan, groups, io.StringIO())
        found.change(lambda part: replace(part, environment={**part.environment, **every}))
        yield found


def syncing(found: Service, mode: str) -> None:
    """Let the store write its AOF to the disk `always` or `everysec`."""
    found.change(
        lambda part: replace(part, command=(*part.command, "--appendfsync", mode)) if part.name == STORE else part
    )
