"""What a service uses while it is under load: memory and processor time of every process, the size of its store."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import redis

from benchmarks.service import Use, use

MIB = 1 << 20
HOUR = 3600.0
WARM_UP = 0.25  # share of a run in which caches fill and allocators settle; slopes leave it out


@dataclass
class Watch:
    """Samples of every process, taken when told to."""

    processes: Callable[[], Mapping[str, int]]
    redis_url: str | None = None
    samples: dict[str, list[Sample]] = field(default_factory=dict)  # by process
    store: list[tuple[float, int, int]] = field(default_factory=list)  # (time, bytes, keys)

    def sample(self) -> None:
        """Look once at everything."""
        now = time.monotonic()
        for name, pid in self.processes().items():
            if (used := use(pid)) is not None:
                self.samples.setdefault(name, []).append(Sample(now, pid, used))
        if self.redis_url is not None:
            try:
                with redis.Redis.from_url(self.redis_url, protocol=2) as client:
                    self.store.append((now, client.info("memory")["used_memory"], client.dbsize()))
            except redis.RedisError:
                return  # it is being started again

    def report(self) -> dict[str, Any]:
        """Per process: share of a core, share of time in which it waited for one, memory and its slope."""
        return {name: _report(samples) for name, samples in self.samples.items() if len(samples) > 1}

    def data(self) -> dict[str, Any]:
        """What the store held, without what its allocator keeps: greatest size, and the slopes of size and keys."""
        times = [at for at, _, _ in self.store]
        sizes = [size / MIB for _, size, _ in self.store]
        return {
            "greatest_mib": max(sizes, default=None),
            "slope_mib_per_hour": slope(times, sizes),
            "slope_keys_per_hour": slope(times, [keys for _, _, keys in self.store]),
        }


@dataclass(frozen=True)
class Sample:
    """One look at a process."""

    at: float
    pid: int
    used: Use


def _report(samples: Sequence[Sample]) -> dict[str, Any]:
    lives = [(a.used, b.used) for a, b in pairwise(samples) if a.pid == b.pid]
    spent = sum(b.cpu_seconds - a.cpu_seconds for a, b in lives)
    waited = sum(b.waited_seconds - a.waited_seconds for a, b in lives)
    memory = [sample.used.rss / MIB for sample in samples]
    times = [sample.at for sample in samples]
    return {
        "cores": spent / (times[-1] - times[0]),
        "waiting": waited / (times[-1] - times[0]),
        "lives": len({sample.pid for sample in samples}),
        "rss_mib": {"first": memory[0], "last": memory[-1], "greatest": max(memory)},
        "slope_mib_per_hour": slope(times, memory),
    }


def slope(times: Sequence[float], values: Sequence[float]) -> float | None:
    """Change per hour after the warm-up: the median of the slopes between all pairs (Theil-Sen); None: too few."""
    kept = [(at, v) for at, v in zip(times, values, strict=True) if at >= times[0] + WARM_UP * (times[-1] - times[0])]
    if len(kept) < 3:
        return None
    at, value = np.array(kept).T
    first, second = np.triu_indices(len(kept), 1)
    return float(np.median((value[second] - value[first]) / (at[second] - at[first])) * HOUR)


# ---- what is left in the store ----------------------------------------------------------------------------------

PERMANENT = ("jobs", "token", "workers")  # docs/protocol.md; everything else expires


def leftovers(redis_url: str) -> dict[str, Any]:
    """All keys of a store by the word after their tag: how many, their longest time to live, some of their names.

    `left` counts those that are neither permanent by the protocol nor those of processes that still run.
    """
    kinds: dict[str, dict[str, Any]] = {}
    with redis.Redis.from_url(redis_url, protocol=2, decode_responses=True) as client:
        for key in client.scan_iter(count=1000):
            kind = kind_of(key)
            found = kinds.setdefault(kind, {"keys": 0, "for_ever": 0, "longest_ttl_seconds": 0, "examples": []})
            ttl = client.ttl(key)
            found["keys"] += 1
            found["for_ever"] += ttl == -1
            found["longest_ttl_seconds"] = max(found["longest_ttl_seconds"], ttl)
            if len(found["examples"]) < 5:
                found["examples"].append(key)
    return {"kinds": kinds, "left": sum(found["keys"] for kind, found in kinds.items() if kind not in PERMANENT)}


def kind_of(key: str) -> str:
    """`turn`, `session`, `jobs` ... of a key such as `{0}:turn:<id>:audio`."""
    return key.partition(":")[2].partition(":")[0]
