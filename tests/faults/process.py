"""A part of the service as a process with its schedule: python -m tests.faults.process PLACE MODULE [ARGUMENT ...]

The schedule is that of the seed in KIMIA_FAULT_SCHEDULE. What is done of it is first written to the folder
KIMIA_FAULT_RECORD, a file for each place; a process that starts again finds the file and goes undisturbed.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
from pathlib import Path
from unittest.mock import patch

from tests.faults.injection import Injector, disturbed_server, wire_of
from tests.faults.schedule import Fault, draw


class Process:
    """The life of a part that is a process of its own."""

    async def alive(self) -> None:
        """Who asks is alive."""

    async def die(self) -> None:
        """End, without a farewell."""
        os.kill(os.getpid(), signal.SIGKILL)

    async def pause(self, seconds: float) -> None:
        """Stand still until somebody sends SIGCONT."""
        os.kill(os.getpid(), signal.SIGSTOP)


def injector_of(place: str) -> Injector:
    """The injector of this process, from its environment."""
    record = Path(os.environ["KIMIA_FAULT_RECORD"]) / place
    faults = () if record.exists() else draw("processes", int(os.environ["KIMIA_FAULT_SCHEDULE"]))
    record.touch()

    def tell(fault: Fault) -> None:
        with record.open("a", encoding="utf-8") as file:
            file.write(f"{fault}\n")

    return Injector(place, faults, Process(), tell)


def main() -> None:
    """Run a module as if it had been run itself."""
    place, module, *arguments = sys.argv[1:]
    injector = injector_of(place)
    sys.argv = [module, *arguments]
    with patch("kimia.streams.wire.Wire", wire_of(injector)), disturbed_server(injector):
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
