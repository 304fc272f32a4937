"""The process that notes when the machine stood still."""

import os
import signal
import time
from pathlib import Path

import pytest

from benchmarks.stalls import LIMITS, TICK, watched

pytestmark = pytest.mark.unit


def children():
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text("ascii").split()))


def test_a_stall_is_found_with_its_times():
    before = children()
    with watched() as found:
        (watcher,) = children() - before
        time.sleep(0.05)
        begun = time.monotonic()
        os.kill(watcher, signal.SIGSTOP)
        time.sleep(0.2)
        os.kill(watcher, signal.SIGCONT)
        ended = time.monotonic()
        time.sleep(0.05)
    begin, end = max(found["intervals"], key=lambda interval: interval[1] - interval[0])
    assert begin < ended
    assert end > begun + 0.2
    assert end - begin > 0.2 - 2 * TICK
    assert found["worst_ms"] == pytest.approx(1e3 * (end - begin))
    assert found["over_100_ms"] >= 1
    assert len(found["intervals"]) == found[f"over_{LIMITS[0]}_ms"]
