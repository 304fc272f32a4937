"""Admission: a session is given a row in every stage of its route before anything of it is stored, or is refused.

The reservation is renewed while the session is served. When the client vanishes it is left to itself, so that the
client may come back within the resume window; when the process dies, it ends the same way.

A journal that was restarted, or replaced by a replica, may know neither the workers nor who was admitted. Workers that
live announce themselves again within the time that an announcement lasts, and until then nobody is refused for want of
rows: a caller whose process died with the journal comes back, and must not be told that no worker is running.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from kimia.errors import CapacityError, UnavailableError
from kimia.runtime.logs import get_logger
from kimia.runtime.metrics import REFUSED
from kimia.stage import StageKind
from kimia.streams.ledger import Ledger
from kimia.streams.patience import end, pause_after

RESUME_WINDOW = 30.0  # seconds that a reservation outlives its client
RENEWALS = 3  # attempts to renew it within that time
CALL = "call"  # holder: all calls of a session are one, so that a client that comes back finds its own

log = get_logger()


class Admission:
    """The ledger as an orchestrator uses it. `tenant_sessions` 0: tenants have no limit of their own."""

    def __init__(self, ledger: Ledger, tenant_sessions: int = 0, window: float = RESUME_WINDOW) -> None:
        self.ledger = ledger
        self.window = window
        self.journal_is_new: Callable[[float], Awaitable[bool]] = _never  # less than so many seconds ago it was another
        self._limit = tenant_sessions or None

    async def admit(self, session_id: str, tenant: str, route: Sequence[StageKind], holder: str = CALL) -> Reservation:
        """Reserve a row in every stage of the route. Raises CapacityError that says when to try again."""
        reservation = Reservation(self, session_id, tenant, tuple(route), holder)
        try:
            await self._reserved(reservation)
        except CapacityError as error:
            REFUSED.labels(error.stage or "tenant").inc()
            raise
        reservation.keep()
        return reservation

    async def _reserved(self, reservation: Reservation) -> None:
        """Reserve. A refusal counts once every worker that lives has had the time to announce its rows."""
        refusals = 0
        while True:
            try:
                return await reservation.reserve()
            except CapacityError as error:
                if not error.stage or not await self.journal_is_new(self.ledger.announced_seconds):
                    raise
            refusals += 1
            await asyncio.sleep(pause_after(refusals))

    def resumed(self, session_id: str, tenant: str) -> Reservation:
        """Renew what the session still holds; where that has ended, its turn runs all the same."""
        reservation = Reservation(self, session_id, tenant, (), None)
        reservation.keep()
        return reservation

    async def reserve(self, session_id: str, tenant: str, route: Sequence[StageKind], holder: str = CALL) -> None:
        """Reserve for one window, or renew and extend what there is. Raises CapacityError."""
        await self.ledger.reserve(session_id, tenant, route, self.window, self._limit, holder)


class Reservation:
    """The rows of one session, renewed until `release` or `leave`; without a holder, only for those that it has."""

    def __init__(
        self, admission: Admission, session_id: str, tenant: str, route: tuple[StageKind, ...], holder: str | None
    ) -> None:
        self._admission = admission
        self._session_id = session_id
        self._tenant = tenant
        self._route = route
        self._holder = holder
        self._renewing: asyncio.Task[None] | None = None
        self._left = False

    async def reserve(self) -> None:
        """Ask for the rows. Raises CapacityError."""
        await self._admission.reserve(self._session_id, self._tenant, self._route, self._holder or "")

    def keep(self) -> None:
        """Renew from now on."""
        self._renewing = asyncio.create_task(self._renew())

    def leave(self) -> None:
        """Renew no longer: the rows are free when the window has passed."""
        self._left = True  # a cancellation may be lost in the client of the ledger: see kimia.streams.patience.end
        if self._renewing is not None:
            self._renewing.cancel()

    async def release(self) -> None:
        """Give the rows back now, unless another holder of the session needs them.

        Where the ledger is away they are free when the window has passed.
        """
        self.leave()
        if self._renewing is not None:
            await end([self._renewing])  # what it has asked for already must not come after this
        try:
            await self._admission.ledger.release(self._session_id, self._holder)
        except UnavailableError:
            log.warning("reservation left to expire", session=self._session_id)

    async def _renew(self) -> None:
        """A session that was admitted is not dropped: what is refused or unreachable now is asked for again."""
        while not self._left:
            await asyncio.sleep(self._admission.window / RENEWALS)
            try:
                held = await self._admission.ledger.renew(self._session_id, self._admission.window, self._holder)
                if not held and self._route:
                    await self.reserve()
            except (CapacityError, UnavailableError) as error:
                log.warning("reservation not renewed", session=self._session_id, reason=error.reason)


async def _never(_: float) -> bool:
    return False
