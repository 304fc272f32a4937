"""A call as the client knows it: what was sent and not yet confirmed, which turns run, what to send after a drop.

Does no input and no output. Sound and text are kept until the turn that takes them along has started, a commit or say
until its turn has (it carries a key, so that sending it again starts nothing). Sound is sent again unless it was
acknowledged, text unless sound after it was; what was acknowledged, too, where the service has lost it since.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

from kimia.client.events import Ended, Event, TurnFailed
from kimia.client.options import SAMPLE_BYTES, Options, encoding_name, turn_options
from kimia.client.progress import TurnProgress
from kimia.client.requests import check_text, new_key
from kimia.errors import KimiaError, NotFoundError, ParameterError
from kimia.v1 import kimi_audio_pb2 as pb

LARGEST_PIECE = 64 << 10  # bytes
PIECE_SECONDS = 0.1  # of sound in one message: small enough to be early, large enough to be cheap


class CallState:
    """One call over any number of connections."""

    def __init__(self, config: pb.CallConfig) -> None:
        self.config = config
        self.session_id = config.session_id
        self.output_format = config.options.output_format
        self.turns: dict[str, TurnProgress] = {}  # running
        self.finished: set[str] = set()
        self.last: TurnProgress | None = None  # the turn that ended last
        self._said: list[_Said] = []
        self._unsent: deque[pb.ConverseRequest] = deque()  # on this connection
        self._cancel: pb.ConverseRequest | None = None  # the last of each: of the turn that runs or ended last
        self._heard: pb.ConverseRequest | None = None
        self._heard_at = 0.0  # when that was
        self._asked: deque[float] = deque()  # when the turns that did not start yet were asked for
        self._next_audio = 0
        self._taken = 0  # sound below this index is not kept any more
        self._begun = False
        self._connected = False
        self._sample = SAMPLE_BYTES[encoding_name(config.input_format)]
        self._piece = min(LARGEST_PIECE, round(PIECE_SECONDS * config.input_format.sample_rate) * self._sample)

    # ---- what the caller does ----

    def audio(self, data: bytes) -> None:
        """Whole samples in the input format, any number of them. Raises ParameterError."""
        if len(data) % self._sample:
            raise ParameterError(
                f"sound must come in whole samples of {self._sample} bytes, got {len(data)} bytes; keep the rest back"
            )
        for start in range(0, len(data), self._piece):
            request = pb.ConverseRequest()
            request.audio.index, request.audio.data = self._next_audio, bytes(data[start : start + self._piece])
            self._push(request)
            self._next_audio += 1

    def text(self, text: str) -> None:
        """Text of the caller, at its place between the sounds."""
        check_text(text)
        self._push(pb.ConverseRequest(text=pb.CallerText(text=text)))

    def say(self, text: str, options: Mapping[str, Any]) -> None:
        """Speak a text."""
        check_text(text)
        chosen = turn_options("both", options)  # also in a call whose answers are text
        self._push(pb.ConverseRequest(say=pb.Say(text=text, options=chosen, idempotency_key=new_key())))

    def commit(self, output_type: str | None, options: Mapping[str, Any]) -> None:
        """Answer what was sent."""
        chosen = turn_options(output_type, options) if options or output_type else None
        self._push(pb.ConverseRequest(commit=pb.Commit(options=chosen, idempotency_key=new_key())))

    def clear(self) -> None:
        """Forget what was not committed."""
        self._push(pb.ConverseRequest(clear=pb.Clear()))

    def cancel(self, heard_ms: int | None) -> None:
        """Stop the running turn; after its end: what was heard of it."""
        self._cancel = pb.ConverseRequest(cancel=pb.Cancel(turn_id=self.current_turn_id, heard_ms=heard_ms))
        self._send(self._cancel)

    def playback(self, heard_ms: int) -> None:
        """How far the current turn was heard."""
        self._heard = pb.ConverseRequest(playback=pb.Playback(turn_id=self.current_turn_id, heard_ms=heard_ms))
        self._heard_at = time.monotonic()
        self._send(self._heard)

    @property
    def current_turn_id(self) -> str:
        """The turn that is being answered, else the one that ended last; empty when there was none."""
        return next(reversed(self.turns), self.last.turn_id if self.last else "")

    # ---- connections ----

    def first_message(self) -> pb.ConverseRequest:
        """What a connection begins with: the whole set-up once, then only the session."""
        return pb.ConverseRequest(config=self.config)

    def connected(self, ready: pb.CallReady) -> None:
        """The service is ready: everything it does not have is to be sent (again).

        Raises NotFoundError when it has lost what is not kept here either.
        """
        if not self._begun:  # the session may be older than this call
            self._begun, self._next_audio, self._taken = True, ready.next_audio_index, ready.next_audio_index
        if ready.next_audio_index < self._taken:
            rule = "the service has lost this session; begin another call"
            raise NotFoundError(f"{rule}, and say again what matters", field="session_id")
        self.session_id = ready.session_id
        self.output_format = ready.output_format
        self.config.session_id = ready.session_id
        del self.config.messages[:]  # only a new session takes them
        self._confirm_audio(ready.next_audio_index)
        self._doubt_audio(ready.next_audio_index)
        self._unsent = deque(said.request for said in self._said if not said.confirmed)
        if self._heard is not None:
            self._heard.playback.age_ms = round(1000 * (time.monotonic() - self._heard_at))
        self._unsent.extend(request for request in (self._heard, self._cancel) if request is not None)
        self._connected = True

    def disconnected(self) -> None:
        """The connection is lost."""
        self._connected = False
        self._unsent.clear()

    @property
    def is_connected(self) -> bool:
        """Whether the service is ready on this connection."""
        return self._connected

    @property
    def has_unsent(self) -> bool:
        """Whether something is to be written on this connection."""
        return bool(self._unsent)

    def next_request(self) -> pb.ConverseRequest | None:
        """What is to be written next on this connection, None when there is nothing."""
        return self._unsent.popleft() if self._unsent else None

    # ---- what the service says ----

    def received(self, response: pb.ConverseResponse) -> Event | None:
        """Take note; the event as users see it, if it is one. Raises InternalError on a gap."""
        match response.WhichOneof("content"):
            case "audio_received":
                self._confirm_audio(response.audio_received.index + 1)
            case "event":
                return self.turn_event(response.event)
        return None

    def turn_event(self, event: pb.TurnEvent) -> Event | None:
        """An event of a turn, from the call's stream or from one that resumed the turn."""
        if not event.turn_id or event.turn_id in self.finished:  # the answer to a cancel that came too late
            return None
        if event.turn_id not in self.turns:
            self._begin(event.turn_id)
        progress = self.turns[event.turn_id]
        seen = progress.accept(event)
        if isinstance(seen, Ended):
            self._end(event.turn_id)
        return seen

    def ended(self, event: Event) -> None:
        """Take note of an event that a stream of its own brought for a resumed turn."""
        if isinstance(event, Ended) and event.turn_id in self.turns:
            self._end(event.turn_id)

    def give_up(self, turn_id: str, error: KimiaError) -> TurnFailed | None:
        """A turn that could not be resumed; None when its end came another way."""
        if turn_id not in self.turns:
            return None
        failed = TurnFailed(turn_id, error)
        self.turns[turn_id].end = failed
        self._end(turn_id)
        return failed

    def settled(self, resuming: Collection[str]) -> bool:
        """Whether no turn is under way or expected, but those that streams of their own bring to an end."""
        return not any(_starts_a_turn(said.request) for said in self._said) and all(
            turn in resuming for turn in self.turns
        )

    # ---- keeping the books ----

    def _begin(self, turn_id: str) -> None:
        self._confirm_start()
        self._heard = self._cancel = None
        progress = self.turns[turn_id] = TurnProgress()
        progress.turn_id = turn_id
        if self._asked:
            progress.begun = self._asked.popleft()

    def _end(self, turn_id: str) -> None:
        self.last = self.turns.pop(turn_id)
        self.finished.add(turn_id)

    def _push(self, request: pb.ConverseRequest) -> None:
        self._said.append(_Said(request))
        if _starts_a_turn(request):
            self._asked.append(time.perf_counter())
        self._send(request)

    def _send(self, request: pb.ConverseRequest) -> None:
        if self._connected:  # else it goes out with the next connection
            self._unsent.append(request)

    def _confirm_audio(self, received: int) -> None:
        """All sound below this index is stored; requests are read in order, so is everything before the last of it."""
        last = next((at for at in range(len(self._said), 0, -1) if self._said[at - 1].is_audio_below(received)), 0)
        cleared = 0
        for at in range(last, 0, -1):
            said = self._said[at - 1]
            if said.confirmed and said.request.HasField("audio"):
                break  # and so is all before it
            said.confirmed = not _starts_a_turn(said.request)  # that stays until the turn is seen
            if said.request.HasField("clear"):
                cleared = max(cleared, at)
        self._forget(cleared)

    def _doubt_audio(self, received: int) -> None:
        """Sound from this index on is not stored, whatever was acknowledged, nor is what came after the last piece."""
        for said in reversed(self._said):
            if said.is_audio_below(received):
                return
            said.confirmed = False

    def _forget(self, count: int) -> None:
        """The first `count` requests are done with. What starts a turn stays until that turn is seen."""
        gone = self._said[:count]
        self._said[:count] = [said for said in gone if _starts_a_turn(said.request)]
        self._taken = max(
            [self._taken, *(said.request.audio.index + 1 for said in gone if said.request.HasField("audio"))]
        )

    def _confirm_start(self) -> None:
        """A turn has begun: the first request that starts one was read; a commit has taken all before it along."""
        for place, said in enumerate(self._said):
            if _starts_a_turn(said.request):
                del self._said[place]
                if said.request.HasField("commit"):
                    self._forget(place)
                return


@dataclass
class _Said:
    """A request of the caller."""

    request: pb.ConverseRequest
    confirmed: bool = False  # the service has it

    def is_audio_below(self, index: int) -> bool:
        """Whether it is sound with a smaller index."""
        return self.request.HasField("audio") and self.request.audio.index < index


def _starts_a_turn(request: pb.ConverseRequest) -> bool:
    return request.WhichOneof("content") in ("commit", "say")


class CallerSide(ABC):
    """What a caller may do in a call: the same for both clients, which differ in how it is sent."""

    state: CallState

    @abstractmethod
    def _do(self, action: Callable[[], None]) -> None:
        """Change the state and send what follows from it. Raises StateError when nothing can be sent."""

    @property
    def session_id(self) -> str:
        """The session, to come back to."""
        return self.state.session_id

    def send_audio(self, data: bytes) -> None:
        """Sound in the input format, whole samples; cut into pieces of 100 ms."""
        self._do(lambda: self.state.audio(data))

    def send_text(self, text: str) -> None:
        """Text of the caller, at its place between the sounds."""
        self._do(lambda: self.state.text(text))

    def say(self, text: str, **options: Unpack[Options]) -> None:
        """Speak a text."""
        self._do(lambda: self.state.say(text, options))

    def commit(self, output_type: str | None = None, **options: Unpack[Options]) -> None:
        """The caller has finished: answer. What is not given is as the call was set up."""
        self._do(lambda: self.state.commit(output_type, options))

    def clear(self) -> None:
        """Forget sound and text that were not committed."""
        self._do(self.state.clear)

    def cancel(self, heard_ms: int | None = None) -> None:
        """Stop the running turn, of which the caller has heard so much (None: what playback() said last)."""
        self._do(lambda: self.state.cancel(heard_ms))

    def playback(self, heard_ms: int) -> None:
        """How far the caller has heard the running turn. Once a second is enough; it paces what is still to come."""
        self._do(lambda: self.state.playback(heard_ms))
