"""Spoken turns against a deployment, one after another and several at once."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from kimia.client import AsyncKimia, ClientOptions, Latency
from tests.e2e.deployment import ROOT, Deployment

QUESTION = ROOT / "tests/golden/e2e/audio/clip_a2.wav"  # 2.1 s of speech
CHAT = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
SEED = 7
STEPS = 36  # of the language model: 2.4 s of answer
PATIENCE = ClientOptions(patience=60.0)  # seconds: a service at capacity is asked again


@dataclass(frozen=True)
class Spoken:
    """What a turn gave."""

    text: str
    pcm: bytes
    latency: Latency

    def workers(self) -> dict[str, str]:
        """Stage name to the process that finished the turn there."""
        return {stage.stage: stage.worker for stage in self.latency.stages}


async def speak(deployment: Deployment, seed: int = SEED) -> Spoken:
    """One spoken turn, on a connection of its own to the orchestrators that run now."""
    async with AsyncKimia(deployment.target(), options=PATIENCE) as kimia:
        answer = await kimia.generate(CHAT, seed=seed, max_new_tokens=STEPS).collect()
    return Spoken(answer.text, answer.pcm, answer.latency)


@dataclass
class Load:
    """Callers that speak turn after turn."""

    turns: list[Spoken] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def workers(self) -> dict[str, set[str]]:
        """Stage name to the processes that finished turns there."""
        seen: dict[str, set[str]] = defaultdict(set)
        for turn in self.turns:
            for stage, worker in turn.workers().items():
                seen[stage].add(worker)
        return seen


@asynccontextmanager
async def load(deployment: Deployment, callers: int = 3) -> AsyncIterator[Load]:
    """Keep `callers` turns running inside the block; afterwards the running ones end."""
    state, stop = Load(), asyncio.Event()

    async def caller() -> None:
        while not stop.is_set():
            try:
                state.turns.append(await speak(deployment))
            except Exception as error:  # noqa: BLE001  # every failure is a finding
                state.failures.append(error)
                return

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
        try:
            yield state
        finally:
            stop.set()
