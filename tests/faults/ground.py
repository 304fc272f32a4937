"""A real server to play on: looked at as a whole after every step, rolled back to an earlier one, its time moved."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import redis
import redis.asyncio

from kimia.streams import keys
from kimia.streams.wire import Wire, WireOptions
from tests.faults.breaks import broken, fault

P = "{0}"  # the one partition
# Leases end when a rule says so, and never by themselves; nobody waits.
OPTIONS = WireOptions(lease=600, max_deliveries=2, prefix_patience=0)
HOUR = 3600  # seconds
STAGES = ("tokenizer", "llm", "detokenizer")
# What happens at every 64th turn of a session happens here at every one.
OFTEN = fault("expired turns are forgotten at once", "open", "FORGOTTEN_AT_ONCE = 64", "FORGOTTEN_AT_ONCE = 1")

LOOK = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  local kind, value, pending = redis.call('TYPE', key).ok, false, false
  if kind == 'hash' then value = redis.call('HGETALL', key)
  elseif kind == 'set' then value = redis.call('SMEMBERS', key)
  elseif kind == 'string' then value = redis.call('GET', key)
  elseif kind == 'stream' then
    value = redis.call('XRANGE', key, '-', '+')
    if redis.call('XINFO', 'GROUPS', key)[1] then
      pending = redis.call('XPENDING', key, 'workers', '-', '+', 1000)
    end
  end
  found[#found + 1] = {key, kind, redis.call('PTTL', key), value, pending, redis.call('DUMP', key)}
end
return found
"""


AGE = """
for _, key in ipairs(redis.call('KEYS', '*')) do
  if redis.call('TYPE', key).ok == 'stream' and redis.call('XINFO', 'GROUPS', key)[1] then
    for _, entry in ipairs(redis.call('XPENDING', key, 'workers', '-', '+', 1000)) do
      redis.call('XCLAIM', key, 'workers', entry[2], 0, entry[1], 'IDLE', ARGV[1], 'JUSTID')
    end
  elseif redis.call('TYPE', key).ok == 'hash' then
    for _, stage in ipairs({'tokenizer', 'llm', 'detokenizer'}) do
      if redis.call('HEXISTS', key, stage .. ':lease') == 1 then redis.call('HSET', key, stage .. ':lease', 1) end
    end
  end
end
"""

JUMP = """
for _, key in ipairs(KEYS) do
  for _, name in ipairs({'deadline', 'tokenizer:lease', 'llm:lease', 'detokenizer:lease'}) do
    local was = tonumber(redis.call('HGET', key, name) or 0)
    if was > 0 then redis.call('HSET', key, name, math.max(1, was - ARGV[1] * 1000000)) end
  end
end
"""


@dataclass(frozen=True)
class Key:
    """One key as it lies there. `holders`: who has which entry of a job stream pending."""

    ttl: int  # milliseconds; -1: it does not expire
    value: Any
    holders: Mapping[str, str]
    dump: bytes = field(repr=False)


class View(dict[str, Key]):
    """Everything that lies in the server."""

    def hash(self, name: str) -> dict[str, bytes]:
        """Fields of a hash; empty where it is not."""
        flat = self[name].value if name in self else []
        return {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}

    def entries(self, name: str) -> list[tuple[str, dict[str, bytes]]]:
        """Entries of a stream: id and fields."""
        found = self[name].value if name in self else []
        return [
            (entry.decode(), {flat[i].decode(): flat[i + 1] for i in range(0, len(flat), 2)}) for entry, flat in found
        ]

    def holder(self, stream: str, entry: str) -> str | None:
        """Who has an entry of a job stream pending."""
        return self[stream].holders.get(entry) if stream in self else None

    def job_streams(self) -> list[str]:
        """Job streams of all stages, those of single workers left out."""
        return [name for name in self if name.startswith(f"{P}:jobs:") and ":@" not in name]


class Ground:
    """One server, one event loop for calls of the system; the ground itself looks and meddles beside it."""

    def __init__(self, url: str) -> None:
        self._runner = asyncio.Runner()
        self._client = redis.asyncio.Redis.from_url(url)
        self.redis = redis.Redis.from_url(url)
        self._look, self._age, self._jump = (self.redis.register_script(text) for text in (LOOK, AGE, JUMP))

    def close(self) -> None:
        """Give everything back."""
        self.run(self._client.aclose())
        self._runner.close()
        self.redis.close()

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        """The answer of a call of the system."""
        return self._runner.run(call)

    def wire(self) -> Wire:
        """A wire to the emptied server."""
        self.redis.flushall()
        return Wire(self._client, self._client, OPTIONS)

    # ---- the whole server ----

    def look(self) -> View:
        """Everything that lies there, at one moment."""
        view = View()
        for name, _, ttl, value, pending, dump in self._look():
            holders = {entry.decode(): consumer.decode() for entry, consumer, *_ in pending or ()}
            view[name.decode()] = Key(ttl, value, holders, dump)
        return view

    def put_back(self, view: View) -> None:
        """Make the server what it was: so a promoted replica looks that lacks the last writes, a prefix of all."""
        with self.redis.pipeline(transaction=True) as pipe:
            pipe.flushall()
            for name, key in view.items():
                pipe.restore(name, max(key.ttl, 0), key.dump)
            pipe.execute()

    # ---- time ----

    def age(self) -> None:
        """Nobody has given a sign of life for an hour: all entries are old, all leases have ended."""
        self._age(args=[HOUR * 1000])

    def age_entry(self, stream: str, entry: str, holder: str) -> None:
        """Nobody has said anything of one pending entry for an hour."""
        self.redis.xclaim(stream, keys.GROUP, holder, 0, [entry], idle=HOUR * 1000, justid=True)

    def end_lease(self, turn: str, stage: str) -> None:
        """A claim's lease ends now."""
        self.redis.hset(keys.head(P, turn), f"{stage}:lease", 1)

    def jump(self, turns: Iterable[str], seconds: int) -> None:
        """The clock jumps: what was written of turns is so much older (or, below 0, is of the future)."""
        self._jump(keys=[keys.head(P, turn) for turn in turns], args=[seconds])

    def forget(self, *names: str) -> None:
        """Keys expire."""
        with self.redis.pipeline() as pipe:
            for name in names:
                pipe.pexpire(name, -1)
            pipe.execute()


@contextmanager
def ground_at(url: str) -> Iterator[Ground]:
    """A ground that is closed in the end."""
    ground = Ground(url)
    try:
        with broken(OFTEN):
            yield ground
    finally:
        ground.close()
