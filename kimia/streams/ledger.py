"""The capacity ledger: rows that live workers offer, and rows that sessions have reserved.

    {ledger}:workers:<stage>        hash: worker -> "rows used end"; announcements end by themselves
    {ledger}:reserved:<pool>        sorted set: session -> end; a pool is a stage or `@<tenant>`
    {ledger}:released:<pool>        sorted set: releases of the last half minute, for the retry delay
    {ledger}:session:<session>      hash: tenant and stages of a reservation, and until when each holder wants it

A session is admitted to every stage of its route or to none, in one call, and is then never refused a turn on it. Ends
are milliseconds on the server's clock. Every call raises UnavailableError when the journal cannot be reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from kimia.errors import CapacityError, SettingsError
from kimia.stage import STAGES, StageKind
from kimia.streams import keys
from kimia.streams.wire import PARTITIONS, Argument, Wire

RELEASE_WINDOW: Final = 30.0  # seconds over which releases are counted
SHORTEST_RETRY: Final = 0.5  # seconds
NO_WORKER_RETRY: Final = 5.0  # seconds: a worker that is starting
ANNOUNCED_LEASES: Final = 3  # an announcement lasts for so many leases; one comes every lease


@dataclass(frozen=True)
class WorkerRows:
    """Turns that a worker can compute at once, and those that it computes."""

    rows: int
    used: int


@dataclass(frozen=True)
class StageUsage:
    """One stage: its live workers by name, their rows together, and the sessions that have reserved one."""

    workers: Mapping[str, WorkerRows]
    capacity: int
    reserved: int


class Ledger:
    """Admission of sessions against the rows of live workers."""

    def __init__(self, wire: Wire) -> None:
        self._wire = wire
        self.announced_seconds = wire.options.lease * ANNOUNCED_LEASES  # for which a worker's rows count

    async def announce(self, kind: StageKind, worker: str, rows: int, used: int) -> None:
        """Count a worker's rows for the next three leases.

        Raises SettingsError beside a live worker whose weights are quantised otherwise, which both names say: the turns
        of one could not go on in the other.
        """
        life, partitions = _milliseconds(self.announced_seconds), self._wire.options.partitions
        unlike = await self._wire.call(
            "ledger_announce", [_workers(kind), PARTITIONS], [worker, rows, used, life, partitions]
        )
        if unlike:
            raise SettingsError(
                f"{worker} cannot serve beside {unlike.decode()}: a turn that changes hands goes on as it would have "
                f"only if all {kind.name} workers have the same KIMIA_QUANTIZE; set it alike, or stop the others first"
            )

    async def withdraw(self, kind: StageKind, worker: str) -> None:
        """Count a worker's rows no more; sessions keep what they have reserved."""
        await self._wire.call("ledger_announce", [_workers(kind)], [worker, 0, 0, 0])

    async def reserve(
        self,
        session: str,
        tenant: str,
        route: Sequence[StageKind],
        seconds: float,
        tenant_limit: int | None = None,
        holder: str = "",
    ) -> None:
        """Reserve one row in every stage of the route; for a session that holds some, renew them and add the rest.

        Several holders share the rows of a session until the last of them gives them back. Raises CapacityError, with
        nothing changed, when a stage has no row left or no live worker, or when the tenant has `tenant_limit` sessions
        already (reason TENANT_LIMIT).
        """
        limit = -1 if tenant_limit is None else tenant_limit
        args: list[Argument] = [
            keys.ledger(""),
            session,
            tenant,
            _milliseconds(seconds),
            limit,
            _milliseconds(RELEASE_WINDOW),
            holder,
        ]
        answer = await self._wire.call("ledger_reserve", [_session(session)], [*args, *(kind.name for kind in route)])
        if answer != b"ok":
            word, stage, size, wanted, releases = answer
            raise _refusal(word.decode(), stage.decode(), int(size), _retry(int(wanted), int(releases)))

    async def renew(self, session: str, seconds: float, holder: str | None = None) -> bool:
        """Let a reservation last from now for so many seconds; False when it has ended: reserve again."""
        return await self._renew(session, max(_milliseconds(seconds), 1), holder)

    async def release(self, session: str, holder: str | None = None) -> None:
        """Give a reservation back, if there is one: that of one holder, who may be the last, or of all."""
        await self._renew(session, 0, holder)

    async def usage(self) -> dict[str, StageUsage]:
        """What every stage offers and has reserved, by the stage's name."""
        wanted = [key for kind in STAGES.values() for key in (_workers(kind), keys.ledger(f"reserved:{kind.name}"))]
        answer = await self._wire.call("ledger_usage", wanted, [])
        return {name: _usage(found) for name, found in zip(STAGES, answer, strict=True)}

    async def _renew(self, session: str, life: int, holder: str | None) -> bool:
        args: list[Argument] = [keys.ledger(""), session, life, _milliseconds(RELEASE_WINDOW)]
        if holder is not None:
            args.append(holder)
        return bool(await self._wire.call("ledger_renew", [_session(session)], args))


def _retry(wanted: int, releases: int) -> float:
    """Seconds until so many rows are released if that goes on as it did; no longer than it was looked back for."""
    return min(max(RELEASE_WINDOW * wanted / max(releases, 1), SHORTEST_RETRY), RELEASE_WINDOW)


def _refusal(word: str, stage: str, size: int, retry: float) -> CapacityError:
    """Why a session is refused, and when to try again."""
    if word == "tenant":
        rule = f"the tenant has its {size} sessions already; end one, or ask for a higher limit"
        return CapacityError(rule, reason="TENANT_LIMIT", retry_after=retry)
    if size:
        rule = f"all {size} rows of the {stage} stage are reserved; try again in {retry:.1f} s, or start more workers"
        error = CapacityError(rule, retry_after=retry)
    else:
        error = CapacityError(f"no {stage} worker is running; start one", retry_after=NO_WORKER_RETRY)
    error.stage = stage
    return error


def _usage(found: Sequence[bytes | int]) -> StageUsage:
    workers: dict[str, WorkerRows] = {}
    for at in range(1, len(found), 3):
        name, rows, used = found[at : at + 3]
        workers[bytes(name).decode()] = WorkerRows(int(rows), int(used))
    return StageUsage(workers, sum(worker.rows for worker in workers.values()), int(found[0]))


def _workers(kind: StageKind) -> str:
    return keys.ledger(f"workers:{kind.name}")


def _session(session: str) -> str:
    return keys.ledger(f"session:{session}")


def _milliseconds(seconds: float) -> int:
    return round(seconds * 1000)
