"""Schedules of faults: what goes wrong where, and when, as a pure function of a seed.

A part of the service passes named boundaries, again and again. A fault names the part, the boundary, and at which of
its passages what happens there.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

Boundary: TypeAlias = Literal["publish", "claim", "heartbeat", "ack", "read", "grpc_read", "grpc_write"]
Kind: TypeAlias = Literal["tasks", "processes"]

LEASE = 0.4  # seconds, of the services that schedules are run on
MOST_FAULTS = 7  # of one schedule
WAITS = (0.02, 0.1, 0.5 * LEASE, 3 * LEASE)  # seconds of a delay: the last one costs a worker its turns
PAUSE = 3 * LEASE  # seconds

DELAY = "delay"  # before it is done
LOSE_REQUEST = "lose the request"  # it never arrives
LOSE_ANSWER = "lose the answer"  # it is done, and who asked hears of a lost connection
DUPLICATE = "duplicate"  # it is done twice
ERROR = "error"  # the other side refuses
KILL_BEFORE, KILL_AFTER = "kill before", "kill after"  # the part ends; after: it has done it, and never hears of it
PAUSE_BEFORE = "pause"  # the part stands still for longer than a lease, and then goes on as if nothing had been

CALLS = (DELAY, LOSE_REQUEST, LOSE_ANSWER, DUPLICATE, ERROR)
LIVES = (KILL_BEFORE, KILL_AFTER, PAUSE_BEFORE)

# Boundaries of every part, and a passage that a part reaches in most runs.
STAGE_PASSAGES: Mapping[str, Mapping[Boundary, int]] = {
    "tokenizer": {"publish": 3, "claim": 8, "heartbeat": 3, "ack": 3, "read": 8},
    "llm": {"publish": 120, "claim": 8, "heartbeat": 4, "ack": 4, "read": 12},
    "detokenizer": {"publish": 14, "claim": 8, "heartbeat": 4, "ack": 4, "read": 60},
}
ORCHESTRATOR_PASSAGES: Mapping[Boundary, int] = {"publish": 12, "read": 80, "grpc_read": 4, "grpc_write": 80}
CLIENT_PASSAGES: Mapping[Boundary, int] = {"grpc_write": 10, "grpc_read": 250}


@dataclass(frozen=True)
class Fault:
    """At passage `nth` (from 1) of the boundary; `seconds` of a delay or a pause."""

    place: str
    boundary: Boundary
    nth: int
    action: str
    seconds: float = 0.0

    def __str__(self) -> str:
        lasting = f" {self.seconds:g} s" if self.seconds else ""
        return f"{self.place}: {self.boundary} {self.nth}: {self.action}{lasting}"


def draw(kind: Kind, seed: int) -> tuple[Fault, ...]:
    """The schedule of a seed. In a schedule of processes at least one is killed or paused."""
    chance = random.Random(f"{kind} {seed}")
    places = _places(kind)
    faults = [_fault(chance, kind, places, CALLS) for _ in range(chance.randint(2, MOST_FAULTS - 2))]
    faults += [_fault(chance, kind, places, LIVES) for _ in range(chance.randint(1 if kind == "processes" else 0, 2))]
    return tuple({(fault.place, fault.boundary, fault.nth): fault for fault in faults}.values())


def _places(kind: Kind) -> Mapping[str, Mapping[Boundary, int]]:
    """Where faults may happen: two workers of each stage, two orchestrators (as processes: one), the client."""
    stages = {f"{name}.{number}": passages for name, passages in STAGE_PASSAGES.items() for number in (1, 2)}
    control = ("orchestrator.1", "orchestrator.2") if kind == "tasks" else ("orchestrator",)
    return {**stages, **dict.fromkeys(control, ORCHESTRATOR_PASSAGES), "client": CLIENT_PASSAGES}


def _fault(
    chance: random.Random, kind: Kind, places: Mapping[str, Mapping[Boundary, int]], actions: Sequence[str]
) -> Fault:
    action = chance.choice(actions)
    mortal = [place for place in places if action not in LIVES or _may_die(kind, place)]
    place = chance.choice(mortal)
    boundaries = [name for name in places[place] if action != DUPLICATE or place == "client" or name != "grpc_read"]
    boundary = chance.choice(boundaries)
    nth = chance.randint(1, places[place][boundary])
    seconds = {DELAY: chance.choice(WAITS), PAUSE_BEFORE: PAUSE}.get(action, 0.0)
    return Fault(place, boundary, nth, action, seconds)


def _may_die(kind: Kind, place: str) -> bool:
    """Workers die as tasks too; an orchestrator that dies must be a process, the client is who looks on."""
    return place != "client" and (kind == "processes" or not place.startswith("orchestrator"))
