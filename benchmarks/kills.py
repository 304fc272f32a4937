"""Kills by seed: which part of a running service dies when. The seed decides all of it, and so finds a run again.

    with killing(draw(seed=7, count=100, every=4.0), processes) as deaths: ...

Whoever runs the service sees to it that what dies is started again.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass

LOOK_SECONDS = 0.05
PARTS = ("tokenizer", "llm", "detokenizer", "orchestrator", "store")


@dataclass(frozen=True)
class Kill:
    """One process of a part is killed; `draw` chooses among its processes, in [0, 1)."""

    at: float  # seconds from the start, or whatever else a run is measured by
    part: str
    draw: float


@dataclass(frozen=True)
class Death:
    """A process that was killed, and when (time.monotonic)."""

    at: float
    name: str


def draw(seed: int, count: int, every: float, parts: Sequence[str] = PARTS) -> list[Kill]:
    """So many kills, one at a random moment of each stretch `every`, spread evenly over the parts."""
    chance = random.Random(seed)
    victims = [parts[number % len(parts)] for number in range(count)]
    chance.shuffle(victims)
    return [Kill((number + chance.random()) * every, part, chance.random()) for number, part in enumerate(victims)]


def carry_out(
    kills: Sequence[Kill],
    processes: Callable[[], Mapping[str, int]],
    tell: Callable[[Death], None],
    stop: threading.Event,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Kill with SIGKILL when the clock has come so far, until told to stop. `processes`: pids by name of what lives.

    A part of which nothing lives is waited for, so that every kill really kills.
    """
    begun, killed = clock(), set[int]()
    for kill in kills:
        while clock() - begun < kill.at or not (living := _living(kill.part, processes(), killed)):
            if stop.wait(LOOK_SECONDS):
                return
        name = sorted(living)[int(kill.draw * len(living))]
        os.kill(living[name], signal.SIGKILL)
        killed.add(living[name])
        tell(Death(time.monotonic(), name))


def _living(part: str, processes: Mapping[str, int], killed: Set[int]) -> dict[str, int]:
    return {name: pid for name, pid in processes.items() if name.partition(".")[0] == part and pid not in killed}


@contextmanager
def killing(kills: Sequence[Kill], processes: Callable[[], Mapping[str, int]]) -> Iterator[list[Death]]:
    """Carry them out while the block runs; who has died so far."""
    deaths: list[Death] = []
    stop = threading.Event()
    thread = threading.Thread(target=carry_out, args=(kills, processes, deaths.append, stop))
    thread.start()
    try:
        yield deaths
    finally:
        stop.set()
        thread.join()
