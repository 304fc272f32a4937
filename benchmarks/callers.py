"""Callers on the telephone, in a process of their own: sound in real time in, answers played in real time, barge-ins.

A caller does what a telephony gateway does for one line. While its caller speaks it sends a frame every 20 ms, each by
itself, as RTP and the media streams of telephony providers bring them: nothing is gathered. It finds the end of speech
itself and commits with the last frame, so no silence detection is in any number. It plays the answer from the first
piece on, says every 200 ms how far, thinks, and asks again; some answers it interrupts. After a few turns it hangs
up and another calls. Half of the sessions are deleted, the others are left to expire.

Everything that happens is written down as one JSON object a line; `benchmarks.calls` makes sense of it. Times are
seconds of the monotonic clock, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from benchmarks.fleet import run
from benchmarks.player import Player
from kimia.client import AsyncKimia
from kimia.client.aio_call import AsyncCall
from kimia.client.events import AudioChunk, TurnCancelled, TurnDone, TurnFailed, TurnStarted
from kimia.errors import CapacityError, KimiaError

clock = time.monotonic

INPUT_RATE = 16000  # Hz, 16 bit
OUTPUT_RATE = 24000
FRAME_SECONDS = 0.02
FRAME_BYTES = 2 * round(INPUT_RATE * FRAME_SECONDS)
PLAYBACK_SECONDS = 0.2  # between two reports of how far was heard
TICK_SECONDS = 0.01  # of the loop that watches itself
LATE_SECONDS = 0.005  # from which on a tick of this process counts as a stall of its own
NO_RETRY_SECONDS = 1.0  # where a refusal names no delay


@dataclass(frozen=True)
class Habits:
    """What callers do: seconds and numbers from (least, most), shares from 0 to 1."""

    arrival: tuple[float, float] = (0.0, 5.0)  # of the first call
    question: tuple[float, float] = (1.0, 5.0)
    think: tuple[float, float] = (0.5, 3.0)  # after an answer was heard
    pause: tuple[float, float] = (0.5, 3.0)  # between two calls
    turns: tuple[int, int] = (3, 8)  # of one call
    steps: tuple[int, int] = (40, 200)  # of an answer, 12.5 a second of speech
    barge_ins: float = 0.2  # share of answers that are interrupted, if they last as long
    barge_after: tuple[float, float] = (0.3, 4.0)  # seconds heard
    deleted: float = 0.5  # share of sessions that are deleted after their call


@dataclass(frozen=True)
class Spec:
    """The callers of one process."""

    address: str
    numbers: Sequence[int]
    seconds: float  # after which nobody calls again; a call that runs ends with its turn
    seed: int
    habits: Habits = Habits()


# ---- one process ------------------------------------------------------------------------------------------------


@contextmanager
def calling(specs: Sequence[Spec], folder: Path) -> Iterator[list[multiprocessing.process.BaseProcess]]:
    """A process for each spec, which writes `<folder>/<number>.jsonl`; ends them when left before they have ended."""
    context = multiprocessing.get_context("spawn")
    processes: list[multiprocessing.process.BaseProcess] = [
        context.Process(target=_main, args=(spec, folder / f"{number}.jsonl")) for number, spec in enumerate(specs)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _main(spec: Spec, file: Path) -> None:
    with file.open("w", encoding="utf-8", buffering=1) as output:
        run(everybody(spec, output))


async def everybody(spec: Spec, output: TextIO) -> None:
    """All callers of this process until their time is over."""
    diary = Diary(output)
    async with AsyncKimia(spec.address) as kimia:
        await kimia.connect(timeout=60.0)
        watching = asyncio.create_task(_watch_loop(diary))
        end = clock() + spec.seconds
        await asyncio.gather(*(Caller(number, spec, kimia, diary).live(end) for number in spec.numbers))
        watching.cancel()


@dataclass(frozen=True)
class Diary:
    """What happened, line by line."""

    output: TextIO

    def write(self, what: str, **fields: Any) -> None:
        self.output.write(json.dumps({"what": what, **fields}) + "\n")


async def _watch_loop(diary: Diary) -> None:
    """A tick of this loop that comes late is a stall of the callers, not of the service."""
    while True:
        due = clock() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        now = clock()
        if now - due > LATE_SECONDS:
            diary.write("late", begin=due, end=now)


# ---- one caller -------------------------------------------------------------------------------------------------


@dataclass
class Heard:
    """One turn as its caller lived through it."""

    spoken: float = 0.0  # when the last frame of the question was sent
    worst_frame: float = 0.0  # seconds by which a frame was late, at worst: the caller's own fault
    turn_id: str = ""
    started: float | None = None
    arrivals: list[tuple[float, float]] = field(default_factory=list)  # (time, seconds of speech)
    interrupted: float | None = None
    ended: float | None = None
    end: str = ""  # done, cancelled, failed
    reason: str = ""
    first_audio: float | None = None  # seconds from the turn's start, on the service's clock
    player: Player = field(default_factory=Player)

    @property
    def complete(self) -> bool:
        """Whether all of the answer has come."""
        return self.end == "done"

    def receive(self, event: object) -> None:
        """Something of the turn has come."""
        now = clock()
        match event:
            case TurnStarted(turn_id=turn_id):
                self.turn_id, self.started = turn_id, now
            case AudioChunk(data=data):
                seconds = len(data) / 2 / OUTPUT_RATE
                self.arrivals.append((now, seconds))
                self.player.feed(now, seconds)
            case TurnDone() | TurnCancelled() | TurnFailed():
                self.ended, self.end = now, _END[type(event)]
                if isinstance(event, TurnFailed):
                    self.reason = _reason(event.error)
                if isinstance(event, TurnDone):
                    self.first_audio = event.latency.first_audio

    def record(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "player"}


_END = {TurnDone: "done", TurnCancelled: "cancelled", TurnFailed: "failed"}


def _reason(error: KimiaError) -> str:
    return f"{type(error).__name__} {getattr(error, 'reason', '')}: {error}"


class Caller:
    """One line: a seeded sequence of calls."""

    def __init__(self, number: int, spec: Spec, kimia: AsyncKimia, diary: Diary) -> None:
        self.number = number
        self.habits = spec.habits
        self.random = random.Random(f"{spec.seed}/{number}")
        self.kimia = kimia
        self.diary = diary
        self.calls = 0

    async def live(self, end: float) -> None:
        """Call, hang up and call again."""
        await asyncio.sleep(self.random.uniform(*self.habits.arrival))
        while clock() < end:
            self.calls += 1
            pause = await self._call(end)
            await asyncio.sleep(min(pause, max(end - clock(), 0.0)))

    async def _call(self, end: float) -> float:
        """One call, or the attempt at one; seconds to the next."""
        begun = clock()
        call = self.kimia.converse()
        admitted: float | None = None
        try:
            async with call:
                admitted = clock()
                self._note("admitted", begun=begun, at=admitted)
                await self._talk(call, end)
            if self.random.random() < self.habits.deleted:
                await self.kimia.delete_session(call.session_id)
        except KimiaError as error:
            refused = isinstance(error, CapacityError)
            self._note(
                "refused" if refused else "failed", begun=begun, at=clock(), admitted=admitted, reason=_reason(error)
            )
            if isinstance(error, CapacityError):
                self._note("told_to_wait", seconds=error.retry_after)
                return error.retry_after or NO_RETRY_SECONDS
        return self.random.uniform(*self.habits.pause)

    async def _talk(self, call: AsyncCall, end: float) -> None:
        for _ in range(self.random.randint(*self.habits.turns)):
            heard = Heard()
            await self._ask(call, heard)
            await self._listen(call, heard)
            self._note("turn", session=call.session_id, **heard.record())
            if clock() > end:
                break
            if heard.interrupted is None:
                await asyncio.sleep(self.random.uniform(*self.habits.think))
        call.finish()
        async for _ in call:
            pass

    async def _ask(self, call: AsyncCall, heard: Heard) -> None:
        """Speak: a frame when its 20 ms are over, each by its own time."""
        begun = clock()
        for number in range(1, 1 + round(self.random.uniform(*self.habits.question) / FRAME_SECONDS)):
            due = begun + number * FRAME_SECONDS
            await asyncio.sleep(max(due - clock(), 0.0))
            heard.worst_frame = max(heard.worst_frame, clock() - due)
            call.send_audio(self.random.randbytes(FRAME_BYTES))
        heard.spoken = clock()
        call.commit(max_new_tokens=self.random.randint(*self.habits.steps))

    async def _listen(self, call: AsyncCall, heard: Heard) -> None:
        """Until all that came was heard, or the caller has had enough."""
        barges = self.random.random() < self.habits.barge_ins
        enough = self.random.uniform(*self.habits.barge_after) if barges else None
        playing = asyncio.create_task(_play(call, heard, enough))
        try:
            async for event in call.turn():
                heard.receive(event)
            await playing
        finally:
            playing.cancel()

    def _note(self, what: str, **fields: Any) -> None:
        self.diary.write(what, caller=self.number, call=self.calls, **fields)


async def _play(call: AsyncCall, heard: Heard, enough: float | None) -> None:
    """Report how far was heard; interrupt after `enough` seconds of it. Ends when there is no more to hear."""
    player, told = heard.player, 0
    while not heard.end or (heard.complete and player.heard(clock()) < player.fed):
        await asyncio.sleep(PLAYBACK_SECONDS)
        now = clock()
        seconds = player.heard(now)
        milliseconds = int(1000 * seconds)
        if enough is not None and seconds >= enough and (seconds < player.fed or not heard.end):
            heard.interrupted = now
            call.cancel(milliseconds)
            return
        if milliseconds > told:
            call.playback(milliseconds)
            told = milliseconds
