"""What a load does to the store: messages and bytes, AOF rewrites, and the moments of a turn on the journal's clock."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis.asyncio as redis

from benchmarks.load import Results
from kimia.stage import STAGES
from kimia.streams import keys
from kimia.streams.journal import Head, Journal
from kimia.streams.wire import Wire

P = "{0}"  # the benchmarks run with one partition
BALLAST = 200  # MiB that an AOF rewrite has to write beside the turns
SAMPLED = 20  # turns whose logs are weighed


# ---- AOF rewrites -----------------------------------------------------------------------------------------------


@asynccontextmanager
async def rewriting(url: str) -> AsyncIterator[dict[str, Any]]:
    """Rewrite the AOF over and over; afterwards the dict given says how often and how long the longest fork took."""
    found: dict[str, Any] = {"rewrites": 0, "longest_fork_ms": 0.0, "ballast_mib": BALLAST}
    async with redis.Redis.from_url(url, protocol=2) as client:
        for number in range(BALLAST):
            await client.set(f"ballast:{number}", os.urandom(1 << 20))
        rewrites = asyncio.create_task(_rewrite(client, found))
        try:
            yield found
        finally:
            rewrites.cancel()
            with suppress(asyncio.CancelledError):
                await rewrites


async def _rewrite(client: redis.Redis, found: dict[str, Any]) -> None:
    while True:
        await client.bgrewriteaof()
        fork = (await client.info("stats"))["latest_fork_usec"] / 1e3
        found["longest_fork_ms"] = max(found["longest_fork_ms"], fork)
        while (await client.info("persistence"))["aof_rewrite_in_progress"]:
            await asyncio.sleep(0.02)
        found["rewrites"] += 1
        await asyncio.sleep(0.1)


# ---- messages and bytes -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Counters of the store at one moment."""

    received: int  # bytes, from its clients
    sent: int  # bytes
    calls: Mapping[str, int]  # by command; those in scripts count by themselves
    pointers: int


async def counts(url: str) -> Counts:
    """The counters now."""
    async with redis.Redis.from_url(url, protocol=2) as client:
        stats, commands = await client.info("stats"), await client.info("commandstats")
        inboxes = [key async for key in client.scan_iter(match=f"{P}:inbox:*")]
        added = [(await client.xinfo_stream(key))["entries-added"] for key in inboxes]
        calls = {name.removeprefix("cmdstat_"): int(entry["calls"]) for name, entry in commands.items()}
    return Counts(stats["total_net_input_bytes"], stats["total_net_output_bytes"], calls, sum(added))


def traffic(before: Counts, after: Counts, seconds: float) -> dict[str, Any]:
    """What happened between two moments, per second of speech."""
    calls = {name: (count - before.calls.get(name, 0)) / seconds for name, count in after.calls.items()}
    often = dict(sorted(((n, c) for n, c in calls.items() if c >= 0.05), key=lambda item: -item[1]))
    return {
        "bytes_received": (after.received - before.received) / seconds,
        "bytes_sent": (after.sent - before.sent) / seconds,
        "pointers": (after.pointers - before.pointers) / seconds,
        "calls": often,
    }


async def log_sizes(url: str, turn_ids: Sequence[str], speech_seconds_per_turn: float) -> dict[str, Any]:
    """Entries and bytes of each log per second of speech, of some turns that are still remembered; and of a pointer."""
    some = turn_ids[-SAMPLED:]
    seconds = speech_seconds_per_turn * len(some)
    async with redis.Redis.from_url(url, protocol=2) as client:
        found: dict[str, Any] = {}
        for name in keys.LOGS:
            logs: list[Any] = [await client.xrange(keys.log(P, turn, name)) for turn in some]
            sizes = [len(fields[b"c"]) for log in logs for _, fields in log]
            found[name] = {"messages": len(sizes) / seconds, "bytes": sum(sizes) / seconds}
        inboxes = [key async for key in client.scan_iter(match=f"{P}:inbox:*")]
        latest: list[Any] = [await client.xrevrange(key, count=50) for key in inboxes]
    pointers = [fields for entries in latest for _, fields in entries]
    sizes = [len(name) + len(value) for fields in pointers for name, value in fields.items()]
    return {"logs": found, "bytes_of_a_pointer": float(np.mean(sizes))}


# ---- where the milliseconds go ----------------------------------------------------------------------------------


async def waterfall(url: str, results: Results) -> dict[str, float]:
    """Medians in ms from the request: the client's moments, and those of the head (same machine, same clock)."""
    wire = await Wire.connect(url)
    try:
        journal = Journal(wire)
        heads = [await journal.head(turn_id) for turn_id in results.turn_ids]
    finally:
        await wire.aclose()
    rows = [_moments(head, begun) for head, begun in zip(heads, results.begun, strict=True)]
    marks = {name: float(np.median([row[name] for row in rows])) for name in rows[0]}
    client = {f"client has {re.sub('_', ' ', name)}": float(np.median(t)) for name, t in results.times.items()}
    return dict(sorted({**marks, **client}.items(), key=lambda item: item[1]))


def _moments(head: Head, begun: float) -> dict[str, float]:
    """Milliseconds from the client's request."""
    marks = {"turn opened": head.opened, "turn submitted": head.submitted, "turn ended": head.ended}
    for name in STAGES:
        for moment in ("queued", "claimed", "first", "done"):
            marks[f"{name} {moment}"] = getattr(head.stages[name], moment)
    return {name: us / 1e3 - 1e3 * begun for name, us in marks.items()}
