"""Barge-in: how long stale speech still comes after a caller has interrupted, and when the rows are free again.

    python -m benchmarks.cancel [--callers 8] [--turns 25] [--seed 1] [--out cancel.json]

prints tables. Callers interrupt long answers at a moment drawn from the seed, up to two seconds after the first piece
of speech. All processes run on this machine: an embedded Valkey, three fake stages, an orchestrator, and this process
with all callers, whose clocks are one. `gpu`: stages with the timing of a GPU (20 ms a step, a tenth of a second of
computing per second of speech), a piece of speech every half second. `fast`: five times as fast, so that there are
five times as many pieces under way when a caller interrupts. Milliseconds:

last stale byte  from `cancel()` to the last piece of the turn's speech that comes after it; 0 where none does
acknowledged     from `cancel()` to TurnCancelled, behind which nothing of the turn comes
marked           from `cancel()` to the terminal state in the journal
row free         from the terminal state to the end of the turn in its worker, as that worker's log says: a step of the
                 language model or a chunk of the detokenizer later at most
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import json
import os
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fleet import GPU, Fleet, Plan, Timing, run, running
from benchmarks.load import QUESTION_RATE, question
from benchmarks.pipeline import machine, say
from benchmarks.stalls import watched
from kimia.client import AsyncCall, AsyncKimia, AudioChunk, ClientOptions, TurnCancelled, TurnStarted
from kimia.streams.journal import Journal
from kimia.streams.wire import Wire

# No answer ends before its caller interrupts it: 20 s of computing.
TIMINGS = {"gpu": replace(GPU, steps=1000), "fast": Timing(step_seconds=0.004, realtime_factor=0.02, steps=5000)}
LATEST = 2.0  # seconds after the first piece of speech
QUESTION_SECONDS = 0.5
STAGES = ("llm", "detokenizer")  # whose rows an answer holds
ENVIRONMENT = {"KIMIA_LOG_LEVEL": "info", "KIMIA_LOG_FORMAT": "json", "KIMIA_TURN_TTL_SECONDS": "600"}


@dataclass
class BargeIn:
    """One interrupted turn. Times are seconds of the wall clock; 0: it has not happened."""

    turn_id: str = ""
    asked: float = 0.0
    last_stale: float = 0.0
    stale_bytes: int = 0
    acknowledged: float = 0.0
    marked: float = 0.0
    left: dict[str, float] = field(default_factory=dict)  # stage -> when its worker had left the turn


# ---- callers ----------------------------------------------------------------------------------------------------


async def interrupted(call: AsyncCall, delay: float) -> BargeIn:
    """Ask, and interrupt the answer `delay` seconds after its first piece of speech. Raises RuntimeError."""
    found = BargeIn()

    def interrupt() -> None:
        found.asked = time.time()
        call.cancel()

    call.send_audio(question(QUESTION_SECONDS))
    call.commit()
    timer: asyncio.TimerHandle | None = None
    async for event in call.turn():
        now = time.time()
        if isinstance(event, TurnStarted):
            found.turn_id = event.turn_id
        elif isinstance(event, AudioChunk):
            timer = timer or asyncio.get_running_loop().call_later(delay, interrupt)
            if found.asked:
                found.last_stale, found.stale_bytes = now, found.stale_bytes + len(event.data)
        elif isinstance(event, TurnCancelled):
            found.acknowledged = now
    if not found.acknowledged:
        raise RuntimeError(f"turn {found.turn_id} was not cancelled but ended before")
    return found


async def caller(kimia: AsyncKimia, turns: int, chance: random.Random) -> list[BargeIn]:
    """One call; its first turn, which makes connections and fills caches, is left out."""
    found = []
    async with kimia.converse(input_rate=QUESTION_RATE) as call:
        for _ in range(turns + 1):
            found.append(await interrupted(call, chance.uniform(0.0, LATEST)))
        call.finish()
        async for event in call:
            raise RuntimeError(f"{event} came after the last turn was cancelled")
    return found[1:]


async def drive(fleet: Fleet, callers: int, turns: int, seed: int) -> list[BargeIn]:
    """All callers to their end, with what the journal says of their turns."""
    async with AsyncKimia(fleet.address, options=ClientOptions(patience=60.0)) as kimia:
        await kimia.connect()
        calls = [caller(kimia, turns, random.Random(f"{seed}.{number}")) for number in range(callers)]
        found = [barge_in for one in await asyncio.gather(*calls) for barge_in in one]
    wire = await Wire.connect(fleet.redis_url)
    try:
        for barge_in in found:
            barge_in.marked = (await Journal(wire).head(barge_in.turn_id)).ended / 1e6
    finally:
        await wire.aclose()
    return found


# ---- what the workers say ---------------------------------------------------------------------------------------


def read_leaving(barge_ins: Iterable[BargeIn], logs: Mapping[str, Path]) -> None:
    """When each stage's worker had left each turn. Raises RuntimeError where a log does not say so."""
    for stage in STAGES:
        left = _left(logs[stage])
        for barge_in in barge_ins:
            if barge_in.turn_id not in left:
                raise RuntimeError(f"the log of the {stage} does not say that it left turn {barge_in.turn_id}")
            barge_in.left[stage] = left[barge_in.turn_id]


def _left(log: Path) -> dict[str, float]:
    found = {}
    for line in log.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line) if line.startswith("{") else {}
        if entry.get("event") == "turn left":
            found[entry["turn"]] = datetime.datetime.fromisoformat(entry["timestamp"]).timestamp()
    return found


# ---- the report -------------------------------------------------------------------------------------------------


def measure(timing: Timing, args: argparse.Namespace) -> dict[str, Any]:
    """One run on a fresh service."""
    say(f"{args.callers} callers, {args.turns} barge-ins each, {1e3 * timing.step_seconds:g} ms a step")
    with running(Plan(timing, environment=ENVIRONMENT)) as fleet:
        begun, before, busy = time.monotonic(), fleet.cpu_seconds(), os.getloadavg()[0]
        with watched() as stalls:
            found = run(drive(fleet, args.callers, args.turns, args.seed))
        seconds = time.monotonic() - begun
        used = {name: (after - before[name]) / seconds for name, after in fleet.cpu_seconds().items()}
        read_leaving(found, fleet.logs)
    del stalls["intervals"]
    return {
        "timing": vars(timing),
        "load_average_before": busy,
        "seconds": seconds,
        "barge_ins": len(found),
        "with_stale_speech": sum(bool(barge_in.stale_bytes) for barge_in in found),
        "ms": summary(found),
        "cores_used": used,
        "stalls": stalls,
    }


def summary(found: Sequence[BargeIn]) -> dict[str, dict[str, float]]:
    """Percentiles of every moment, milliseconds."""
    moments = {
        "last stale byte": [max(one.last_stale - one.asked, 0.0) for one in found],
        "acknowledged": [one.acknowledged - one.asked for one in found],
        "marked": [one.marked - one.asked for one in found],
        **{f"row free, {stage}": [one.left[stage] - one.marked for one in found] for stage in STAGES},
    }
    return {name: _percentiles(seconds) for name, seconds in moments.items()}


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    values = 1e3 * np.asarray(seconds)
    return {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} | {"max": float(values.max())}


def show(name: str, report: Mapping[str, Any]) -> None:
    """Print the table."""
    print(f"\n{name}: {report['barge_ins']} barge-ins, {report['with_stale_speech']} with speech after cancel()")
    print(f"{'ms':<24}" + "".join(f"{name:>9}" for name in ("p50", "p95", "p99", "max")))
    for moment, row in report["ms"].items():
        print(f"{moment:<24}" + "".join(f"{value:9.1f}" for value in row.values()))
    print(f"load before {report['load_average_before']:.1f}; stalls {report['stalls']}")


def main() -> None:
    """Measure, print, and keep it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--turns", type=int, default=25, help="barge-ins of each caller")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    setting = {name: getattr(args, name) for name in ("callers", "turns", "seed")}
    report: dict[str, Any] = {"machine": machine(), "setting": setting}
    for name, timing in TIMINGS.items():
        report[name] = measure(timing, args)
        show(name, report[name])
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
