"""How far a stage may run ahead of the caller's ear, and what it does beyond that: its row is parked.

Speech that is given out and not yet heard is the lead. The last stage gives out the chunk that reaches playback + lead
and then parks; the stage before it may run to the last code of that chunk, so both stop and go on at the same position
and neither waits for the other. A turn is paced from the first time its client says how far it was heard. Between two
such reports the caller is taken to hear in real time, so reports may be rare, and a turn whose client has vanished goes
on to its end; at its deadline it is paced no longer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from kimia.model.schedule import find_schedule
from kimia.runtime.metrics import ROW_WAIT
from kimia.runtime.rows import Row
from kimia.stage import CODE_SECONDS, DETOKENIZER, LLM, StageKind, route_of
from kimia.streams.journal import Playback
from kimia.v1.turn_pb2 import Chunk, Turn

SAMPLE_BYTES = 2


class Pace:
    """The position of one turn's stage against that of its caller. Times are seconds of `clock`, which never jumps."""

    def __init__(self, turn: Turn, kind: StageKind, lead: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ParameterError for an unknown preset."""
        speaks = DETOKENIZER in route_of(turn)
        self.paced = speaks and kind in (LLM, DETOKENIZER)
        self._lead = lead
        self._clock = clock
        self._schedule = find_schedule(turn.options.preset) if speaks and kind is LLM else None
        self._codes = 0
        self._reach = 0.0  # seconds of speech that the chunks made so far are enough for
        self._start: float | None = None  # when the caller would have begun to hear, had nothing interrupted it
        self._end = clock() + turn.deadline.ToMicroseconds() / 1e6 - time.time() if turn.HasField("deadline") else None

    def made(self, chunk: Chunk) -> None:
        """The stage has made its next chunk. Behind the last one there is nothing to wait for."""
        if self._schedule is None:
            self._reach += sound_seconds(chunk)
        else:
            self._codes += chunk.step.HasField("code")
            self._reach = self._schedule.spoken(self._codes) * CODE_SECONDS
        self.paced = self.paced and not chunk.final

    def heard(self, playback: Playback) -> None:
        """The caller has said how far it has heard."""
        self._start = self._clock() - playback.age - playback.heard

    @property
    def wait(self) -> float:
        """Seconds until more is wanted; 0: now."""
        if not self.paced or self._start is None:
            return 0.0
        wanted = self._start + self._reach - self._lead
        return max((wanted if self._end is None else min(wanted, self._end)) - self._clock(), 0.0)

    @property
    def patient(self) -> bool:
        """Whether it can wait though nobody says so: it has its lead, and its caller does not say what was heard."""
        return self._start is None and self._reach >= self._lead


class Gate:
    """Lets a stage begin its next chunk once that is wanted and the turn has a row."""

    def __init__(self, pace: Pace, row: Row, stage: str) -> None:
        self.pace = pace
        self.seconds = 0.0  # that the turn was parked
        self._row = row
        self._row_wait = ROW_WAIT.labels(stage)
        self._moved = asyncio.Event()

    def heard(self, playback: Playback) -> None:
        """The caller has said how far it has heard."""
        self.pace.heard(playback)
        self._moved.set()

    async def passed(self) -> None:
        """Wait while the stage is far enough, or let a parked turn go first that needs a row; others have the row."""
        if not (self.pace.wait or (self.pace.patient and self._row.wanted)):
            return
        begin = time.perf_counter()
        self._row.park()
        while (seconds := self.pace.wait) > 0:
            self._moved.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._moved.wait()
        asked = time.perf_counter()
        await self._row.unpark()
        self._row_wait.observe(time.perf_counter() - asked)
        self.seconds += time.perf_counter() - begin


def sound_seconds(chunk: Chunk) -> float:
    """Length of the sound that a chunk stands for."""
    if chunk.HasField("speech"):
        return len(chunk.speech.pcm) / SAMPLE_BYTES / max(chunk.speech.sample_rate, 1)
    return CODE_SECONDS * (1 if chunk.HasField("step") else len(chunk.encoded.codes))
