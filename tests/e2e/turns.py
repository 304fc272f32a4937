"""Spoken turns against a deployment, one after another and several at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import grpc
from docker.models.containers import Container

from kimia.client import AsyncKimia, ClientOptions, Latency
from tests.e2e.deployment import ROOT, Deployment

QUESTION = ROOT / "tests/golden/e2e/audio/clip_a2.wav"  # 2.1 s of speech
CHAT = [{"role": "user", "message_type": "audio", "content": str(QUESTION)}]
SEED = 7
STEPS = 36  # of the language model: 2.4 s of answer
PATIENCE = ClientOptions(
    patience=60.0,  # seconds: a service at capacity is asked again
    channel=(("grpc.ssl_target_name_override", "localhost"),),  # the name in the test's certificate
)


@dataclass(frozen=True)
class Spoken:
    """What a turn gave."""

    turn_id: str
    text: str
    pcm: bytes
    latency: Latency

    def workers(self) -> dict[str, str]:
        """Stage name to the process that finished the turn there."""
        return {stage.stage: stage.worker for stage in self.latency.stages}


async def speak(deployment: Deployment, authority: bytes | None = None) -> Spoken:
    """One spoken turn, on a connection of its own to the orchestrators that run now; given an authority, with TLS."""
    credentials = None if authority is None else grpc.ssl_channel_credentials(authority)
    async with AsyncKimia(deployment.target(), credentials=credentials, options=PATIENCE) as kimia:
        answer = await kimia.generate(CHAT, seed=SEED, max_new_tokens=STEPS).collect()
    return Spoken(answer.turn_id, answer.text, answer.pcm, answer.latency)


@dataclass
class Load:
    """Callers that speak turn after turn."""

    turns: list[Spoken] = field(default_factory=list)
    failures: list[BaseException] = field(default_factory=list)

    def served(self, containers: Iterable[Container], since: int = 0) -> bool:
        """Whether each of these containers of a stage finished a turn there, of the turns from number `since` on."""
        workers = {worker for turn in self.turns[since:] for worker in turn.workers().values()}
        return all(any(container.id[:12] in worker for worker in workers) for container in containers)

    async def ended(self, turn_ids: Set[str]) -> None:
        """Wait until all of these turns have ended."""
        await self.until(lambda: turn_ids <= {turn.turn_id for turn in self.turns})

    async def served_again(self, container: Container) -> None:
        """Wait until a container has finished a turn that ended from now on."""
        since = len(self.turns)
        await self.until(lambda: self.served([container], since))

    async def until(self, reached: Callable[[], bool], turns: int = 60) -> None:
        """Wait until `reached`. Raises AssertionError at the first failed turn, and after so many turns without it."""
        last = len(self.turns) + turns
        while not reached():
            assert not self.failures, self.failures
            assert len(self.turns) < last, f"not reached within {turns} turns"
            await asyncio.sleep(0.1)

    def check(self, expected: Spoken) -> None:
        """No turn failed, and each gave the same as when nothing disturbed it. Raises AssertionError."""
        assert self.failures == []
        assert {turn.text for turn in self.turns} == {expected.text}
        assert {turn.pcm for turn in self.turns} == {expected.pcm}


@asynccontextmanager
async def load(deployment: Deployment, callers: int = 3) -> AsyncIterator[Load]:
    """Keep `callers` turns running inside the block; afterwards the running ones end. A failed turn ends its caller."""
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
