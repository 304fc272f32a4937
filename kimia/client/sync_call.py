"""A call for plain, blocking Python: sound and text in, turns out, over as many connections as it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from threading import Condition
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc

from kimia.client.calling import CallerSide, CallState
from kimia.client.connection import ClientOptions, Patience
from kimia.client.events import Answer, Ended, Event
from kimia.errors import InternalError, KimiaError, StateError
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.kimi_audio_pb2_grpc import KimiAudioStub

if TYPE_CHECKING:
    from kimia.client.sync import Kimia


class Call(CallerSide):
    """One call. Send from any thread, iterate over what comes back in one.

    Entering connects; leaving hangs up. What is sent goes out at once, by gRPC's own thread; a lost connection is
    taken up again by whoever iterates. Events of a turn end with TurnDone, TurnCancelled or TurnFailed; iteration
    ends after `finish()`, when all turns have ended. Raises KimiaError where the call cannot go on.
    """

    def __init__(
        self,
        stub: KimiAudioStub,
        config: pb.CallConfig,
        options: ClientOptions,
        client: Kimia,
    ) -> None:
        self.state = CallState(config)
        self._stub = stub
        self._client = client
        self._patience = Patience(options)
        self._changed = Condition()  # guards the state, which two threads use
        self._finished = False
        self._failure: KimiaError | None = None
        self._stream: Any = None
        self._connections = 0
        self._lost_turns: list[str] = []  # to be resumed by whoever iterates

    def __enter__(self) -> Self:
        self._connect()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hang_up()

    # ---- what the caller does ----

    def finish(self) -> None:
        """Nothing more will be sent; iteration ends after the turns that run."""
        self._do(lambda: None, finished=True)

    # ---- what comes back ----

    def __iter__(self) -> Iterator[Event]:
        """All events until the call ends."""
        while True:
            yield from self._taken_up()
            lost: grpc.RpcError | None = None
            try:
                for response in self._stream:
                    self._patience.progress()
                    yield from self._received(response)
                if self._finished and self.state.settled(()):
                    return
            except grpc.RpcError as error:
                lost = error
            except KimiaError as error:  # a gap: nothing that follows could be trusted
                self._failure = error
                self._hang_up()
                raise
            self._again(lost)
            self._connect()

    def turn(self) -> Iterator[Event]:
        """The events of one turn, up to its end."""
        for event in self:
            yield event
            if isinstance(event, Ended):
                return
        raise StateError("the call ended before the turn did")

    def answer(self) -> Answer:
        """One turn, together. Raises the turn's error."""
        for _ in self.turn():
            pass
        if self.state.last is None:
            raise InternalError("a turn ended and left nothing")
        return self.state.last.answer()

    # ---- connections ----

    def _do(self, action: Callable[[], None], *, finished: bool = False) -> None:
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._finished:
                raise StateError("the call was finished; nothing more can be sent")
            if self._stream is None:
                raise StateError(
                    "the call is not connected; use it as a context manager: with kimia.converse() as call"
                )
            action()
            self._finished = finished
            self._changed.notify_all()

    def _connect(self) -> None:
        """Set a connection up, as often as it takes. Raises KimiaError."""
        while True:
            lost: grpc.RpcError | None = None
            try:
                if self._set_up():
                    return
            except grpc.RpcError as error:
                lost = error
            self._again(lost)

    def _set_up(self) -> bool:
        """Whether the service took the call; being ready alone is no progress, or a call could fail for ever."""
        self._connections += 1
        self._stream = self._stub.Converse(self._requests(self._connections))
        response = next(self._stream, None)
        if response is None or not response.HasField("ready"):
            return False
        with self._changed:
            self._lost_turns = list(self.state.turns)
            self.state.connected(response.ready)
            self._changed.notify_all()
        return True

    def _requests(self, connection: int) -> Iterator[pb.ConverseRequest]:
        """What one connection sends; gRPC reads this in a thread of its own."""
        yield self.state.first_message()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._connections != connection or self.state.has_unsent or self._over)
                if self._connections != connection:
                    return
                request = self.state.next_request()
            if request is None:
                return
            yield request

    @property
    def _over(self) -> bool:
        return self._finished and self.state.is_connected

    def _again(self, lost: grpc.RpcError | None) -> None:
        """Wait before the next connection. Raises KimiaError when it is no use."""
        self._hang_up()
        try:
            time.sleep(self._patience.delay(lost))
        except KimiaError as error:
            self._failure = error
            raise

    def _hang_up(self) -> None:
        with self._changed:
            self.state.disconnected()
            self._connections += 1  # the thread that reads requests ends
            self._changed.notify_all()
        if self._stream is not None:
            self._stream.cancel()

    def _received(self, response: pb.ConverseResponse) -> Iterator[Event]:
        with self._changed:
            event = self.state.received(response)
        if event is not None:
            yield event

    def _taken_up(self) -> Iterator[Event]:
        """Turns that ran when the last connection was lost: their own streams go on from the last event."""
        while self._lost_turns:
            turn_id = self._lost_turns[0]
            if turn_id in self.state.turns:
                yield from self._resumed(turn_id)
            del self._lost_turns[:1]

    def _resumed(self, turn_id: str) -> Iterator[Event]:
        try:
            for event in self._client.resume_progress(self.state.turns[turn_id]).events():
                with self._changed:
                    self.state.ended(event)
                yield event
        except KimiaError as error:
            failed = self.state.give_up(turn_id, error)
            if failed is not None:
                yield failed
