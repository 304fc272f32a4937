"""`kimia ps`: what runs, and how full it is."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from kimia.errors import UnavailableError
from kimia.stage import STAGES
from kimia.streams import keys

DEFAULT_REDIS = "redis://127.0.0.1:6379/0"
EPILOG = """examples:
  kimia ps --redis redis://127.0.0.1:6379/0
  kimia ps --redis redis+cluster://127.0.0.1:7000 --partitions 16
  kimia ps --json

rows      turns that the live workers compute / can compute at once
sessions  rows reserved by admitted sessions / rows there are: the number to scale by
waiting   turns in the queue; running: turns in the hands of workers
"""


@dataclass(frozen=True)
class StageLine:
    """One stage, now."""

    stage: str
    workers: Mapping[str, tuple[int, int]]  # name -> rows used, rows
    capacity: int
    reserved: int
    waiting: int
    running: int

    @property
    def used(self) -> int:
        """Rows that compute."""
        return sum(used for used, _ in self.workers.values())


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `kimia ps`."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--redis",
        metavar="URL",
        default=os.environ.get("KIMIA_REDIS_URL", DEFAULT_REDIS),
        help=f"the service's store (default: $KIMIA_REDIS_URL or {DEFAULT_REDIS})",
    )
    parser.add_argument(
        "--partitions",
        type=_partitions,
        default=os.environ.get("KIMIA_PARTITIONS") or "1",  # a text, so that argparse checks it too
        metavar="N",
        help="as the service was set up (default: $KIMIA_PARTITIONS or 1)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per stage")


def _partitions(text: str) -> int:
    """As many as the service may have (`Settings.partitions`)."""
    if not text.isdecimal() or not 1 <= int(text) <= keys.MOST_PARTITIONS:
        raise argparse.ArgumentTypeError(f"a service has 1 to {keys.MOST_PARTITIONS} partitions, got {text!r}")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Print one line per stage; 1 when a stage has no worker."""
    lines = asyncio.run(look(args.redis, args.partitions))
    if args.json:
        print("\n".join(json.dumps(asdict(line)) for line in lines))
    else:
        print(table(lines))
    return 0 if all(line.workers for line in lines) else 1


async def look(url: str, partitions: int) -> list[StageLine]:
    """All stages, in the order of the route. Raises UnavailableError, and SettingsError for wrong partitions."""
    try:
        from kimia.streams.jobs import Jobs
        from kimia.streams.ledger import Ledger
        from kimia.streams.wire import Wire, WireOptions
    except ImportError as error:
        raise UnavailableError("kimia ps needs the Redis client: pip install 'kimia[serve]'") from error
    wire = await Wire.connect(url, options=WireOptions(partitions=partitions))
    try:
        await wire.check_partitions()
        usage = await Ledger(wire).usage()
        depths = {name: await Jobs(wire, kind, "ps").depth() for name, kind in STAGES.items()}
    finally:
        await wire.aclose()
    return [
        StageLine(
            stage=name,
            workers={worker: (rows.used, rows.rows) for worker, rows in sorted(usage[name].workers.items())},
            capacity=usage[name].capacity,
            reserved=usage[name].reserved,
            waiting=depths[name][0],
            running=depths[name][1],
        )
        for name in STAGES
    ]


def table(lines: list[StageLine]) -> str:
    """The lines as people read them."""
    shown = [f"{'stage':<12} {'replicas':>8} {'rows':>8} {'sessions':>9} {'waiting':>8} {'running':>8}"]
    for line in lines:
        rows, sessions = f"{line.used}/{line.capacity}", f"{line.reserved}/{line.capacity}"
        shown.append(
            f"{line.stage:<12} {len(line.workers):>8} {rows:>8} {sessions:>9} {line.waiting:>8} {line.running:>8}"
        )
        shown += [f"  {worker}  {used}/{rows_there}" for worker, (used, rows_there) in line.workers.items()]
    missing = [line.stage for line in lines if not line.workers]
    if missing:
        shown.append(f"no live worker: {', '.join(missing)}")
    return "\n".join(shown)
