import pytest
from hypothesis import given
from hypothesis import strategies as st

from kimia.model.generate import Step as ModelStep
from kimia.model.generate import TrackTokens, collect
from kimia.pipeline import TurnDone
from kimia.stage import DETOKENIZER, LLM, TOKENIZER
from kimia.v1.audio_pb2 import ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import (
    OUTPUT_TYPE_TEXT,
    ROLE_ASSISTANT,
    ROLE_USER,
    Message,
    Spoken,
    Text,
    TurnOptions,
)
from kimia.v1.session_pb2 import SessionRecord
from kimia.v1.turn_pb2 import Chunk, Encoded, Step, Turn
from orchestrator.memory import (
    REMEMBERED_TURNS,
    Answer,
    answer_of,
    clips_of,
    codes_heard,
    conversation,
    cut_answer,
    encoded_clips,
    end_turn,
    feature_keys,
    forget_blobs,
    remember,
    route_for,
)

pytestmark = pytest.mark.unit

TOKENS = TrackTokens(blank=50, text_eos=51, audio_ends=frozenset((52, 53)), token_offset=100, vocabulary=200, delay=6)
FORMAT = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
QUESTION = Message(role=ROLE_USER, text=Text(text="why?"))


def heard_clip(turn="", number=0, codes=(), keys=()):
    clip = Clip(format=FORMAT, source_turn=turn, source_number=number, codes=codes, feature_keys=keys)
    return Message(role=ROLE_USER, audio=clip)


def stretch(clip, codes, key="", end=False):
    return Chunk(encoded=Encoded(clip=clip, codes=codes, feature_key=key, clip_end=end))


# ---- answers ----------------------------------------------------------------------------------------------------


def tokens_log(text, audio, output_type):
    """The log of a run, as the language model's stage writes it."""
    steps, ended = [], False
    for index, (text_id, audio_id) in enumerate(zip(text, audio, strict=True)):
        ended |= text_id == TOKENS.text_eos
        step = Step(text_id=text_id, audio_id=audio_id)
        step.in_transcript = not ended and text_id < TOKENS.token_offset
        step.speaking = output_type == "both" and index >= TOKENS.delay
        if step.speaking and audio_id >= TOKENS.token_offset:
            step.code = audio_id - TOKENS.token_offset
        steps.append(Chunk(index=index, step=step))
    return steps


IDS = st.sampled_from([1, 2, 50, 51, 52, 100, 150, 199])


@given(
    st.lists(st.tuples(IDS, IDS), min_size=1, max_size=20),
    st.sampled_from(["text", "both"]),
    st.none() | st.integers(0, 20),
)
def test_answers_are_those_of_the_plain_twin(stream, output_type, heard):
    text = [text_id for text_id, _ in stream]
    audio = [audio_id if output_type == "both" and at >= 6 else 50 for at, (_, audio_id) in enumerate(stream)]
    steps = [ModelStep(at, *ids, None, None, False, None) for at, ids in enumerate(zip(text, audio, strict=True))]
    done = TurnDone("", collect(steps, TOKENS, output_type), 0, 0, TOKENS)
    wanted = done.message(heard)
    answer = answer_of(tokens_log(text, audio, output_type), heard)
    if wanted["message_type"] == "text":
        assert answer.message == Message(role=ROLE_ASSISTANT, text=Text(ids=wanted["text_tokens"]))
        assert answer.codes == 0
    else:
        codes = [token - TOKENS.token_offset for token in wanted["audio_tokens"]]
        spoken = Spoken(clip=Clip(codes=codes), transcript=Text(ids=wanted["text_tokens"]))
        assert answer.message == Message(role=ROLE_ASSISTANT, spoken=spoken)
        assert answer.codes == len(codes)


def test_no_step_no_answer():
    assert answer_of([]).message is None


def test_only_whole_codes_were_heard():
    assert [codes_heard(ms) for ms in (0, 79, 80, 400)] == [0, 0, 1, 5]


def spoken(*codes):
    return Message(role=ROLE_ASSISTANT, spoken=Spoken(clip=Clip(codes=codes)))


def test_a_cut_answer_takes_the_place_of_the_last():
    record = SessionRecord(messages=[QUESTION, spoken(1, 2, 3)], turn_ids=["s.1"])
    assert cut_answer(record, "s.1", None) == 3
    assert cut_answer(record, "s.1", Answer(spoken(1), 1)) == 1
    assert list(record.messages) == [QUESTION, spoken(1)]
    assert cut_answer(record, "s.1", Answer(spoken(1, 2), 2)) == 1  # what was cut is gone


@pytest.mark.parametrize(
    "record",
    [
        SessionRecord(),
        SessionRecord(messages=[QUESTION], turn_ids=["s.1"]),
        SessionRecord(messages=[QUESTION, spoken(1, 2)], turn_ids=["s.1", "s.2"]),
    ],
)
def test_nothing_is_cut_of_another_answer(record):
    before = SessionRecord.FromString(record.SerializeToString())
    assert cut_answer(record, "s.1", Answer(spoken(1), 1)) == 0
    assert record == before


# ---- clips ------------------------------------------------------------------------------------------------------


def test_a_clip_is_the_sum_of_its_stretches():
    log = [stretch(0, [1, 2], "a"), stretch(0, [3], "b", end=True), stretch(1, [4], "c", end=True)]
    clips = encoded_clips(log)
    assert (clips[0].codes, clips[0].feature_keys) == ([1, 2, 3], ["a", "b"])
    assert (clips[1].codes, clips[1].feature_keys) == ([4], ["c"])


def test_a_clip_that_was_encoded_twice_counts_once():
    log = [stretch(0, [1], "a", end=True), stretch(0, [1], "a", end=True)]
    assert encoded_clips(log)[0].codes == [1]


def test_new_clips_keep_the_numbers_of_their_input_log():
    history = [heard_clip("s.1", 0, [1], ["k"]), heard_clip("s.2", 0, [2], ["l"])]
    asked = [heard_clip("s.3", 0), QUESTION, heard_clip("s.3", 1)]
    messages = conversation("s.3", history, asked)
    clips = clips_of(messages)
    assert [clip.number for clip in clips] == [2, 3, 0, 1]
    assert clips_of(history)[0].number == 0  # untouched


@pytest.mark.parametrize(
    ("messages", "output_type", "route"),
    [
        ([QUESTION], OUTPUT_TYPE_TEXT, (LLM,)),
        ([QUESTION], 0, (LLM, DETOKENIZER)),
        ([heard_clip("s.1")], OUTPUT_TYPE_TEXT, (TOKENIZER, LLM)),
        ([heard_clip("s.1", codes=[1], keys=["k"])], OUTPUT_TYPE_TEXT, (LLM,)),
        ([heard_clip("s.1", codes=[1])], OUTPUT_TYPE_TEXT, (TOKENIZER, LLM)),
        ([Message(spoken=Spoken(clip=Clip(codes=[1]))), QUESTION], OUTPUT_TYPE_TEXT, (LLM,)),
        ([Message(spoken=Spoken(clip=Clip())), QUESTION], OUTPUT_TYPE_TEXT, (LLM,)),
        ([Message(spoken=Spoken(clip=Clip(format=FORMAT))), QUESTION], OUTPUT_TYPE_TEXT, (TOKENIZER, LLM)),
    ],
)
def test_a_turn_passes_only_the_stages_it_needs(messages, output_type, route):
    assert route_for(messages, TurnOptions(output_type=output_type)) == route


def test_clips_without_their_blobs_are_encoded_again():
    messages = [heard_clip("s.1", 0, [1], ["a", "b"]), heard_clip("s.2", 0, [2], ["c"])]
    assert feature_keys(messages) == ["a", "b", "c"]
    forget_blobs(messages, ["b"])
    assert [list(clip.feature_keys) for clip in clips_of(messages)] == [[], ["c"]]
    options = TurnOptions(output_type=OUTPUT_TYPE_TEXT)
    assert route_for(conversation("s.3", messages, [QUESTION]), options) == (TOKENIZER, LLM)


# ---- after a turn -----------------------------------------------------------------------------------------------

ANSWER = Message(role=ROLE_ASSISTANT, text=Text(ids=[7]))


def running_record(*history):
    asked = [heard_clip("s.2", 0)]
    record = SessionRecord(id="s", messages=history, asked=asked, running_turn_id="s.2", heard_ms=80)
    record.turn_ids.extend(["s.1", "s.2"])
    return record, Turn(id="s.2", messages=conversation("s.2", history, asked))


def test_a_turn_becomes_part_of_the_conversation():
    old = heard_clip("s.1", 0, [1], ["k"])
    record, turn = running_record(old)
    remember(record, turn, [stretch(0, [8, 9], "n", end=True)], ANSWER, dropped=0)
    assert list(record.messages) == [old, heard_clip("s.2", 0, [8, 9], ["n"]), ANSWER]
    assert (record.running_turn_id, record.heard_ms, list(record.asked)) == ("", 0, [])


def test_history_that_was_encoded_again_has_its_new_keys():
    record, turn = running_record(heard_clip("s.1", 0, [1]))
    log = [stretch(1, [1], "again", end=True), stretch(0, [8], "n", end=True)]
    remember(record, turn, log, ANSWER, dropped=0)
    assert [list(clip.feature_keys) for clip in clips_of(record.messages)] == [["again"], ["n"]]


def test_a_clip_that_was_not_encoded_to_its_end_is_encoded_again():
    record, turn = running_record()
    remember(record, turn, [stretch(0, [8], "n")], None, dropped=0)
    assert list(record.messages) == [heard_clip("s.2", 0)]


def test_what_the_model_dropped_is_forgotten():
    record, turn = running_record(QUESTION, ANSWER, QUESTION, ANSWER)
    remember(record, turn, [], ANSWER, dropped=2)
    assert list(record.messages) == [QUESTION, ANSWER, heard_clip("s.2", 0), ANSWER]


def test_a_turn_that_failed_leaves_nothing():
    record, _ = running_record(QUESTION, ANSWER)
    end_turn(record)
    assert list(record.messages) == [QUESTION, ANSWER]
    assert not record.asked


def test_only_turns_that_matter_are_named():
    record = SessionRecord(messages=[heard_clip("s.0")])
    record.turn_ids.extend(f"s.{number}" for number in range(REMEMBERED_TURNS + 10))
    end_turn(record)
    assert list(record.turn_ids) == ["s.0", *(f"s.{number}" for number in range(10, REMEMBERED_TURNS + 10))]
