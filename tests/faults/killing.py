"""Kills by seed: which part of a running service dies when. The seed decides all of it, and so finds a run again.

    await carry_out(draw(seed=7, count=100, every=4.0), processes, tell)

Whoever runs the service sees to it that what dies is started again.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass

PARTS = ("tokenizer", "llm", "detokenizer", "orchestrator", "store")


@dataclass(frozen=True)
class Kill:
    """One process of a part is killed `at` seconds after the start; `draw` chooses among its processes, in [0, 1)."""

    at: float
    part: str
    draw: float


def draw(seed: int, count: int, every: float, parts: Sequence[str] = PARTS) -> list[Kill]:
    """So many kills, one at a random moment of each `every` seconds, spread evenly over the parts."""
    chance = random.Random(seed)
    victims = [parts[number % len(parts)] for number in range(count)]
    chance.shuffle(victims)
    return [Kill((number + chance.random()) * every, part, chance.random()) for number, part in enumerate(victims)]


async def carry_out(
    kills: Sequence[Kill],
    processes: Callable[[], Mapping[str, int]],
    tell: Callable[[str, float], None],
) -> None:
    """Kill at the given times, with SIGKILL. `processes`: pids by name ("llm.2") of those that live.

    `tell` hears of each kill: the name and the moment (time.perf_counter). A part of which nothing lives is waited for,
    so that every kill really kills.
    """
    begun, killed = time.perf_counter(), set[int]()
    for kill in kills:
        await asyncio.sleep(max(begun + kill.at - time.perf_counter(), 0.0))
        while not (living := _living(kill.part, processes(), killed)):
            await asyncio.sleep(0.05)
        name = sorted(living)[int(kill.draw * len(living))]
        os.kill(living[name], signal.SIGKILL)
        killed.add(living[name])
        tell(name, time.perf_counter())


def _living(part: str, processes: Mapping[str, int], killed: Set[int]) -> dict[str, int]:
    return {name: pid for name, pid in processes.items() if name.partition(".")[0] == part and pid not in killed}
