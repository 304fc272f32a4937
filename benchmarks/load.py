"""Callers in a closed loop, and what they have waited for: each runs one turn after another through the SDK."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.fleet import Timing
from kimia.client import AsyncKimia, ClientOptions
from kimia.client.events import Answer
from kimia.runtime.fake import build
from kimia.runtime.local import run_route
from kimia.stage import STAGES, TOKENIZER
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.turn_pb2 import Chunk, InputAudio, Turn

MOMENTS = ("first_text", "first_audio", "total")
PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99.9": 99.9}
ENOUGH = {"p50": 1, "p99": 100, "p99.9": 1000}  # turns without which a percentile says nothing
QUESTION_RATE = 16000  # Hz


@dataclass(frozen=True)
class Load:
    """How many callers, how many turns of them all, and for how long at most."""

    callers: int
    turns: int
    seconds: float
    question_seconds: float = 2.0


@dataclass
class Results:
    """What came of a load. The first turn of every caller is left out."""

    seconds: float = 0.0
    speech_seconds: float = 0.0
    times: dict[str, list[float]] = field(default_factory=lambda: {moment: [] for moment in ("started", *MOMENTS)})
    workers: dict[str, Counter[str]] = field(default_factory=lambda: {name: Counter() for name in STAGES})
    turn_ids: list[str] = field(default_factory=list)
    begun: list[float] = field(default_factory=list)  # seconds of the wall clock, of the same turns

    @property
    def turns(self) -> int:
        return len(self.turn_ids)

    def add(self, answer: Answer, begun: float) -> None:
        """Count one turn."""
        for moment, times in self.times.items():
            seconds = getattr(answer.times, moment)
            if seconds is None:
                raise RuntimeError(f"turn {answer.turn_id} has no {moment}; is it a spoken one?")
            times.append(1e3 * seconds)
        for stage in answer.latency.stages:
            self.workers[stage.stage][stage.worker] += 1
        self.speech_seconds += answer.seconds
        self.turn_ids.append(answer.turn_id)
        self.begun.append(begun)

    def summary(self, floor: Mapping[str, float]) -> dict[str, Any]:
        """Percentiles in ms of what was added to `floor` (ms by moment), the number of turns, and their rate."""
        added = {moment: percentiles([t - floor[moment] for t in self.times[moment]]) for moment in MOMENTS}
        return {"turns": self.turns, "turns_per_second": self.turns / self.seconds, "added_ms": added}


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """The percentiles for which there are values enough."""
    enough = {name: len(values) >= ENOUGH[name] for name in PERCENTILES}
    return {name: float(np.percentile(values, q)) if enough[name] else None for name, q in PERCENTILES.items()}


def question(seconds: float) -> bytes:
    """Sound that no other turn has: signed 16 bit at QUESTION_RATE."""
    return random.randbytes(2 * round(seconds * QUESTION_RATE))


async def drive(address: str, load: Load) -> Results:
    """Run a load to its end."""
    results = Results()
    options = ClientOptions(patience=60.0)
    async with AsyncKimia(address, options=options) as kimia:
        await kimia.connect()
        await asyncio.gather(*(_turn(kimia, load) for _ in range(load.callers)))  # connections, scripts, caches
        left = iter(range(load.turns))
        begun = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(load.callers):
                group.create_task(_caller(kimia, load, left, results, begun + load.seconds))
        results.seconds = time.perf_counter() - begun
    return results


async def _caller(kimia: AsyncKimia, load: Load, left: Any, results: Results, end: float) -> None:
    while time.perf_counter() < end and next(left, None) is not None:
        begun = time.time()
        results.add(await _turn(kimia, load), begun)


async def _turn(kimia: AsyncKimia, load: Load) -> Answer:
    chats = [{"role": "user", "message_type": "audio", "content": (question(load.question_seconds), QUESTION_RATE)}]
    return await kimia.generate(chats, "both").collect()


# ---- the same without any transport -----------------------------------------------------------------------------


async def floor(timing: Timing, repeats: int = 5, question_seconds: float = 2.0) -> dict[str, float]:
    """Medians in ms of the same turn in one process, its stages joined by queues."""
    runs = [await _in_process(timing, question_seconds) for _ in range(repeats)]
    return {moment: float(np.median([run[moment] for run in runs])) for moment in MOMENTS}


async def _in_process(timing: Timing, question_seconds: float) -> dict[str, float]:
    fake = {name: build(name, _fake(timing)) for name in STAGES}
    form = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=QUESTION_RATE)
    turn = Turn(id="floor.1", seed=1, route=[kind.number for kind in STAGES.values()])
    turn.messages.append(Message(role=ROLE_USER, audio=Clip(format=form)))
    sound = Chunk(final=True, input=InputAudio(data=question(question_seconds), clip_end=True))
    marks: dict[str, float] = {}
    begun = time.perf_counter()
    async for kind, _ in run_route(fake, turn, [sound]):
        if kind is not TOKENIZER:
            marks.setdefault("first_text" if kind.name == "llm" else "first_audio", time.perf_counter() - begun)
    marks["total"] = time.perf_counter() - begun
    return {moment: 1e3 * seconds for moment, seconds in marks.items()}


def _fake(timing: Timing) -> Any:
    from kimia.runtime.fake import FakeTiming

    return FakeTiming(**vars(timing))
