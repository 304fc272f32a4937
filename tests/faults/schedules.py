"""Schedules of faults run against a whole service: as tasks (most) or as processes (which are killed and stopped).

python -m tests.faults.schedules tasks 17       # seed 17 again, and what was done
"""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from structlog.processors import format_exc_info
from structlog.testing import capture_logs
from structlog.typing import EventDict

from kimia.client import AsyncKimia
from kimia.stage import STAGES
from kimia.streams import keys
from kimia.streams.jobs import Jobs
from kimia.streams.ledger import Ledger
from kimia.streams.patience import end
from kimia.streams.wire import Wire
from tests.faults.fleet import OPTIONS, ROWS, TIMING, Fleet
from tests.faults.ground import Ground, P, View, ground_at
from tests.faults.injection import DisturbedKimia, Injector
from tests.faults.process import Process
from tests.faults.processes import Service, service
from tests.faults.questions import LONGEST, PATIENT, Heard, Question, ask_all, compare
from tests.faults.schedule import PAUSE, Fault, Kind, draw
from tests.faults.truth import demand

CALLERS, TURNS = 4, 2
SECONDS = 2 * TURNS * LONGEST  # in which everything must have ended
LIFE = round(1000 * (OPTIONS.turn_ttl + OPTIONS.session_ttl))  # ms that a key may live

ENVIRONMENT = {
    "KIMIA_ROWS": str(ROWS),
    "KIMIA_LEASE_SECONDS": str(OPTIONS.lease),
    "KIMIA_MAX_DELIVERIES": str(OPTIONS.max_deliveries),
    **{f"KIMIA_FAKE_{name.upper()}": str(value) for name, value in vars(TIMING).items()},
}


@dataclass
class Run:
    """What came of one schedule."""

    fired: list[str] = field(default_factory=list)  # faults that were really done: not every passage is reached
    found: dict[Question, Heard] = field(default_factory=dict)
    take_overs: int = 0
    seconds: float = 0.0


def undisturbed(valkey_url: str) -> dict[Question, Heard]:
    """What every caller hears when nothing happens."""
    return _as_tasks((), valkey_url).found


def check(kind: Kind, seed: int, valkey_url: str, expected: Mapping[Question, Heard]) -> Run:
    """Run a schedule: whatever it does, all answers are those of the undisturbed run. Raises Violation."""
    begun = time.perf_counter()
    run = _as_tasks(draw("tasks", seed), valkey_url) if kind == "tasks" else _as_processes(seed)
    compare(run.found, expected)
    run.seconds = time.perf_counter() - begun
    return run


# ---- as tasks ---------------------------------------------------------------------------------------------------


def _as_tasks(faults: tuple[Fault, ...], url: str) -> Run:
    with ground_at(url) as ground, capture_logs([format_exc_info]) as lines:
        ground.redis.flushall()
        return asyncio.run(_fleet_run(faults, ground, url, lines))


async def _fleet_run(faults: tuple[Fault, ...], ground: Ground, url: str, lines: Sequence[EventDict]) -> Run:
    fleet = Fleet(url, faults)
    async with asyncio.timeout(SECONDS), fleet.running() as kimia:
        run = await _asked(kimia, ground, url)
        wrong = [line for line in lines if line["log_level"] in ("error", "critical")]
        demand(not wrong, "logged as errors:", wrong)
    run.fired = [str(fault) for fault in fleet.fired]
    return run


# ---- as processes -----------------------------------------------------------------------------------------------


def _as_processes(seed: int) -> Run:
    with TemporaryDirectory(prefix="kimia-faults-") as folder:
        disturbed = {"KIMIA_FAULT_SCHEDULE": str(seed), "KIMIA_FAULT_RECORD": folder}
        with service("--fake", environment={**ENVIRONMENT, **disturbed}) as found:
            found.disturb()
            with ground_at(found.plan.redis_url) as ground:
                run = asyncio.run(_service_run(seed, found, ground))
        demand(not found.errors(), "logged as errors:", found.errors())
        told = [path.read_text(encoding="utf-8").splitlines() for path in sorted(Path(folder).iterdir())]
        run.fired += [line for lines in told for line in lines]
    return run


async def _service_run(seed: int, found: Service, ground: Ground) -> Run:
    run = Run()
    injector = Injector("client", draw("processes", seed), Process())

    async def work() -> int:
        nonlocal run
        waking = asyncio.create_task(_wake(found))
        try:
            async with asyncio.timeout(SECONDS), DisturbedKimia(found.plan.address(), options=PATIENT) as kimia:
                kimia.injector = injector
                run = await _asked(kimia, ground, found.plan.redis_url)
        finally:
            await end([waking])
        return 0

    await found.run(work)
    run.fired = [str(fault) for fault in injector.fired]
    return run


async def _wake(found: Service) -> None:
    """Let every process that stands still go on, after its pause."""
    while True:
        for pid in found.processes().values():
            if _stopped(pid):
                asyncio.get_running_loop().call_later(PAUSE, os.kill, pid, signal.SIGCONT)
        await asyncio.sleep(PAUSE + 0.1)  # so that none is woken twice


def _stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] == "T"
    except FileNotFoundError:
        return False


# ---- what is asked, and what is left ----------------------------------------------------------------------------


async def _asked(kimia: AsyncKimia, ground: Ground, url: str) -> Run:
    """All turns of all callers, then the end of everything that they began."""
    found = await ask_all(kimia, CALLERS, TURNS)
    at_once = ground.look()
    wire = await Wire.connect(url, options=OPTIONS)
    try:
        while not await _idle(wire):
            await asyncio.sleep(0.05)
        later = ground.look()
        for heard in found.values():
            _ended_once(heard, at_once, later)
        for caller in range(CALLERS):
            await kimia.delete_session(f"caller-{caller}")
        while any(stage.reserved for stage in (await Ledger(wire).usage()).values()):
            await asyncio.sleep(0.05)
    finally:
        await wire.aclose()
    _nothing_left(ground.look())
    return Run(found=found, take_overs=sum(_take_overs(later, heard.turn_id) for heard in found.values()))


async def _idle(wire: Wire) -> bool:
    """No job waits or is in somebody's hands, and no row of a living worker is used."""
    workers = [rows for stage in (await Ledger(wire).usage()).values() for rows in stage.workers.values()]
    if any(rows.used for rows in workers):
        return False
    depths = [await Jobs(wire, kind, "onlooker").depth() for kind in STAGES.values()]
    return all(depth == (0, 0) for depth in depths)


def _ended_once(heard: Heard, at_once: View, later: View) -> None:
    """The turn is done, and nothing of it has changed since its caller was told."""
    turn = heard.turn_id
    head = later.hash(keys.head(P, turn))
    demand(head.get("state") == b"done", turn, "is", head.get("state"))
    demand(head["ended"] == at_once.hash(keys.head(P, turn))["ended"], turn, "has ended twice")
    for log in keys.LOGS:
        entries = later.entries(keys.log(P, turn, log))
        demand(entries == at_once.entries(keys.log(P, turn, log)), "log", log, "of", turn, "has changed")
        wanted = [f"{index + 1}-0" for index in range(len(entries))]
        demand([entry for entry, _ in entries] == wanted, "log", log, "of", turn, "has gaps")


def _take_overs(view: View, turn: str) -> int:
    head = view.hash(keys.head(P, turn))
    return sum(int(head.get(f"{name}:take_overs", 0)) for name in STAGES)


def _nothing_left(view: View) -> None:
    """Sessions that were deleted are gone with all they had; every other key expires."""
    for name, key in view.items():
        demand("caller-" not in name or name.startswith(keys.gone(P, "")), name, "is left of a deleted session")
        permanent = name.startswith((f"{P}:jobs:", f"{P}:token:", "{ledger}:")) and ":@" not in name
        demand(permanent or 0 <= key.ttl <= LIFE, name, "lives for", key.ttl, "ms")


# ---- many -------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What came of many schedules."""

    schedules: int = 0
    take_overs: int = 0
    fired: Counter[str] = field(default_factory=Counter)  # faults by boundary and action
    failed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        faults = ", ".join(f"{name} {count}" for name, count in sorted(self.fired.items()))
        failed = "".join(f"\nFAILED {line}" for line in self.failed)
        head = f"{self.schedules} schedules, {self.fired.total()} faults, {self.take_overs} take-overs"
        return f"{head}, {len(self.failed)} failed\n{faults}{failed}"


def run_many(kind: Kind, seeds: Sequence[int], valkey_url: str, enough: int | None = None) -> Tally:
    """Run the schedules of these seeds, until `enough` have failed; what each did is printed as it ends."""
    expected, tally = undisturbed(valkey_url), Tally()
    for seed in seeds:
        if len(tally.failed) == enough:
            break
        tally.schedules += 1
        try:
            run = check(kind, seed, valkey_url, expected)
        except Exception as error:  # noqa: BLE001 - the others are run all the same
            tally.failed.append(f"{kind} {seed}: {error!r}; the schedule: {', '.join(map(str, draw(kind, seed)))}")
            _say(f"FAILED {tally.failed[-1]}")
            continue
        tally.take_overs += run.take_overs
        tally.fired.update(_short(line) for line in run.fired)
        _say(f"{kind} {seed}: {run.seconds:.1f} s, {run.take_overs} take-overs; {', '.join(run.fired) or 'no fault'}")
    return tally


def _say(line: str) -> None:
    print(line, flush=True)


def _short(fired: str) -> str:
    """`llm.2: publish 17: delay 0.1 s` as `publish delay`."""
    _, passage, action = fired.split(": ")
    return f"{passage.split()[0]} {action.split(' 0')[0].split(' 1')[0]}"


def main() -> int:
    """Run schedules by hand; 1 when one has failed."""
    from tests.servers import embedded

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", choices=("tasks", "processes"))
    parser.add_argument("seed", type=int, help="the first one")
    parser.add_argument("count", nargs="?", type=int, default=1, help="how many from there (1)")
    args = parser.parse_args()
    with TemporaryDirectory(prefix="kimia-faults-") as folder, embedded(Path(folder)) as url:
        tally = run_many(args.kind, range(args.seed, args.seed + args.count), url)
    print(tally)
    return bool(tally.failed)


if __name__ == "__main__":
    sys.exit(main())
