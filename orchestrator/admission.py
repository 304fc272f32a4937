"""Admission: a session is given a row in every stage of its route before anything of it is stored, or is refused.

The reservation is renewed while the session is served. When the client vanishes it is left to itself, so that the
client may come back within the resume window; when the process dies, it ends the same way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from kimia.errors import CapacityError, UnavailableError
from kimia.runtime.logs import get_logger
from kimia.stage import StageKind
from kimia.streams.ledger import Ledger

RESUME_WINDOW = 30.0  # seconds that a reservation outlives its client
RENEWALS = 3  # attempts to renew it within that time

log = get_logger()


class Admission:
    """The ledger as an orchestrator uses it. `tenant_sessions` 0: tenants have no limit of their own."""

    def __init__(self, ledger: Ledger, tenant_sessions: int = 0, window: float = RESUME_WINDOW) -> None:
        self.ledger = ledger
        self.window = window
        self._limit = tenant_sessions or None

    async def admit(self, session_id: str, tenant: str, route: Sequence[StageKind]) -> Reservation:
        """Reserve a row in every stage of the route. Raises CapacityError that says when to try again."""
        reservation = Reservation(self, session_id, tenant, tuple(route))
        await reservation.reserve()
        reservation.keep()
        return reservation

    def resumed(self, session_id: str, tenant: str) -> Reservation:
        """Renew what the session still holds; where that has ended, its turn runs all the same."""
        reservation = Reservation(self, session_id, tenant, ())
        reservation.keep()
        return reservation

    async def reserve(self, session_id: str, tenant: str, route: Sequence[StageKind]) -> None:
        """Reserve for one window, or renew and extend what there is. Raises CapacityError."""
        await self.ledger.reserve(session_id, tenant, route, self.window, self._limit)


class Reservation:
    """The rows of one session, renewed until `release` or `leave`."""

    def __init__(self, admission: Admission, session_id: str, tenant: str, route: tuple[StageKind, ...]) -> None:
        self._admission = admission
        self._session_id = session_id
        self._tenant = tenant
        self._route = route
        self._renewing: asyncio.Task[None] | None = None

    async def reserve(self) -> None:
        """Ask for the rows. Raises CapacityError."""
        await self._admission.reserve(self._session_id, self._tenant, self._route)

    def keep(self) -> None:
        """Renew from now on."""
        self._renewing = asyncio.create_task(self._renew())

    def leave(self) -> None:
        """Renew no longer: the rows are free when the window has passed."""
        if self._renewing is not None:
            self._renewing.cancel()

    async def release(self) -> None:
        """Give the rows back now; where the ledger is away, when the window has passed."""
        self.leave()
        try:
            await self._admission.ledger.release(self._session_id)
        except UnavailableError:
            log.warning("reservation left to expire", session=self._session_id)

    async def _renew(self) -> None:
        """A session that was admitted is not dropped: what is refused or unreachable now is asked for again."""
        while True:
            await asyncio.sleep(self._admission.window / RENEWALS)
            try:
                held = await self._admission.ledger.renew(self._session_id, self._admission.window)
                if not held and self._route:
                    await self.reserve()
            except (CapacityError, UnavailableError) as error:
                log.warning("reservation not renewed", session=self._session_id, reason=error.reason)
