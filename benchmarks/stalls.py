"""Stalls of the machine: a process of its own that wants to wake up every millisecond, and notes how late it is.

On a machine whose cores are all busy with the benchmark itself it is late as well; what it tells apart is a host that
takes its cores away. Each lateness of more than LIMITS[0] is kept with its times, on the monotonic clock, which all
processes of the machine share.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TICK = 0.001  # seconds
LIMITS = (5, 20, 100)  # ms


@contextmanager
def watched() -> Iterator[dict[str, Any]]:
    """Watch for stalls; afterwards the dict given says what was seen."""
    found: dict[str, Any] = {}
    command = [sys.executable, "-m", "benchmarks.stalls"]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()  # it ticks
        try:
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            found.update(json.loads(process.stdout.read()))


def main() -> None:
    """Tick until SIGTERM, then say how late it was."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    worst, ticks = 0.0, 0
    stalls: list[tuple[float, float]] = []  # begin and end
    over = dict.fromkeys(LIMITS, 0)
    print("ticking", flush=True)
    begun = time.perf_counter()
    while not stopped:
        due = time.perf_counter() + TICK
        time.sleep(TICK)
        now = time.perf_counter()
        late = 1e3 * (now - due)
        if late > LIMITS[0]:
            stalls.append((due, now))
        worst, ticks = max(worst, late), ticks + 1
        for limit in LIMITS:
            over[limit] += late > limit
    seconds = time.perf_counter() - begun
    counts = {f"over_{limit}_ms": count for limit, count in over.items()}
    print(json.dumps({"seconds": seconds, "ticks": ticks, "worst_ms": worst, **counts, "intervals": stalls}))


if __name__ == "__main__":
    main()
