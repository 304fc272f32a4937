"""A call for asyncio: sound and text in, turns out, over as many connections as it takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import grpc
import grpc.aio

from kimia.client.calling import CallerSide, CallState
from kimia.client.connection import ClientOptions, Patience
from kimia.client.events import Answer, Ended, Event
from kimia.client.progress import TurnProgress
from kimia.errors import InternalError, KimiaError, StateError
from kimia.v1 import kimi_audio_pb2 as pb

if TYPE_CHECKING:
    from kimia.client.aio import AsyncKimia
    from kimia.v1.kimi_audio_pb2_grpc import KimiAudioAsyncStub

Stream: TypeAlias = "grpc.aio.StreamStreamCall[pb.ConverseRequest, pb.ConverseResponse]"


class AsyncCall(CallerSide):
    """One call. Send as the caller speaks, iterate over what comes back; both at once, from any tasks of one loop.

    Entering connects; leaving hangs up. Events of a turn end with TurnDone, TurnCancelled or TurnFailed; iteration
    ends after `finish()`, when all turns have ended. Raises KimiaError where the call cannot go on.
    """

    def __init__(
        self,
        stub: KimiAudioAsyncStub,
        config: pb.CallConfig,
        options: ClientOptions,
        client: AsyncKimia,
    ) -> None:
        self.state = CallState(config)
        self._stub = stub
        self._options = options
        self._client = client
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._unsent = asyncio.Event()
        self._ready = asyncio.Event()
        self._finished = False
        self._running: asyncio.Task[None] | None = None
        self._resuming: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        self._running = asyncio.create_task(self._run())
        ready = asyncio.create_task(self._ready.wait())
        try:
            await asyncio.wait((ready, self._running), return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            self._running.cancel()
            raise
        finally:
            ready.cancel()
        self._raise_failure()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [task for task in (self._running, *self._resuming.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- what the caller does ----

    def finish(self) -> None:
        """Nothing more will be sent; iteration ends after the turns that run."""
        self._do(lambda: None)
        self._finished = True

    # ---- what comes back ----

    async def __aiter__(self) -> AsyncIterator[Event]:
        """All events until the call ends."""
        while (event := await self._events.get()) is not None:
            yield event
        self._events.put_nowait(None)  # for whoever asks next
        if self._running is not None:
            await asyncio.wait((self._running,))
        self._raise_failure()

    async def turn(self) -> AsyncIterator[Event]:
        """The events of one turn, up to its end."""
        async for event in self:
            yield event
            if isinstance(event, Ended):
                return
        raise StateError("the call ended before the turn did")

    async def answer(self) -> Answer:
        """One turn, together. Raises the turn's error."""
        async for _ in self.turn():
            pass
        if self.state.last is None:
            raise InternalError("a turn ended and left nothing")
        return self.state.last.answer()

    # ---- connections ----

    def _do(self, action: Callable[[], None]) -> None:
        self._raise_failure()
        if self._finished:
            raise StateError("the call was finished; nothing more can be sent")
        action()
        self._unsent.set()

    def _raise_failure(self) -> None:
        if self._running is None:
            raise StateError(
                "the call is not connected; use it as a context manager: async with kimia.converse() as call"
            )
        if self._running.done() and not self._running.cancelled():
            self._running.result()

    async def _run(self) -> None:
        patience = Patience(self._options)
        try:
            while not await self._connection(patience):
                pass
            await asyncio.gather(*self._resuming.values())
        finally:
            self._events.put_nowait(None)

    async def _connection(self, patience: Patience) -> bool:
        """One connection, until it is lost (False) or the call has ended (True). Raises KimiaError."""
        lost: grpc.RpcError | None = None
        stream: Stream = self._stub.Converse()
        try:
            if await self._set_up(stream):
                await self._carry(stream, patience)
                if self._finished and self.state.settled(self._resuming):
                    return True
        except grpc.RpcError as error:
            lost = error
        finally:
            stream.cancel()
            self.state.disconnected()
        await asyncio.sleep(patience.delay(lost))
        return False

    async def _set_up(self, stream: Stream) -> bool:
        """Whether the service took the call; being ready alone is no progress, or a call could fail for ever."""
        await stream.write(self.state.first_message())
        response: Any = await stream.read()
        if response is grpc.aio.EOF or not response.HasField("ready"):
            return False
        self.state.connected(response.ready)
        self._unsent.set()
        self._take_up_turns()
        self._ready.set()
        return True

    async def _carry(self, stream: Stream, patience: Patience) -> None:
        """Both directions until the stream ends."""
        sending = asyncio.create_task(self._send(stream))
        try:
            while True:
                response: Any = await stream.read()
                if response is grpc.aio.EOF:
                    return
                patience.progress()
                self._tell(self.state.received(response))
        finally:
            sending.cancel()
            await asyncio.gather(sending, return_exceptions=True)

    async def _send(self, stream: Stream) -> None:
        """Write what there is; a stream that cannot be written to ends in the reader, which knows why."""
        try:
            while True:
                self._unsent.clear()
                while (request := self.state.next_request()) is not None:
                    await stream.write(request)
                if self._finished:
                    await stream.done_writing()
                    return
                await self._unsent.wait()
        except (grpc.RpcError, asyncio.InvalidStateError):
            return

    def _take_up_turns(self) -> None:
        """Turns that ran when the last connection was lost: their own streams go on from the last event."""
        for turn_id, progress in self.state.turns.items():
            if turn_id not in self._resuming:
                self._resuming[turn_id] = asyncio.create_task(self._take_up(turn_id, progress))

    async def _take_up(self, turn_id: str, progress: TurnProgress) -> None:
        try:
            async for event in self._client.resume_progress(progress).events():
                self.state.ended(event)
                self._tell(event)
        except KimiaError as error:
            self._tell(self.state.give_up(turn_id, error))
        finally:
            del self._resuming[turn_id]

    def _tell(self, event: Event | None) -> None:
        if event is not None:
            self._events.put_nowait(event)
