"""A whole service in one event loop for schedules of faults: every part has a wire of its own, with its injector.

Two workers of each stage, two orchestrators behind one address, fake stages, a real server, the real client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from kimia.client import AsyncKimia
from kimia.runtime.fake import FakeTiming, build
from kimia.runtime.rows import Rows
from kimia.runtime.settings import Settings
from kimia.runtime.worker import Worker
from kimia.stage import STAGES
from kimia.streams.wire import Wire, WireOptions
from orchestrator.desk import Limits
from tests.faults.injection import DisturbedKimia, Injector, disturbed_server, wire_of
from tests.faults.questions import PATIENT
from tests.faults.schedule import LEASE, Fault
from tests.orchestrator.world import Host

ROWS = 3  # of a worker: no worker has room for all callers
# A turn may be claimed as often as a schedule has faults and a busy machine has stalls: giving up is tried elsewhere.
OPTIONS = WireOptions(lease=LEASE, max_deliveries=20)
TIMING = FakeTiming(clip_seconds=0.05, prefill_seconds=0.02, step_seconds=0.004, realtime_factor=0.01, steps=44)
WINDOW = 1.5  # seconds that a reservation outlives its client
IN_TURN = replace(PATIENT, channel=(("grpc.lb_policy_name", "round_robin"),))  # one orchestrator after the other
ABSENCE = 0.2  # seconds from the death of a worker to the next one in its place


class Task:
    """The life of a part that runs as a task."""

    def __init__(self, died: Callable[[], None] = lambda: None) -> None:
        self._awake = asyncio.Event()
        self._awake.set()
        self._died = died
        self._dead = False

    async def alive(self) -> None:
        """Wait while it stands still; for ever once it has ended."""
        await self._awake.wait()
        if self._dead:
            await asyncio.Event().wait()

    async def die(self) -> None:
        """End, without a farewell."""
        self._dead = True
        self._died()
        await asyncio.Event().wait()

    async def pause(self, seconds: float) -> None:
        """Hear nothing and say nothing for so long."""
        self._awake.clear()
        asyncio.get_running_loop().call_later(seconds, self._awake.set)
        await self._awake.wait()


class Fleet:
    """The parts of a service, and what the schedule did to them."""

    def __init__(self, url: str, faults: Sequence[Fault]) -> None:
        self.injectors: list[Injector] = []
        self._url = url
        self._faults = faults
        self._lives: dict[str, int] = {}
        self._running: list[tuple[Wire, asyncio.Task[None]]] = []  # the dead too: they stand still until the end
        self._successions: set[asyncio.Task[None]] = set()
        self._targets: list[str] = []

    @property
    def fired(self) -> list[Fault]:
        """What has really been done."""
        return [fault for injector in self.injectors for fault in injector.fired]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[AsyncKimia]:
        """Start everything; the client."""
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._end_workers)
            for name in STAGES:
                for number in (1, 2):
                    await self._start(f"{name}.{number}")
            for number in (1, 2):
                await self._host(f"orchestrator.{number}", stack)
            client = DisturbedKimia(f"ipv4:{','.join(self._targets)}", options=IN_TURN)
            client.injector = self._injector("client", Task())
            yield await stack.enter_async_context(client)

    # ---- parts ----

    def _injector(self, place: str, body: Task) -> Injector:
        first = place not in self._lives
        self._lives[place] = self._lives.get(place, 0) + 1
        injector = Injector(place, self._faults if first else (), body)
        self.injectors.append(injector)
        return injector

    async def _start(self, place: str) -> None:
        name = place.partition(".")[0]
        injector = self._injector(place, Task(lambda: self._succeed(place)))
        wire = await wire_of(injector).connect(self._url, options=OPTIONS)
        stage, consumer = build(name, TIMING), f"{place}-{self._lives[place]}"
        worker = Worker(stage, wire, Rows(ROWS), consumer, "weights")
        self._running.append((wire, asyncio.create_task(worker.run())))

    def _succeed(self, place: str) -> None:
        task = asyncio.create_task(self._successor(place))
        self._successions.add(task)
        task.add_done_callback(self._successions.discard)

    async def _successor(self, place: str) -> None:
        await asyncio.sleep(ABSENCE)
        await self._start(place)

    async def _end_workers(self) -> None:
        await asyncio.gather(*self._successions)
        for wire, task in self._running:
            task.cancel()  # once: a second time would break off its own ending
            await asyncio.gather(task, return_exceptions=True)
            await wire.aclose()

    async def _host(self, place: str, stack: AsyncExitStack) -> None:
        injector = self._injector(place, Task())
        wire = await wire_of(injector).connect(self._url, options=OPTIONS)
        stack.push_async_callback(wire.aclose)
        with disturbed_server(injector):
            host = Host(wire, place, WINDOW, Limits(), Settings(listen="127.0.0.1:0"))
        await stack.enter_async_context(host.running())
        self._targets.append(host.target)
