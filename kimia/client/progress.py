"""One turn as the client has received it: what came, what comes next, how to go on after a lost connection.

Neither does input nor output, so both clients and calls share it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from kimia.client.events import (
    Answer,
    AudioChunk,
    ClientTimes,
    Ended,
    Event,
    TextDelta,
    TurnCancelled,
    TurnDone,
    TurnFailed,
    TurnStarted,
    read_done,
)
from kimia.client.options import encoding_name
from kimia.errors import InternalError, StateError, TurnCancelledError
from kimia.status import from_failure
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.turn_pb2 import Caller


class TurnProgress:
    """Takes the events of one turn, drops what came before, refuses what leaves a gap."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.clock = clock
        self.begun = clock()
        self.started: TurnStarted | None = None
        self.turn_id = ""
        self.next_text = 0
        self.next_audio = 0
        self.texts: list[str] = []
        self.pieces: list[bytes] = []
        self.end: Ended | None = None
        self.times = ClientTimes()

    @classmethod
    def resumed(cls, turn_id: str, last_audio: int | None, last_text: int | None) -> TurnProgress:
        """A turn of which an earlier client has received the indices given (None: nothing)."""
        progress = cls()
        progress.turn_id = turn_id
        progress.next_audio = 0 if last_audio is None else last_audio + 1
        progress.next_text = 0 if last_text is None else last_text + 1
        return progress

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self.texts)

    @property
    def pcm(self) -> bytes:
        """The speech so far."""
        return b"".join(self.pieces)

    def accept(self, event: pb.TurnEvent) -> Event | None:
        """The event as users see it, None when it came before. Raises InternalError when something is missing."""
        if self.end is not None:
            return None
        self._check_turn(event.turn_id)
        match event.WhichOneof("content"):
            case "started":
                return self._start(event.started)
            case "text":
                return self._text(event.text)
            case "audio":
                return self._audio(event.audio)
            case "done" | "cancelled" | "failed" as kind:
                return self._finish(kind, event)
            case _:
                return None  # an event that a newer service knows

    def resume_request(self, caller: Caller) -> pb.ResumeRequest:
        """Ask for what follows what was received."""
        return pb.ResumeRequest(
            caller=caller,
            turn_id=self.turn_id,
            last_audio_index=self.next_audio - 1 if self.next_audio else None,
            last_text_index=self.next_text - 1 if self.next_text else None,
        )

    def raise_failure(self) -> None:
        """Raise the error of a turn that did not end with an answer."""
        if isinstance(self.end, TurnFailed):
            raise self.end.error
        if isinstance(self.end, TurnCancelled):
            raise TurnCancelledError("the turn was cancelled by another connection of its session")

    def answer(self) -> Answer:
        """Everything, once the turn is done. Raises the turn's error, or StateError before its end."""
        self.raise_failure()
        if not isinstance(self.end, TurnDone):
            raise StateError("the turn has not ended yet; iterate over its events first")
        started = self.started or TurnStarted(self.turn_id, "", 0, "s16le", 0)
        done = self.end
        return Answer(
            text=done.text,
            pcm=self.pcm,
            sample_rate=started.sample_rate,
            encoding=started.encoding,
            turn_id=self.turn_id,
            session_id=started.session_id,
            seed=started.seed,
            stop=done.stop,
            usage=done.usage,
            latency=done.latency,
            times=self.times,
        )

    # ---- single events ----

    def _check_turn(self, turn_id: str) -> None:
        if not self.turn_id:
            self.turn_id = turn_id
        elif turn_id != self.turn_id:
            raise InternalError(f"the service sent an event of turn {turn_id} in the stream of turn {self.turn_id}")

    def _start(self, started: pb.TurnStarted) -> TurnStarted | None:
        if self.started is not None:
            return None
        form = started.output_format
        encoding = encoding_name(form)
        self.started = TurnStarted(self.turn_id, started.session_id, started.seed, encoding, form.sample_rate)
        self._mark("started")
        return self.started

    def _text(self, delta: pb.TextDelta) -> TextDelta | None:
        if not self._is_next("text", delta.index, self.next_text):
            return None
        self.next_text += 1
        self.texts.append(delta.text)
        self._mark("first_text")
        return TextDelta(self.turn_id, delta.index, delta.text)

    def _audio(self, chunk: pb.AudioChunk) -> AudioChunk | None:
        if not self._is_next("audio", chunk.index, self.next_audio):
            return None
        self.next_audio += 1
        self.pieces.append(chunk.data)
        self._mark("first_audio")
        return AudioChunk(self.turn_id, chunk.index, chunk.data)

    def _finish(self, kind: str, event: pb.TurnEvent) -> Ended:
        if kind == "done":
            self.end = read_done(self.turn_id, event.done)
        elif kind == "cancelled":
            self.end = TurnCancelled(self.turn_id, event.cancelled.heard_codes)
        else:
            self.end = TurnFailed(self.turn_id, from_failure(event.failed))
        self._mark("total")
        return self.end

    def _is_next(self, what: str, index: int, expected: int) -> bool:
        if index > expected:
            raise InternalError(
                f"{what} {expected} of turn {self.turn_id} is missing: the service sent {index}",
                reason="STREAM_GAP",
            )
        return index == expected

    def _mark(self, name: str) -> None:
        if getattr(self.times, name) is None:
            self.times = replace(self.times, **{name: self.clock() - self.begun})


class TurnView:
    """What of a turn has come so far, for whoever iterates over it."""

    progress: TurnProgress

    @property
    def turn_id(self) -> str:
        """Names the turn, from its first event on."""
        return self.progress.turn_id

    @property
    def text(self) -> str:
        """The text so far."""
        return self.progress.text

    @property
    def pcm(self) -> bytes:
        """The speech so far, in the output format."""
        return self.progress.pcm
