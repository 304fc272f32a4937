"""A state machine over admission: sessions, workers and time in any order, against a real server and a model of it."""

from __future__ import annotations

import copy
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from kimia.errors import CapacityError
from kimia.stage import STAGES, StageKind
from kimia.streams import keys
from kimia.streams.ledger import NO_WORKER_RETRY, RELEASE_WINDOW, SHORTEST_RETRY, Ledger, StageUsage, WorkerRows
from kimia.streams.wire import PARTITIONS
from tests.faults.ground import HOUR, Ground, View
from tests.faults.truth import demand

ROUTES = (("llm",), ("llm", "detokenizer"), ("tokenizer", "llm", "detokenizer"))
TENANTS = {"s1": "acme", "s2": "acme", "s3": "beta"}
SESSION = st.sampled_from(sorted(TENANTS))
STAGE = st.sampled_from(list(STAGES.values()))
WORKER = st.sampled_from(("w1", "w2"))
REMEMBERED = 6  # steps that a fail-over may take back


@dataclass
class Books:
    """What the ledger must say."""

    workers: dict[str, dict[str, WorkerRows]] = field(default_factory=lambda: {name: {} for name in STAGES})
    places: dict[str, set[str]] = field(default_factory=dict)  # session -> stages in which it has a row
    releases: Counter[str] = field(default_factory=Counter)  # of the last half minute, by stage and `@<tenant>`

    def reserved(self, stage: str) -> set[str]:
        return {session for session, stages in self.places.items() if stage in stages}

    def rows(self, stage: str) -> int:
        return sum(worker.rows for worker in self.workers[stage].values())

    def refuses(self, session: str, route: Sequence[StageKind], limit: int | None) -> float | None:
        """When a session is to come back: its tenant has too many, or a stage has no row left. None: it is admitted."""
        others = [other for other in self.places if TENANTS[other] == TENANTS[session]]
        if session not in self.places and limit is not None and len(others) >= limit:
            return self.retry(f"@{TENANTS[session]}", len(others) - limit)
        held = self.places.get(session, set())
        for kind in route:
            reserved, rows = len(self.reserved(kind.name)), self.rows(kind.name)
            if kind.name not in held and reserved >= rows:
                return self.retry(kind.name, reserved - rows) if rows else NO_WORKER_RETRY
        return None

    def retry(self, pool: str, beyond: int) -> float:
        """When so many and one more are released, if they go on as in the last half minute."""
        rate = max(self.releases[pool], 1) / RELEASE_WINDOW  # per second
        return min(max((beyond + 1) / rate, SHORTEST_RETRY), RELEASE_WINDOW)

    def release(self, session: str) -> None:
        """A session gives back what it holds."""
        if session in self.places:
            self.releases.update((*self.places.pop(session), f"@{TENANTS[session]}"))


class Admission(RuleBasedStateMachine):
    """Sessions that come, stay and go; workers that come and die. `ground` is set by whoever runs it."""

    ground: ClassVar[Ground]

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(self.ground.wire())
        self.books = Books()
        self.past: deque[tuple[View, Books]] = deque(maxlen=REMEMBERED)

    @initialize(rows=st.integers(1, 2))
    def begin(self, rows: int) -> None:
        for kind in STAGES.values():
            self.announce(kind=kind, worker="w1", rows=rows)

    @rule(kind=STAGE, worker=WORKER, rows=st.integers(0, 2))
    def announce(self, kind: StageKind, worker: str, rows: int) -> None:
        self.ground.run(self.ledger.announce(kind, worker, rows, 0))
        self.books.workers[kind.name][worker] = WorkerRows(rows, 0)

    @rule(kind=STAGE, worker=WORKER, politely=st.booleans())
    def leave(self, kind: StageKind, worker: str, politely: bool) -> None:
        """A worker withdraws, or is not heard of for three leases."""
        name = keys.ledger(f"workers:{kind.name}")
        if politely:
            self.ground.run(self.ledger.withdraw(kind, worker))
        elif worker in self.books.workers[kind.name]:
            self.ground.redis.hset(name, worker, "5 0 1")
        self.books.workers[kind.name].pop(worker, None)

    @rule(session=SESSION, route=st.sampled_from(ROUTES), limit=st.sampled_from((None, None, 1)), again=st.booleans())
    def reserve(self, session: str, route: Sequence[str], limit: int | None, again: bool) -> None:
        kinds = [STAGES[name] for name in route]
        for _ in range(1 + again):
            retry = self.books.refuses(session, kinds, limit)
            if retry is None:
                self.books.places[session] = {*self.books.places.get(session, ()), *route}
            try:
                self.ground.run(self.ledger.reserve(session, TENANTS[session], kinds, HOUR, limit))
            except CapacityError as error:
                demand(retry is not None, session, "was refused:", error)
                demand(isclose(error.retry_after or 0, retry or 0), "to come back in", error.retry_after, "not", retry)
            else:
                demand(retry is None, session, "was admitted beyond the capacity")

    @rule(session=SESSION)
    def renew(self, session: str) -> None:
        demand(self.ground.run(self.ledger.renew(session, HOUR)) == (session in self.books.places), "renewed otherwise")

    @rule(session=SESSION, again=st.booleans())
    def release(self, session: str, again: bool) -> None:
        for _ in range(1 + again):
            self.ground.run(self.ledger.release(session))
        self.books.release(session)

    @rule(session=SESSION, late=st.booleans())
    def end(self, session: str, late: bool) -> None:
        """A reservation's time is over, long ago: that is no release of the last half minute.

        `late`: its hash outlives it by a moment.
        """
        for pool in (*STAGES, f"@{TENANTS[session]}"):
            self.ground.redis.zadd(keys.ledger(f"reserved:{pool}"), {session: 1}, xx=True)
        if not late:
            self.ground.forget(keys.ledger(f"session:{session}"))
        self.books.places.pop(session, None)

    @precondition(lambda self: len(self.past) > 1)
    @rule(steps=st.integers(1, REMEMBERED - 1))
    def fail_over(self, steps: int) -> None:
        """Another server takes over which has not got the last writes."""
        for _ in range(min(steps, len(self.past) - 1)):
            self.past.pop()
        view, self.books = self.past.pop()
        self.ground.put_back(view)

    @invariant()
    def the_books_are_right(self) -> None:
        usage = self.ground.run(self.ledger.usage())
        for name in STAGES:
            wanted = StageUsage(self.books.workers[name], self.books.rows(name), len(self.books.reserved(name)))
            demand(usage[name] == wanted, name, "is used as", usage[name], "and not", wanted)
        view = self.ground.look()
        for name, key in view.items():
            lasting = name == PARTITIONS or ":workers:" in name
            demand(lasting or 0 <= key.ttl <= HOUR * 1000, name, "lives for", key.ttl, "ms")
        self.past.append((view, copy.deepcopy(self.books)))
