import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia.errors import RequestError, StateError, UnsupportedError
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_MULAW, ENCODING_PCM_F32LE, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT, ROLE_USER, Message, Text, TrackSampling, TurnOptions
from kimia.v1.kimi_audio_pb2 import (
    CallConfig,
    CallerAudio,
    CallerText,
    Cancel,
    Clear,
    Commit,
    Confirm,
    ConverseRequest,
    Playback,
    Retract,
    Say,
    Speculate,
)
from orchestrator.memory import clips_of
from orchestrator.session import (
    LARGEST_CLIP,
    LARGEST_PIECE,
    AppendAudio,
    CancelTurn,
    ClearInput,
    CutAnswer,
    Fail,
    FollowTurn,
    NotePlayback,
    OpenSession,
    OpenTurn,
    Phase,
    Reply,
    SayTurn,
    Session,
    SessionView,
    SubmitTurn,
)

pytestmark = pytest.mark.unit

FORMAT = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
PIECE = b"\1\0" * 160
NATIVE = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=24000)


def config(**fields):
    return ConverseRequest(config=CallConfig(**{"input_format": FORMAT, **fields}))


def audio(index, data=PIECE):
    return ConverseRequest(audio=CallerAudio(index=index, data=data))


def text(words="and?"):
    return ConverseRequest(text=CallerText(text=words))


def commit(key="", **options):
    request = Commit(idempotency_key=key)
    if options:
        request.options.CopyFrom(TurnOptions(**options))
    return ConverseRequest(commit=request)


def say(words="hello", key=""):
    return ConverseRequest(say=Say(text=words, idempotency_key=key))


def cancel(**fields):
    return ConverseRequest(cancel=Cancel(**fields))


def playback(heard_ms, turn_id=""):
    return ConverseRequest(playback=Playback(turn_id=turn_id, heard_ms=heard_ms))


CLEAR = ConverseRequest(clear=Clear())


class Driver:
    """Carries out actions as the real one does, but nothing happens; remembers what came out."""

    def __init__(self, view=None, **fields):
        self.session = Session()
        self.view = view or SessionView("s", NATIVE)
        self.turns = 0
        self.replies = []
        self.failed = None
        self.log = []
        self.open_turn = self.view.open_turn_id or None
        self.pieces = {}  # index -> turn that took it
        if fields or view is not None:
            self.give(config(**fields))

    def give(self, request):
        actions = self.session.receive(request)
        for action in actions:
            self.carry_out(action)
        return actions

    def new_turn(self):
        self.turns += 1
        return f"s.{self.turns}"

    def carry_out(self, action):
        self.log.append(action)
        for further in self.outcome(action) or ():
            self.carry_out(further)

    def outcome(self, action):
        match action:
            case OpenSession():
                return self.session.opened(self.view)
            case OpenTurn():
                assert self.open_turn is None
                self.open_turn = self.new_turn()
                return self.session.turn_opened()
            case AppendAudio(index=index):
                assert self.open_turn is not None
                assert index not in self.pieces
                self.pieces[index] = self.open_turn
                return self.session.stored(index)
            case SubmitTurn() | SayTurn():
                return self.session.submitted(self.submitted(action))
            case CancelTurn(turn_id=turn):
                return self.session.ended(turn)
        return self.note(action)

    def submitted(self, action):
        if isinstance(action, SayTurn):
            return self.new_turn()
        assert (action.ends is None) == (self.open_turn is None)
        turn, self.open_turn = self.open_turn or self.new_turn(), None
        return turn

    def note(self, action):
        match action:
            case ClearInput():
                self.open_turn = None
            case Reply(response=response):
                self.replies.append(response)
            case Fail(error=error):
                self.failed = error


@pytest.fixture
def call():
    return Driver(SessionView("s", NATIVE))


def acknowledged(driver):
    return [reply.audio_received.index for reply in driver.replies if reply.HasField("audio_received")]


# ---- configuration ----------------------------------------------------------------------------------------------


def test_the_call_is_ready_once_it_is_configured():
    driver = Driver(SessionView("s", NATIVE, next_audio_index=3))
    assert driver.replies[0].ready.session_id == "s"
    assert driver.replies[0].ready.next_audio_index == 3
    assert driver.replies[0].ready.output_format == NATIVE
    assert driver.session.phase is Phase.OPEN


def test_messages_before_the_session_is_opened_are_a_mistake_of_the_driver():
    session = Session()
    assert session.receive(config()) == [OpenSession(config().config)]
    with pytest.raises(RuntimeError, match="open the session"):
        session.receive(text())


@pytest.mark.parametrize("first", [audio(0), text(), say(), commit(), cancel(), playback(1), CLEAR])
def test_the_first_message_must_be_config(first):
    driver = Driver()
    driver.give(first)
    assert isinstance(driver.failed, StateError)
    assert driver.failed.field == first.WhichOneof("content")


BAD_CONFIGS = {
    "config.input_format.encoding": CallConfig(),
    "config.input_format.sample_rate": CallConfig(input_format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=7)),
    "config.options.text.temperature": CallConfig(
        input_format=FORMAT, options=TurnOptions(text=TrackSampling(temperature=float("nan")))
    ),
    "config.messages[0].role": CallConfig(input_format=FORMAT, messages=[Message(text=Text(text="be brief"))]),
}


@pytest.mark.parametrize("field", BAD_CONFIGS)
def test_a_wrong_config_names_its_field(field):
    driver = Driver()
    driver.give(ConverseRequest(config=BAD_CONFIGS[field]))
    assert isinstance(driver.failed, RequestError)
    assert driver.failed.field == field


def test_a_file_is_no_input_format_of_a_call():
    driver = Driver()
    driver.give(ConverseRequest(config=CallConfig(input_format=AudioFormat(encoding=ENCODING_FILE))))
    assert driver.failed.field == "config.input_format.encoding"


def test_what_is_not_offered_is_said_so(call):
    driver = Driver()
    driver.give(config(server_endpointing=True))
    assert isinstance(driver.failed, UnsupportedError)
    assert driver.failed.field == "config.server_endpointing"


@pytest.mark.parametrize("content", [{"speculate": Speculate()}, {"confirm": Confirm()}, {"retract": Retract()}])
def test_speculation_is_not_offered(call, content):
    call.give(ConverseRequest(**content))
    assert isinstance(call.failed, UnsupportedError)
    assert call.failed.field == next(iter(content))


def test_config_comes_once(call):
    call.give(config())
    assert isinstance(call.failed, StateError)
    assert call.failed.field == "config"


def test_an_empty_message_is_refused(call):
    call.give(ConverseRequest())
    assert isinstance(call.failed, RequestError)
    assert call.failed.field == "content"


def test_after_a_failure_nothing_counts(call):
    call.give(commit())
    assert isinstance(call.failed, StateError)
    assert call.give(audio(0)) == []


# ---- collecting -------------------------------------------------------------------------------------------------


def test_the_first_piece_opens_a_turn_and_is_acknowledged(call):
    assert [type(action) for action in call.give(audio(0))] == [OpenTurn, AppendAudio]
    assert [type(action) for action in call.give(audio(1))] == [AppendAudio]
    assert acknowledged(call) == [0, 1]


def test_pieces_that_were_stored_are_acknowledged_again_and_ignored(call):
    call.give(audio(0))
    call.give(audio(1))
    call.give(audio(0, b""))
    assert acknowledged(call) == [0, 1, 1]
    assert len(call.pieces) == 2


def test_pieces_that_are_stored_together_are_acknowledged_together(call):
    call.give(audio(0))
    for index in (1, 2, 3):
        (action,) = call.session.receive(audio(index))
        assert action.index == index
    assert call.session.receive(audio(2))[0].response.audio_received.index == 0  # what was taken is not yet stored
    (reply,) = call.session.stored(3)
    assert reply.response.audio_received.index == 3
    with pytest.raises(RuntimeError, match="stored"):
        call.session.stored(3)


def test_a_piece_that_comes_twice_before_any_is_stored_is_ignored(call):
    call.session.receive(audio(0))
    assert call.session.receive(audio(0)) == []


def test_a_gap_is_refused(call):
    call.give(audio(0))
    call.give(audio(2))
    assert isinstance(call.failed, RequestError)
    assert call.failed.field == "audio.index"


@pytest.mark.parametrize("data", [b"", b"\0", bytes(LARGEST_PIECE + 2), bytes(32002)], ids=len)
def test_pieces_of_a_wrong_size_are_refused(call, data):
    call.give(audio(0, data))
    assert isinstance(call.failed, RequestError)
    assert call.failed.field == "audio.data"
    assert not call.pieces


def test_a_piece_may_have_64_kib():
    form = AudioFormat(encoding=ENCODING_PCM_F32LE, sample_rate=48000)
    driver = Driver()
    driver.give(ConverseRequest(config=CallConfig(input_format=form)))
    driver.give(audio(0, bytes(LARGEST_PIECE)))
    assert acknowledged(driver) == [0]


def test_sound_that_is_never_committed_has_an_end():
    form = AudioFormat(encoding=ENCODING_PCM_F32LE, sample_rate=48000)
    sent = Message(role=ROLE_USER, audio=Clip(format=form))
    view = SessionView("s", NATIVE, 0, "s.x", (sent,), [(0, LARGEST_CLIP - 16000)])
    driver = Driver(view, input_format=form)
    driver.give(audio(0, bytes(16000)))
    assert driver.failed is None
    driver.give(audio(1))
    assert driver.failed.field == "audio.data"


def test_text_between_sounds_keeps_its_place(call):
    for request in (audio(0), audio(1), text("a"), audio(2), text("b"), commit()):
        call.give(request)
    submitted = next(action for action in call.log if isinstance(action, SubmitTurn))
    assert [message.WhichOneof("content") for message in submitted.collected] == ["audio", "text", "audio", "text"]
    assert [clip.number for clip in clips_of(submitted.collected)] == [0, 1]
    assert submitted.ends == 1
    appended = [action for action in call.log if isinstance(action, AppendAudio)]
    assert [action.ends for action in appended] == [None, None, 0]
    assert [action.collected and len(action.collected) for action in appended] == [1, None, 3]


def test_an_empty_text_is_refused(call):
    call.give(text(""))
    assert call.failed.field == "text.text"


def test_clear_forgets_but_indices_go_on(call):
    for request in (audio(0), text(), CLEAR):
        call.give(request)
    assert call.log[-1] == ClearInput(1)
    assert call.give(CLEAR) == []
    call.give(audio(1))
    assert [type(action) for action in call.log[-3:-1]] == [OpenTurn, AppendAudio]
    assert call.session.collected[0].audio.number == 0


def test_a_call_goes_on_with_what_an_earlier_one_collected():
    pending = Message(role=ROLE_USER, audio=Clip(format=FORMAT))
    driver = Driver(SessionView("s", NATIVE, next_audio_index=4, open_turn_id="s.x", collected=(pending,)))
    assert [type(action) for action in driver.give(audio(4))] == [AppendAudio]
    driver.give(commit())
    submitted = driver.log[-1]
    assert submitted.ends == 0
    assert len(submitted.collected) == 1


def test_sound_in_another_format_begins_another_clip():
    pending = Message(role=ROLE_USER, audio=Clip(format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)))
    driver = Driver(SessionView("s", NATIVE, next_audio_index=4, open_turn_id="s.x", collected=(pending,)))
    (append,) = driver.give(audio(4))
    assert (append.clip, append.ends) == (1, 0)


# ---- turns ------------------------------------------------------------------------------------------------------


def test_a_commit_needs_something_to_answer(call):
    call.give(commit())
    assert isinstance(call.failed, StateError)
    assert call.failed.field == "commit"


def test_options_of_a_commit_go_over_those_of_the_call():
    driver = Driver(options=TurnOptions(max_new_tokens=7, seed=1))
    driver.give(text())
    driver.give(commit(seed=2))
    assert driver.log[-1].options == TurnOptions(max_new_tokens=7, seed=2)


@pytest.mark.parametrize("request_", [commit(seed=1 << 63), commit("k" * 200)])
def test_a_wrong_commit_names_its_field(call, request_):
    call.give(text())
    call.give(request_)
    assert call.failed.field in ("commit.options.seed", "commit.idempotency_key")


def test_the_next_question_is_collected_while_a_turn_is_answered(call):
    for request in (audio(0), commit(), audio(1), text()):
        call.give(request)
    assert call.pieces == {0: "s.1", 1: "s.2"}
    assert call.session.running == "s.1"
    call.session.ended("s.1")
    call.give(commit())
    assert call.session.running == "s.2"


@pytest.mark.parametrize("request_", [commit(), say()])
def test_a_second_turn_waits_for_the_first(call, request_):
    for earlier in (text(), commit(), text()):
        call.give(earlier)
    call.give(request_)
    assert isinstance(call.failed, StateError)
    assert "cancel it first" in str(call.failed)


def test_a_text_is_said_without_touching_what_was_collected(call):
    call.give(audio(0))
    call.give(say("hold on"))
    assert call.log[-1].text == "hold on"
    call.session.ended(call.session.running)
    call.give(commit())
    assert call.session.running == "s.1"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (say(""), "say.text"),
        (
            ConverseRequest(say=Say(text="a", options=TurnOptions(output_type=OUTPUT_TYPE_TEXT))),
            "say.options.output_type",
        ),
    ],
)
def test_what_cannot_be_said(call, request_, field):
    call.give(request_)
    assert call.failed.field == field


def test_a_repeated_commit_follows_its_turn(call):
    for request in (text(), commit("k"), commit("k")):
        call.give(request)
    assert call.log[-1] == FollowTurn("s.1")
    call.session.ended("s.1")
    call.give(commit("k"))
    assert call.log[-1] == FollowTurn("s.1")
    assert call.failed is None


@pytest.mark.parametrize("again", [commit("k"), say("hello", "k")])
def test_a_turn_of_an_earlier_call_is_known(again):
    driver = Driver(SessionView("s", NATIVE, running_turn_id="s.x", keys={"k": "s.x"}))
    driver.give(again)
    assert driver.log[-1] == FollowTurn("s.x")


def test_text_that_is_sent_again_before_a_known_commit_is_no_new_text():
    pending = Message(role=ROLE_USER, audio=Clip(format=FORMAT))
    view = SessionView(
        "s", NATIVE, 4, open_turn_id="s.y", collected=(pending,), running_turn_id="s.x", keys={"k": "s.x"}
    )
    driver = Driver(view)
    for request in (text("again"), commit("k"), text("new")):
        driver.give(request)
    assert [message.WhichOneof("content") for message in driver.session.collected] == ["audio", "text"]
    assert driver.session.collected[1].text.text == "new"


def test_a_text_to_say_is_known_by_its_key(call):
    call.give(say("hello", "k"))
    call.session.ended("s.1")
    call.give(say("hello", "k"))
    assert call.log[-1] == FollowTurn("s.1")


# ---- barge-in ---------------------------------------------------------------------------------------------------


def test_cancel_says_how_far_the_caller_has_heard(call):
    for request in (text(), commit(), playback(400), playback(300), cancel()):
        call.give(request)
    assert call.log[-1] == CancelTurn("s.1", 400)
    assert call.session.running == ""


def test_cancel_overrules_playback(call):
    for request in (text(), commit(), playback(400), cancel(heard_ms=120)):
        call.give(request)
    assert call.log[-1] == CancelTurn("s.1", 120)


def test_without_playback_nothing_is_known(call):
    for request in (text(), commit(), cancel(turn_id="s.1")):
        call.give(request)
    assert call.log[-1] == CancelTurn("s.1", None)


def test_cancel_after_the_end_cuts_the_answer(call):
    for request in (text(), commit()):
        call.give(request)
    call.session.ended("s.1")
    for request in (playback(800), cancel()):
        call.give(request)
    assert call.log[-1] == CutAnswer("s.1", 800)


def test_cancel_with_nothing_running_is_answered(call):
    call.give(cancel())
    assert call.replies[-1].event.HasField("cancelled")
    assert call.replies[-1].event.turn_id == ""
    assert call.failed is None


def test_cancel_of_an_old_turn_is_answered_and_changes_nothing(call):
    for request in (text(), commit()):
        call.give(request)
    call.give(cancel(turn_id="s.old"))
    assert call.replies[-1].event.turn_id == "s.old"
    assert call.session.running == "s.1"


def test_commit_right_after_cancel(call):
    for request in (text(), commit(), text(), cancel(), commit()):
        call.give(request)
    assert call.session.running == "s.2"
    assert call.failed is None


def test_playback_of_an_old_turn_is_ignored(call):
    for request in (playback(5), text(), commit(), playback(5, "s.old")):
        call.give(request)
    assert call.session.heard_ms is None
    call.give(playback(6))
    assert call.session.heard_ms == 6


def test_only_the_running_turn_is_paced(call):
    for request in (playback(1), text(), commit(), playback(80), playback(40), playback(9, "s.old")):
        call.give(request)
    call.give(ConverseRequest(playback=Playback(heard_ms=160, age_ms=30)))
    call.session.ended("s.1")
    call.give(playback(200))
    assert [action for action in call.log if isinstance(action, NotePlayback)] == [
        NotePlayback("s.1", 80, 0),
        NotePlayback("s.1", 40, 0),
        NotePlayback("s.1", 160, 30),
    ]


def test_what_was_heard_before_the_connection_was_lost():
    driver = Driver(SessionView("s", NATIVE, running_turn_id="s.x", heard_ms=240))
    driver.give(cancel())
    assert driver.log[-1] == CancelTurn("s.x", 240)


def test_the_driver_must_keep_the_order(call):
    with pytest.raises(RuntimeError, match="stored"):
        call.session.stored(1)


# ---- any sequence -----------------------------------------------------------------------------------------------

REQUESTS = st.one_of(
    st.builds(audio, st.integers(0, 6), st.sampled_from([PIECE, PIECE * 2, PIECE, b"\0", b""])),
    st.builds(text, st.sampled_from(["a", "b", "b", ""])),
    st.builds(commit, st.sampled_from(["", "", "k", "l"])),
    st.builds(say, st.sampled_from(["a", "b", ""])),
    st.builds(cancel),
    st.builds(playback, st.integers(0, 1000)),
    st.just(CLEAR),
    st.just("ended"),
    st.just("next piece"),
    st.just("next piece"),
    st.just("next piece"),
    st.sampled_from([config(), ConverseRequest(), ConverseRequest(speculate=Speculate())]),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(REQUESTS, max_size=30))
def test_any_sequence_keeps_the_rules(requests):
    driver = Driver(SessionView("s", NATIVE))
    running = 0
    for request in requests:
        before = driver.session.running
        if request == "ended":
            driver.session.ended(driver.session.running)
        elif request == "next piece":
            driver.give(audio(driver.session.next_index))
        else:
            driver.give(request)
        if driver.session.running != before:
            running += bool(driver.session.running) - bool(before)
            assert not (before and driver.session.running)
        assert running in (0, 1)
    stored = sorted(driver.pieces)
    assert stored == list(range(len(stored)))  # every accepted piece once
    fresh = [index for place, index in enumerate(acknowledged(driver)) if index not in acknowledged(driver)[:place]]
    assert fresh == stored
    submitted = [action for action in driver.log if isinstance(action, SubmitTurn)]
    assert all(action.collected for action in submitted)
