"""The kill campaign: processes die by seed while callers talk to real stages, and no caller may notice.

    python -m tests.faults.campaign --seed 1 --kills 100        # half of them with either mode of the AOF
    python -m tests.faults.campaign --seed 1 --kills 5 --mode everysec --callers 4

Tiny checkpoint, two processes of every stage, sixteen callers who ask again and again. Killed are tokenizer, llm,
detokenizer, orchestrator and store, with SIGKILL; the supervisor of `kimia up` starts them again. Every answer must be
that of the undisturbed service: the same text delta by delta, the same samples, no index twice and none left out.

Kills are spread over what callers receive, not over time: one comes at a random event of each `--every`. So processes
do not die faster than a slow machine starts them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from benchmarks.kills import Death, Kill, carry_out, draw
from kimia.client import Answer, AsyncKimia, AudioChunk, ClientOptions, TextDelta
from kimia.errors import KimiaError
from kimia.model.random_weights import new_checkpoint
from kimia.streams.patience import end
from tests.faults.processes import Service, service, syncing
from tests.faults.truth import Violation, demand
from tests.golden_data import COMMITTED

MODES = ("always", "everysec")
STEPS = 24  # of an answer: two pieces of speech and the rest
AT_ONCE = 4  # turns of the undisturbed run at a time
LONGEST = 1800.0  # seconds of a turn: what takes longer hangs, however busy the machine
PATIENT = ClientOptions(attempts=200, patience=LONGEST, timeout=LONGEST)
SAMPLED = {"text_temperature": 0.7, "text_top_k": 8, "audio_temperature": 0.8, "audio_top_k": 10}
CLIPS = ("clip_a2.wav", "clip_b2.wav")
PERCENTILES = (50, 90, 99, 100)


@dataclass
class Turn:
    """One turn as its caller lived through it. Times: seconds of time.monotonic."""

    caller: int
    begun: float
    texts: list[str] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    arrivals: list[float] = field(default_factory=list)  # of speech
    ended: float = 0.0
    answer: Answer | None = None

    def same(self) -> tuple[Any, ...]:
        """What no death may change."""
        demand(self.answer is not None, "a turn of caller", self.caller, "has no end")
        return self.texts, self.pieces, self.answer.text, self.answer.stop, self.answer.usage

    @property
    def gaps(self) -> list[float]:
        """Seconds between two pieces of speech, the first one after the question."""
        return [later - earlier for earlier, later in pairwise((self.begun, *self.arrivals))]

    @property
    def take_overs(self) -> int:
        """How often a worker went on with what another had begun."""
        return sum(stage.take_overs for stage in self.answer.latency.stages) if self.answer else 0


@dataclass
class Summary:
    """What is recorded of one mode."""

    mode: str
    kills: dict[str, int] = field(default_factory=dict)
    turns: int = 0
    disturbed: int = 0  # turns during which something was killed
    failed: list[str] = field(default_factory=list)
    take_overs: int = 0
    gaps_ms: dict[str, dict[str, float]] = field(default_factory=dict)  # by whether something was killed in the gap
    seconds: float = 0.0


# ---- callers ----------------------------------------------------------------------------------------------------


async def ask(kimia: AsyncKimia, caller: int, received: Callable[[], None] = lambda: None) -> Turn:
    """The caller's one question; its events one by one. Raises Violation where an index is missing or comes twice."""
    turn = Turn(caller, time.monotonic())
    running = kimia.generate(_chat(caller), seed=caller, max_new_tokens=STEPS, **SAMPLED)
    async for event in running:
        received()
        if isinstance(event, TextDelta):
            demand(event.index == len(turn.texts), "caller", caller, "got text", event.index)
            turn.texts.append(event.text)
        elif isinstance(event, AudioChunk):
            demand(event.index == len(turn.pieces), "caller", caller, "got sound", event.index)
            turn.pieces.append(event.data)
            turn.arrivals.append(time.monotonic())
    turn.ended, turn.answer = time.monotonic(), running.progress.answer()
    return turn


def _chat(caller: int) -> list[dict[str, Any]]:
    if caller % 4 == 3:
        return [{"role": "user", "message_type": "text", "content": f"How are you, {caller}?"}]
    clip = COMMITTED / "e2e" / "audio" / CLIPS[caller % len(CLIPS)]
    return [{"role": "user", "message_type": "audio", "content": str(clip)}]


async def undisturbed(kimia: AsyncKimia, callers: int) -> list[Turn]:
    """What every caller is told when nobody dies."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(caller: int) -> Turn:
        async with room:
            return await ask(kimia, caller)

    return list(await asyncio.gather(*map(one, range(callers))))


class Callers:
    """Callers who ask again and again until told to stop; each then hears its answer out."""

    def __init__(self, kimia: AsyncKimia, expected: Sequence[Turn]) -> None:
        self.turns: list[Turn] = []
        self.failed: list[str] = []
        self.events = 0  # received by all of them
        self._kimia = kimia
        self._expected = expected
        self._stopping = False
        self._tasks = [asyncio.create_task(self._live(caller)) for caller in range(len(expected))]

    async def stop(self) -> None:
        """Let the last answers end."""
        self._stopping = True
        await asyncio.gather(*self._tasks)

    async def aclose(self) -> None:
        """Hang up."""
        await end(self._tasks)

    async def _live(self, caller: int) -> None:
        while not self._stopping:
            try:
                turn = await ask(self._kimia, caller, self._received)
                demand(turn.same() == self._expected[caller].same(), "caller", caller, "heard something else")
            except (KimiaError, Violation) as error:
                self.failed.append(f"caller {caller}: {type(error).__name__}: {error}")
                say(f"FAILED {self.failed[-1]}")
            else:
                self.turns.append(turn)

    def _received(self) -> None:
        self.events += 1


# ---- one mode ---------------------------------------------------------------------------------------------------


def run(mode: str, model: Path, kills: Sequence[Kill], callers: int) -> Summary:
    """All kills of one mode of the AOF."""
    # All turns find a row even where one worker of a stage is left; refused are only those that come when none is.
    settings = {"ROWS": callers, "TURN_DEADLINE_SECONDS": LONGEST}
    environment = {f"KIMIA_{name}": str(value) for name, value in settings.items()}
    with service("--model", str(model), "--device", "cpu", environment=environment) as found:
        syncing(found, mode)
        summary = Summary(mode)
        asyncio.run(found.run(lambda: _campaign(found, kills, summary, callers)))
    summary.failed += [f"logged as an error: {line}" for line in found.errors()]
    return summary


async def _campaign(found: Service, kills: Sequence[Kill], summary: Summary, count: int) -> int:
    deaths: list[float] = []
    stop = threading.Event()

    def tell(death: Death) -> None:
        part = death.name.partition(".")[0]
        summary.kills[part] = summary.kills.get(part, 0) + 1
        deaths.append(death.at)
        done = f"{len(callers.turns)} turns, {len(callers.failed)} failed"
        say(f"{summary.mode}: {len(deaths)}/{len(kills)} {death.name} is killed; {done}")

    begun = time.monotonic()
    async with AsyncKimia(found.plan.address(), options=PATIENT) as kimia:
        callers = Callers(kimia, await undisturbed(kimia, count))
        try:
            await asyncio.to_thread(carry_out, kills, found.processes, tell, stop, lambda: callers.events)
            await callers.stop()
        finally:
            stop.set()
            await callers.aclose()
    summary.seconds = time.monotonic() - begun
    _count(summary, callers, deaths)
    say(f"{summary.mode}: {summary.turns} turns, {len(summary.failed)} failed, {summary.seconds:.0f} s")
    return 0


def _count(summary: Summary, callers: Callers, deaths: Sequence[float]) -> None:
    turns = callers.turns
    summary.turns, summary.failed = len(turns) + len(callers.failed), callers.failed
    summary.disturbed = sum(any(turn.begun < death < turn.ended for death in deaths) for turn in turns)
    summary.take_overs = sum(turn.take_overs for turn in turns)
    gaps: dict[str, list[float]] = {"with a death in it": [], "others": []}
    for turn in turns:
        for moment, gap in zip(turn.arrivals, turn.gaps, strict=True):
            died = any(moment - gap < death < moment for death in deaths)
            gaps["with a death in it" if died else "others"].append(1e3 * gap)
    summary.gaps_ms = {name: _distribution(values) for name, values in gaps.items()}


def _distribution(values: Sequence[float]) -> dict[str, float]:
    shown = {f"p{q}": round(float(np.percentile(values, q)), 1) for q in PERCENTILES} if values else {}
    return {"n": len(values), **shown}


# ---- command ----------------------------------------------------------------------------------------------------


def say(what: str) -> None:
    """Progress."""
    print(f"{time.strftime('%H:%M:%S')} {what}", file=sys.stderr, flush=True)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1, help="of who dies when (1)")
    parser.add_argument("--kills", type=int, default=100, help="of all modes together (100)")
    parser.add_argument("--every", type=float, default=40.0, metavar="EVENTS", help="one kill in each (40)")
    parser.add_argument("--callers", type=int, default=16, help="at once (16)")
    parser.add_argument("--mode", choices=MODES, action="append", help="of the AOF (both)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the summary as JSON")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Run, show, write; 1 when a caller noticed."""
    args = parse(words)
    modes = args.mode or MODES
    with TemporaryDirectory(prefix="kimia-campaign-") as folder:
        model = new_checkpoint(Path(folder) / "tiny", "tiny", progress=False)
        found = []
        for number, mode in enumerate(modes):
            count = (args.kills * (number + 1)) // len(modes) - (args.kills * number) // len(modes)
            found.append(run(mode, model, draw(args.seed + number, count, args.every), args.callers))
    asked = {name: getattr(args, name) for name in ("seed", "kills", "every", "callers")}
    report = {**asked, "modes": [asdict(one) for one in found]}
    text = json.dumps(report, indent=1)
    print(text)
    if args.out:
        args.out.write_text(f"{text}\n", encoding="utf-8")
    return int(any(one.failed for one in found))


if __name__ == "__main__":
    sys.exit(main())
