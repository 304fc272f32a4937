"""A call without any connection: what is kept, what is sent again, what is told once."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia.client.calling import CallState
from kimia.client.connection import Identity
from kimia.client.requests import call_config
from kimia.errors import NotFoundError
from kimia.v1 import kimi_audio_pb2 as pb
from tests.client.scripted import NATIVE, TURN, WHOLE, done, received, started

pytestmark = pytest.mark.unit

PIECE = bytes(3200)


def state(**given) -> CallState:
    return CallState(call_config(Identity(), (), "both", given))


def ready(next_audio_index: int = 0) -> pb.CallReady:
    return pb.CallReady(session_id="session", next_audio_index=next_audio_index, output_format=NATIVE)


def sent(call: CallState) -> list[pb.ConverseRequest]:
    requests = []
    while (request := call.next_request()) is not None:
        requests.append(request)
    return requests


def names(requests: list[pb.ConverseRequest]) -> list[str]:
    shown = []
    for request in requests:
        content = request.WhichOneof("content")
        shown.append(f"audio {request.audio.index}" if content == "audio" else content)
    return shown


def test_what_is_said_before_the_connection_goes_out_with_it() -> None:
    call = state()
    call.text("Hello?")
    assert sent(call) == []
    call.connected(ready())
    assert names(sent(call)) == ["text"]


def test_a_session_goes_on_at_its_own_index() -> None:
    call = state(session="session")
    call.connected(ready(7))
    call.audio(PIECE)
    assert names(sent(call)) == ["audio 7"]


def again(call: CallState, index: int) -> list[str]:
    """What goes out on a new connection to a service that has the sound below an index."""
    call.disconnected()
    call.connected(ready(index))
    return names(sent(call))


def test_what_was_acknowledged_and_lost_is_sent_again() -> None:
    call = state()
    call.connected(ready())
    call.audio(PIECE * 2)
    call.text("between")
    call.audio(PIECE * 2)
    call.received(received(3))
    assert again(call, 4) == []
    assert again(call, 2) == ["text", "audio 2", "audio 3"]
    call.received(received(3))
    assert again(call, 0) == ["audio 0", "audio 1", "text", "audio 2", "audio 3"]


def test_what_a_turn_has_taken_along_is_not_kept() -> None:
    call = state()
    call.connected(ready())
    call.audio(PIECE * 2)
    call.commit(None, {})
    call.audio(PIECE)
    call.received(received(2))
    call.received(pb.ConverseResponse(event=started()))
    assert again(call, 2) == ["audio 2"]
    with pytest.raises(NotFoundError, match="begin another call"):
        again(call, 1)


def test_what_was_cleared_is_not_kept() -> None:
    call = state()
    call.connected(ready())
    call.audio(PIECE)
    call.clear()
    call.audio(PIECE)
    call.received(received(1))
    assert again(call, 1) == ["audio 1"]


def test_only_a_connection_takes_what_is_sent() -> None:
    call = state()
    call.connected(ready())
    call.audio(PIECE)
    call.disconnected()
    call.audio(PIECE)
    assert sent(call) == []
    assert not call.is_connected
    call.connected(ready(1))
    assert names(sent(call)) == ["audio 1"]


def test_acknowledged_sound_confirms_what_came_before_it() -> None:
    call = state()
    call.connected(ready())
    call.text("one")
    call.audio(PIECE)
    call.text("two")
    call.audio(PIECE)
    call.received(received(0))
    call.disconnected()
    call.connected(ready(1))
    assert names(sent(call)) == ["text", "audio 1"]


def test_a_turn_that_starts_confirms_its_commit_and_all_before() -> None:
    call = state()
    call.connected(ready())
    call.audio(PIECE)
    call.commit(None, {})
    call.text("next")
    call.turn_event(started())
    call.disconnected()
    call.connected(ready(1))
    assert names(sent(call)) == ["text"]
    assert call.current_turn_id == TURN


def test_a_commit_stays_until_its_turn_starts() -> None:
    call = state()
    call.connected(ready())
    call.commit(None, {})
    call.audio(PIECE)
    call.received(received(0))
    call.disconnected()
    call.connected(ready(1))
    assert names(sent(call)) == ["commit"]
    assert not call.settled(())


def test_playback_and_cancel_of_the_current_turn_are_said_again(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((100.0, 101.0, 103.5))
    monkeypatch.setattr("kimia.client.calling.time.monotonic", lambda: next(moments))
    call = state()
    call.connected(ready())
    call.commit(None, {})
    call.turn_event(started())
    call.playback(80)
    call.playback(160)
    call.cancel(None)
    call.disconnected()
    call.connected(ready())
    again = sent(call)
    assert names(again) == ["playback", "cancel"]
    assert (again[0].playback.heard_ms, again[1].cancel.turn_id) == (160, TURN)
    assert again[0].playback.age_ms == 2500  # it was said so long ago, before the connection was lost
    call.turn_event(started("session.second"))
    call.disconnected()
    call.connected(ready())
    assert sent(call) == []


def test_after_its_end_a_turn_is_still_the_current_one() -> None:
    call = state()
    call.connected(ready())
    for event in WHOLE:
        call.turn_event(event)
    call.cancel(100)
    assert sent(call)[-1].cancel.turn_id == TURN
    assert call.last is not None
    assert call.settled(())


def test_late_events_and_answers_to_late_cancels_are_dropped() -> None:
    call = state()
    call.connected(ready())
    for event in WHOLE:
        call.turn_event(event)
    assert call.turn_event(done()) is None
    assert call.turn_event(pb.TurnEvent(cancelled=pb.TurnCancelled())) is None
    assert call.received(pb.ConverseResponse()) is None


def test_turns_that_are_resumed_elsewhere_are_settled() -> None:
    call = state()
    call.turn_event(started())
    assert not call.settled(())
    assert call.settled((TURN,))


def test_text_outlives_a_sentence_that_is_said_meanwhile() -> None:
    call = state()
    call.connected(ready())
    call.text("mine")
    call.say("One moment.", {})
    call.turn_event(started())
    call.disconnected()
    call.connected(ready())
    assert names(sent(call)) == ["text"]


class Service:
    """A service that keeps sound at once and text with the next sound or commit; a key starts a turn only once."""

    def __init__(self) -> None:
        self.stored = 0  # pieces of sound
        self.pending: list[str] = []  # texts that are lost with the connection
        self.texts: list[str] = []
        self.turns: dict[str, str] = {}

    def read(self, request: pb.ConverseRequest) -> None:
        content = request.WhichOneof("content")
        if content == "audio":
            assert request.audio.index <= self.stored
            self.stored = max(self.stored, request.audio.index + 1)
            self.keep()
        elif content == "text":
            self.pending.append(request.text.text)
        else:
            self.start(getattr(request, content).idempotency_key, content == "commit")

    def start(self, key: str, takes_input: bool) -> None:
        if key not in self.turns:
            self.turns[key] = f"session.{len(self.turns)}"
            if takes_input:
                self.keep()
        elif takes_input:
            self.pending = []  # sent again, although the commit had taken it along

    def keep(self) -> None:
        self.texts += self.pending
        self.pending = []


class Line:
    """A client and a service with a line between them that breaks anywhere."""

    def __init__(self, chance) -> None:
        self.call, self.service, self.chance = state(), Service(), chance
        self.call.connected(ready())
        self.said: list[str] = []
        self.asked = 0

    def audio(self) -> None:
        self.call.audio(PIECE)

    def text(self) -> None:
        self.said.append(str(len(self.said)))
        self.call.text(self.said[-1])

    def commit(self) -> None:
        self.asked += 1
        self.call.commit(None, {})

    def say(self) -> None:
        self.asked += 1
        self.call.say("One moment.", {})

    def arrive(self) -> None:
        for request in sent(self.call):
            self.service.read(request)

    def acknowledge(self) -> None:
        self.arrive()
        if self.service.stored:
            self.call.received(received(self.service.stored - 1))

    def start(self) -> None:
        for turn_id in self.service.turns.values():
            if turn_id not in self.call.turns:
                self.call.turn_event(started(turn_id))

    def drop(self) -> None:
        waiting = sent(self.call)
        for request in waiting[: self.chance.randint(0, len(waiting))]:
            self.service.read(request)
        self.service.pending = []
        self.call.disconnected()
        self.call.connected(ready(self.service.stored))


ACTIONS = st.lists(st.sampled_from(["audio", "text", "commit", "say", "arrive", "acknowledge", "start", "drop"]))


@settings(max_examples=300, deadline=None)
@given(ACTIONS, st.randoms(use_true_random=False))
def test_whatever_is_lost_on_the_way_arrives_once_and_in_order(actions, chance) -> None:
    line = Line(chance)
    for action in [*actions, "drop", "arrive"]:
        getattr(line, action)()
    assert line.service.stored == line.call._next_audio
    assert line.service.texts + line.service.pending == line.said
    assert len(line.service.turns) == line.asked
