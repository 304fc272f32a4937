import pytest

from kimia.errors import StateError
from kimia.model.philox import SEED_LIMIT
from kimia.streams.journal import Playback
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_MULAW, AudioFormat, Clip
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_BOTH, ROLE_ASSISTANT, ROLE_USER, Message, Spoken, Text, TurnOptions
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, JOB_CLASS_INTERACTIVE, Caller
from orchestrator.following import Position
from orchestrator.session import LARGEST_PIECE
from orchestrator.turn import Wanted, check_idle, filled_options, prepared, separated
from tests.orchestrator.world import FORMAT, NATIVE, TEXT_ONLY, asks, speaks

pytestmark = pytest.mark.unit

CALLER = Caller(tenant="t")


def wanted(**fields):
    defaults = {"caller": CALLER, "asked": [asks()], "options": TurnOptions(), "seconds": 60.0}
    return Wanted(**{**defaults, **fields})


# ---- preparing --------------------------------------------------------------------------------------------------


def test_what_is_not_given_is_decided():
    turn = prepared("s.1", [], wanted())
    assert (turn.session_id, turn.job_class) == ("s", JOB_CLASS_INTERACTIVE)
    assert turn.options == TurnOptions(output_type=OUTPUT_TYPE_BOTH, preset="low-latency", output_format=NATIVE)
    assert 0 <= turn.seed < SEED_LIMIT
    assert turn.seed != prepared("s.1", [], wanted()).seed
    assert not turn.HasField("say")


def test_what_is_given_is_kept():
    form = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)
    options = TurnOptions(seed=0, preset="upstream", output_format=form)
    turn = prepared("s.1", [], wanted(options=options, say="hello", key="k", job_class=JOB_CLASS_BATCH))
    assert (turn.seed, turn.say, turn.idempotency_key, turn.job_class) == (0, "hello", "k", JOB_CLASS_BATCH)
    assert filled_options(options).output_format == form
    assert not options.output_type


def test_the_question_follows_the_history():
    turn = prepared("s.2", [asks("one")], wanted(asked=[asks("two")], options=TEXT_ONLY))
    assert [message.text.text for message in turn.messages] == ["one", "two"]
    assert list(turn.route) == [2]


# ---- sound ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, LARGEST_PIECE, LARGEST_PIECE + 1, 3 * LARGEST_PIECE])
def test_a_clip_is_cut_without_loss(size):
    data = bytes(at % 251 for at in range(size))
    clip = Clip(format=FORMAT, data=data)
    _, chunks = separated("s.1", [Message(role=ROLE_USER, audio=clip)] * 2)
    pieces = [chunk.input for chunk in chunks if chunk.input.clip == 1]
    assert b"".join(piece.data for piece in pieces) == data
    assert all(0 < len(piece.data) <= LARGEST_PIECE for piece in pieces)
    assert [piece.clip_end for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_sound_goes_to_the_input_log_and_the_rest_into_the_messages():
    file = Clip(format=AudioFormat(encoding=ENCODING_FILE), data=b"RIFF")
    answer = Message(role=ROLE_ASSISTANT, spoken=Spoken(clip=file, transcript=Text(text="yes")))
    by_codes = Message(role=ROLE_ASSISTANT, spoken=Spoken(clip=Clip(codes=[1], data=b"x"), transcript=Text(text="no")))
    given = [speaks(30), answer, by_codes, asks(), speaks(1, salt=2)]
    messages, chunks = separated("s.1", given)
    assert [chunk.index for chunk in chunks] == list(range(len(chunks)))
    assert [chunk.final for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert [chunk.input.clip for chunk in chunks] == [0, 0, 1, 2]
    assert [chunk.input.clip_end for chunk in chunks] == [False, True, True, True]
    first, second, third = messages[0].audio, messages[1].spoken.clip, messages[4].audio
    assert [(c.source_turn, c.source_number, c.number, c.data) for c in (first, second, third)] == [
        ("s.1", number, number, b"") for number in range(3)
    ]
    assert messages[2].spoken.clip == Clip(codes=[1])
    assert given[0].audio.data
    assert first.format == FORMAT


def test_text_needs_no_input():
    assert separated("s.1", [asks()]) == ([asks()], [])


# ---- sessions ---------------------------------------------------------------------------------------------------


def test_one_turn_at_a_time():
    check_idle(SessionRecord())
    with pytest.raises(StateError, match=r"s\.1"):
        check_idle(SessionRecord(running_turn_id="s.1"))


@pytest.fixture
async def turns(world):
    host = await world.begin()
    return host.desk.turns


async def test_a_turn_is_started_once_by_its_key(turns):
    await turns.records.begin("s", CALLER)
    first, second = await turns.open("s", CALLER), await turns.open("s", CALLER)
    turn = await turns.start(first, wanted(key="k", options=TEXT_ONLY))
    assert turn.id == first.turn_id
    assert await turns.start(second, wanted(key="k", options=TEXT_ONLY)) == first.turn_id


async def test_a_turn_that_is_gone_is_forgotten(turns):
    await turns.records.begin("s", CALLER)
    await turns.records.change("s", lambda record: setattr(record, "running_turn_id", "s.gone"))
    record = await turns.refreshed("s", "t")
    assert record.running_turn_id == ""


async def test_a_turn_that_was_never_submitted_is_not_followed(turns):
    await turns.records.begin("s", CALLER)
    opened = await turns.open("s", CALLER)
    with pytest.raises(StateError):
        await turns.follow(opened.turn_id, "t", Position())


async def test_a_turn_is_settled_once(turns, world):
    await turns.records.begin("s", CALLER)
    turn = await turns.start(await turns.open("s", CALLER), wanted(options=TEXT_ONLY))
    head = await world.ended(turn.id)
    for _ in range(2):
        await turns.settle(head)
    assert len((await turns.records.load("s", "t")).messages) == 2


async def test_whoever_settles_a_cancelled_turn_knows_what_was_heard(turns, world):
    await turns.records.begin("s", CALLER)
    turn = await turns.start(await turns.open("s", CALLER), wanted(options=TurnOptions(output_type=OUTPUT_TYPE_BOTH)))

    async def spoken():
        return len(await world.journal.read(turn.id, "tokens")) > 20

    await world.until_async(spoken)
    await world.journal.note_playback(turn.id, Playback(heard=0.48, age=0.0))
    await world.journal.cancel(turn.id)  # by an orchestrator that died before it settled the turn
    record = await turns.refreshed("s", "t")
    assert len(record.messages[-1].spoken.clip.codes) == 6


async def test_a_turn_taken_over_is_written_by_one_only(turns, world):
    await turns.records.begin("s", CALLER)
    opened = await turns.open("s", CALLER)
    again = await turns.reopen(opened.turn_id, CALLER, ())
    _, chunks = separated(opened.turn_id, [speaks(1)])
    with pytest.raises(StateError):
        await turns.append(opened, chunks)
    await turns.append(again, chunks)
    assert len(await world.journal.read(opened.turn_id, "input")) == 1
