"""The orchestrator as a process: python -m orchestrator. Settings: kimia.runtime.settings."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import grpc.aio

from kimia.errors import UnavailableError
from kimia.runtime.logs import get_logger
from kimia.runtime.metrics import CAPACITY, RESERVED
from kimia.runtime.service import connect, consumer_name, run_service
from kimia.runtime.settings import Settings
from kimia.streams.inbox import Inbox
from kimia.streams.ledger import Ledger
from kimia.v1.kimi_audio_pb2 import DESCRIPTOR
from kimia.v1.kimi_audio_pb2_grpc import add_KimiAudioServicer_to_server
from orchestrator.admission import Admission
from orchestrator.desk import Desk, Limits
from orchestrator.servicer import KimiAudio
from orchestrator.turn import Turns

NAME = "orchestrator"
FAREWELL_SECONDS = 5.0  # for requests that were cut off to leave things in order
USAGE_SECONDS = 5.0  # between two looks at the ledger for the metrics

log = get_logger()


class Orchestrator:
    """The public service with everything below it: a `kimia.runtime.service.Service`."""

    name = NAME

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._servicer = KimiAudio()
        self._stack = AsyncExitStack()
        self._drained = asyncio.Event()
        self._ledger: Ledger | None = None

    def register(self, server: grpc.aio.Server) -> Sequence[str]:
        """The public service."""
        add_KimiAudioServicer_to_server(self._servicer, server)
        return [service.full_name for service in DESCRIPTOR.services_by_name.values()]

    async def start(self) -> None:
        """Reach Redis, waiting for it as long as it takes."""
        settings = self._settings
        wire = await connect(settings)
        self._stack.push_async_callback(wire.aclose)
        inbox = await self._stack.enter_async_context(Inbox(wire, consumer_name(NAME)))
        self._ledger = Ledger(wire)
        desk = Desk(
            Turns(wire, inbox),
            Admission(self._ledger, settings.tenant_sessions),
            Limits(
                settings.turn_deadline_seconds,
                settings.max_clip_bytes,
                settings.max_turn_bytes,
                settings.call_idle_seconds,
            ),
        )
        self._stack.push_async_callback(desk.aclose)
        self._stack.push_async_callback(self._servicer.ended, FAREWELL_SECONDS)
        self._servicer.open(desk)

    async def run(self) -> None:
        """Requests are served by the server; here the ledger is shown to the metrics."""
        while not self._drained.is_set():
            await self._show_usage()
            try:
                async with asyncio.timeout(USAGE_SECONDS):
                    await self._drained.wait()
            except TimeoutError:
                continue

    async def drain(self, seconds: float) -> None:
        """Refuse new requests, let the running ones end."""
        await self._servicer.drain(seconds)
        self._drained.set()

    async def aclose(self) -> None:
        """Leave Redis."""
        await self._stack.aclose()

    async def _show_usage(self) -> None:
        if self._ledger is None:
            return
        try:
            usage = await self._ledger.usage()
        except UnavailableError as error:
            log.warning("capacity not read", error=str(error))
            return
        for stage, rows in usage.items():
            CAPACITY.labels(stage).set(rows.capacity)
            RESERVED.labels(stage).set(rows.reserved)


if __name__ == "__main__":
    raise SystemExit(run_service(Orchestrator, NAME))
