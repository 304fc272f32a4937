"""One call as a state machine without any input or output: what the client sends goes in, what is to be done comes out.

    awaiting config --config--> opening --opened--> collecting <--submitted/ended--> answering

The next question is collected while a turn is answered; only one turn runs at a time. The driver carries out the
actions of one message, in order, before it gives the next one, and tells what came of them:

    OpenSession    opened(view)             SubmitTurn, SayTurn    submitted(turn), and later ended(turn)
    OpenTurn       turn_opened(turn)        CancelTurn             ended(turn)
    AppendAudio    stored(index)            the others             nothing

Pieces of sound that follow one another may be stored together: `stored` is then told of the last of them, before the
next message that is no sound.

After `Fail` the call is over and every message is ignored.

A client that comes back sends again what was not confirmed to it: text until sound after it was stored or its turn
started, a commit until its turn started. So text is kept in the call alone until one of these happens, and a commit
that is known by its key drops the text that was sent again before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, TypeAlias

from kimia.errors import RequestError, ServiceError, StateError, UnsupportedError
from kimia.sound import check_format
from kimia.v1.audio_pb2 import AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message, Text, TurnOptions
from kimia.v1.kimi_audio_pb2 import (
    AudioReceived,
    CallConfig,
    CallerAudio,
    CallerText,
    CallReady,
    Cancel,
    Clear,
    Commit,
    ConverseRequest,
    ConverseResponse,
    Playback,
    Say,
    TurnCancelled,
    TurnEvent,
)
from orchestrator.checks import (
    check_idempotency_key,
    check_messages,
    check_options,
    check_samples,
    check_say,
    sound_seconds,
)
from orchestrator.intake import Intake
from orchestrator.memory import clips_of

LARGEST_PIECE = 64 * 1024  # bytes
LONGEST_PIECE = 1.0  # seconds
LONGEST_TURN_ID = 129  # characters
LARGEST_CLIP, LARGEST_TURN = 32 << 20, 64 << 20  # bytes of sound, unless the settings say otherwise

# ---- actions ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OpenSession:
    """Load or begin the session."""

    config: CallConfig


@dataclass(frozen=True)
class OpenTurn:
    """Open the turn whose input log takes the caller's sound from now on."""


@dataclass(frozen=True)
class AppendAudio:
    """Store one piece of sound in the open turn.

    When it begins a clip, `collected` is to be remembered first, and `ends` names the clip that is complete by that.
    """

    index: int
    clip: int
    data: bytes = field(repr=False)
    ends: int | None = None
    collected: tuple[Message, ...] | None = field(default=None, repr=False)


@dataclass(frozen=True)
class ClearInput:
    """Give up what was collected, and the open turn with it; the next piece of sound has index `next_audio_index`."""

    next_audio_index: int


@dataclass(frozen=True)
class SubmitTurn:
    """Answer what was collected; `ends` is the clip that ends with it, if it has sound."""

    collected: tuple[Message, ...] = field(repr=False)
    ends: int | None
    options: TurnOptions
    idempotency_key: str
    next_audio_index: int


@dataclass(frozen=True)
class SayTurn:
    """Speak a text in a turn of its own; what was collected stays."""

    text: str = field(repr=False)
    options: TurnOptions
    idempotency_key: str


@dataclass(frozen=True)
class CancelTurn:
    """Stop the running turn; the caller heard `heard_ms` of it (None: all that was sent)."""

    turn_id: str
    heard_ms: int | None


@dataclass(frozen=True)
class CutAnswer:
    """The turn has ended, but the caller interrupted its speech after `heard_ms` (None: heard all of it)."""

    turn_id: str
    heard_ms: int | None


@dataclass(frozen=True)
class NotePlayback:
    """The caller had heard `heard_ms` of the running turn `age_ms` ago, which paces it."""

    turn_id: str
    heard_ms: int
    age_ms: int


@dataclass(frozen=True)
class FollowTurn:
    """Tell the events of a turn that was committed before, from its beginning."""

    turn_id: str


@dataclass(frozen=True)
class Reply:
    """Send this."""

    response: ConverseResponse


@dataclass(frozen=True)
class Fail:
    """End the call with this error."""

    error: ServiceError


Action: TypeAlias = (
    OpenSession
    | OpenTurn
    | AppendAudio
    | ClearInput
    | SubmitTurn
    | SayTurn
    | CancelTurn
    | CutAnswer
    | NotePlayback
    | FollowTurn
    | Reply
    | Fail
)

# ---- the machine ------------------------------------------------------------------------------------------------


class Phase(Enum):
    """How far the call is."""

    AWAITING_CONFIG = "awaiting config"
    OPENING = "opening"
    OPEN = "open"
    OVER = "over"


@dataclass(frozen=True)
class SessionView:
    """What the journal knows of a session when a call begins."""

    session_id: str
    output_format: AudioFormat
    next_audio_index: int = 0
    open_turn_id: str = ""
    collected: tuple[Message, ...] = ()
    collected_pieces: Sequence[tuple[int, int]] = ()  # clip and bytes of each piece of its sound
    running_turn_id: str = ""
    heard_ms: int | None = None  # of the running turn
    last_turn_id: str = ""
    keys: Mapping[str, str] = field(default_factory=dict)  # idempotency key -> turn


class Session:
    """The state machine of one call."""

    def __init__(self, clip_bytes: int = LARGEST_CLIP, turn_bytes: int = LARGEST_TURN) -> None:
        self.phase = Phase.AWAITING_CONFIG
        self.running = ""  # the turn that is being answered
        self.last = ""  # the turn that was answered before
        self.next_index = 0  # of the next piece of sound
        self._stored = 0  # the pieces below this index will not be lost
        self.collected: list[Message] = []
        self._config = CallConfig()
        self._turn_open = False
        self._intake = Intake(clip_bytes, turn_bytes)
        self._texts: list[Message] = []  # received in this call and not confirmed
        self._heard: dict[str, int] = {}  # milliseconds by turn: the running and the last one
        self._keys: dict[str, str] = {}
        self._submitting = ""  # idempotency key of the turn being submitted
        self._receivers: dict[str, Callable[[Any], list[Action]]] = {
            "audio": self._audio,
            "text": self._text,
            "say": self._say,
            "commit": self._commit,
            "cancel": self._cancel,
            "playback": self._playback,
            "clear": self._clear,
        }

    @property
    def heard_ms(self) -> int | None:
        """What the last Playback said of the running turn."""
        return self._heard.get(self.running)

    # ---- what the client sends ----

    def receive(self, request: ConverseRequest) -> list[Action]:
        """What is to be done about a message."""
        if self.phase is Phase.OVER:
            return []
        try:
            return self._received(request)
        except ServiceError as error:
            self.phase = Phase.OVER
            return [Fail(error)]

    def _received(self, request: ConverseRequest) -> list[Action]:
        content = request.WhichOneof("content")
        if content is None:
            raise RequestError("the message is empty, or of a newer version; send one of its contents", field="content")
        if content in ("speculate", "confirm", "retract"):
            raise UnsupportedError("is not offered yet; send commit when the caller has finished", field=content)
        if content == "config":
            return self._configure(request.config)
        if self.phase is Phase.AWAITING_CONFIG:
            raise StateError("the first message of a call must be config", field=content)
        if self.phase is Phase.OPENING:
            raise RuntimeError("the driver must open the session before it gives the next message")
        return self._receivers[content](getattr(request, content))

    def _configure(self, config: CallConfig) -> list[Action]:
        if self.phase is not Phase.AWAITING_CONFIG:
            raise StateError("the call is configured already; begin another call", field="config")
        if config.server_endpointing:
            raise UnsupportedError("is not offered yet; send commit", field="config.server_endpointing")
        check_format(config.input_format, "config.input_format")
        check_options(config.options, "config.options")
        check_messages(config.messages, "config.messages")
        self.phase = Phase.OPENING
        self._config.CopyFrom(config)
        return [OpenSession(config)]

    def _audio(self, audio: CallerAudio) -> list[Action]:
        if audio.index < self.next_index:
            return [_received_up_to(self._stored - 1)] if self._stored else []
        if audio.index > self.next_index:
            rule = f"leaves a gap: the next piece is {self.next_index}, got {audio.index}; send what is missing first"
            raise RequestError(rule, field="audio.index")
        data = audio.data  # read once: each look at a field of bytes copies it
        self._check_piece(data)
        opening: list[Action] = [] if self._turn_open else [OpenTurn()]
        continues = self._continues_clip()
        if not continues:
            self._intake.clip("audio.data")
        self._intake.sound(data, self._config.input_format, "audio.data")
        self.next_index = audio.index + 1
        if continues:
            return [*opening, AppendAudio(audio.index, self.collected[-1].audio.number, data)]
        ends = self._last_clip()
        number = 0 if ends is None else ends + 1
        clip = Clip(format=self._config.input_format, number=number, source_number=number)
        self.collected.append(Message(role=ROLE_USER, audio=clip))
        return [*opening, AppendAudio(audio.index, number, data, ends, tuple(self.collected))]

    def _check_piece(self, data: bytes) -> None:
        form = self._config.input_format
        if not data:
            raise RequestError("is empty; send up to 1 s of sound", field="audio.data")
        if len(data) > LARGEST_PIECE:
            raise RequestError(f"has {len(data)} bytes, at most {LARGEST_PIECE} are taken", field="audio.data")
        check_samples(data, form, "audio.data")
        if sound_seconds(len(data), form) > LONGEST_PIECE:
            raise RequestError(f"is longer than {LONGEST_PIECE:g} s; send smaller pieces", field="audio.data")

    def _continues_clip(self) -> bool:
        last = self.collected[-1] if self.collected else None
        return last is not None and last.HasField("audio") and last.audio.format == self._config.input_format

    def _last_clip(self) -> int | None:
        """Number of the last clip that was collected."""
        clips = clips_of(self.collected)
        return clips[-1].number if clips else None

    def _text(self, text: CallerText) -> list[Action]:
        if not text.text:
            raise RequestError("is empty; leave it out", field="text.text")
        self._intake.text(text.text, "text.text")
        message = Message(role=ROLE_USER, text=Text(text=text.text))
        self.collected.append(message)
        self._texts.append(message)
        return []

    def _clear(self, _: Clear) -> list[Action]:
        if not self.collected:
            return []
        self._reset()
        return [ClearInput(self.next_index)]

    # ---- turns ----

    def _commit(self, commit: Commit) -> list[Action]:
        known = self._known(commit.idempotency_key, "commit")
        if known:
            sent_again = {id(text) for text in self._texts}
            self.collected = [message for message in self.collected if id(message) not in sent_again]
            self._texts = []
            return [FollowTurn(known)]
        if not self.collected:
            raise StateError("nothing was collected since the last commit; send audio or text first", field="commit")
        options = self._options(commit.options, "commit.options")
        self._submitting = commit.idempotency_key
        action: Action = SubmitTurn(
            tuple(self.collected), self._last_clip(), options, commit.idempotency_key, self.next_index
        )
        self._reset()
        return [action]

    def _say(self, say: Say) -> list[Action]:
        known = self._known(say.idempotency_key, "say")
        if known:
            return [FollowTurn(known)]
        options = self._options(say.options, "say.options")
        check_say(say.text, options, "say.text", "say.options")
        self._submitting = say.idempotency_key
        return [SayTurn(say.text, options, say.idempotency_key)]

    def _known(self, key: str, field: str) -> str:
        """The turn that was begun with this key; "": none. Raises StateError where no turn may be begun now."""
        check_idempotency_key(key, f"{field}.idempotency_key")
        known = self._keys.get(key, "") if key else ""
        if self.running and self.running != known:
            raise StateError(f"turn {self.running} is being answered; cancel it first, or wait for it", field=field)
        return known

    def _options(self, options: TurnOptions, field: str) -> TurnOptions:
        """The options of the call, but where the turn has its own."""
        check_options(options, field)
        merged = TurnOptions()
        merged.CopyFrom(self._config.options)
        merged.MergeFrom(options)
        return merged

    def _reset(self) -> None:
        self.collected = []
        self._texts = []
        self._turn_open = False
        self._intake.clear()

    def _cancel(self, cancel: Cancel) -> list[Action]:
        if len(cancel.turn_id) > LONGEST_TURN_ID:
            raise RequestError("is no turn id; use the id that TurnEvent.turn_id gave", field="cancel.turn_id")
        turn = cancel.turn_id or self.running or self.last
        if not turn or turn not in (self.running, self.last):
            return [Reply(ConverseResponse(event=TurnEvent(turn_id=turn, cancelled=TurnCancelled())))]
        heard = cancel.heard_ms if cancel.HasField("heard_ms") else self._heard.get(turn)
        return [CancelTurn(turn, heard) if turn == self.running else CutAnswer(turn, heard)]

    def _playback(self, playback: Playback) -> list[Action]:
        turn = playback.turn_id or self.running or self.last
        if turn and turn in (self.running, self.last):
            self._heard[turn] = max(playback.heard_ms, self._heard.get(turn, 0))
        return [NotePlayback(turn, playback.heard_ms, playback.age_ms)] if turn and turn == self.running else []

    # ---- what came of the actions ----

    def opened(self, view: SessionView) -> list[Action]:
        """The session was loaded or begun."""
        self._expect(self.phase is Phase.OPENING, "opened")
        self.phase = Phase.OPEN
        self.running, self.last = view.running_turn_id, view.last_turn_id
        self.next_index = self._stored = view.next_audio_index
        self.collected = list(view.collected)
        self._turn_open = bool(view.open_turn_id)
        self._count(view)
        self._keys = dict(view.keys)
        if view.running_turn_id and view.heard_ms is not None:
            self._heard[view.running_turn_id] = view.heard_ms
        ready = CallReady(
            session_id=view.session_id, next_audio_index=view.next_audio_index, output_format=view.output_format
        )
        return [Reply(ConverseResponse(ready=ready))]

    def _count(self, view: SessionView) -> None:
        """What an earlier connection has sent counts as well."""
        forms = {clip.number: clip.format for clip in clips_of(view.collected)}
        for message in view.collected:
            if message.HasField("audio"):
                self._intake.clip("audio")
            else:
                self._intake.text(message.text.text, "text")
        for clip, size in view.collected_pieces:
            if clip in forms:
                self._intake.stored(size, forms[clip])

    def turn_opened(self) -> list[Action]:
        """There is a turn that collects."""
        self._expect(not self._turn_open, "turn_opened")
        self._turn_open = True
        return []

    def stored(self, index: int) -> list[Action]:
        """The sound up to this piece will not be lost."""
        self._expect(self._stored <= index < self.next_index, "stored")
        self._stored = index + 1
        self._texts = []
        return [_received_up_to(index)]

    def submitted(self, turn_id: str) -> list[Action]:
        """A turn is being answered."""
        self._expect(not self.running, "submitted")
        self.running = turn_id
        self._heard = {turn: heard for turn, heard in self._heard.items() if turn in (turn_id, self.last)}
        if self._submitting:
            self._keys[self._submitting] = turn_id
            self._submitting = ""
        return []

    def ended(self, turn_id: str) -> list[Action]:
        """A turn has reached its end, whatever it is."""
        if turn_id == self.running:
            self._heard = {turn_id: heard} if (heard := self._heard.get(turn_id)) is not None else {}
            self.running, self.last = "", turn_id
        return []

    def _expect(self, right: bool, what: str) -> None:
        if not right:
            raise RuntimeError(f"the driver told {what!r} in the wrong order")


def _received_up_to(index: int) -> Reply:
    return Reply(ConverseResponse(audio_received=AudioReceived(index=index)))
