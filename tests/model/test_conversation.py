"""Every rule for conversations: what is legal is read as meant, what is not is refused with its index and the rule."""

from pathlib import Path

import numpy as np
import pytest

from kimia.errors import ConversationError, ParameterError
from kimia.model.config import LMConfig
from kimia.model.conversation import Message, check_output_type, parse_conversation
from tests.golden_data import golden, golden_json
from tests.model.tiny_text import CONFIG

pytestmark = pytest.mark.unit

OFFSET, END = CONFIG.token_offset, CONFIG.vocab_size
TONE = np.zeros(160, dtype=np.float32)
HELLO = {"role": "user", "message_type": "text", "content": "hello"}
ANSWER = {"role": "assistant", "message_type": "text", "content": "hi"}


def user(message_type, content=None, **more):
    return {"role": "user", "message_type": message_type, "content": content, **more}


def assistant(message_type, content=None, **more):
    return {"role": "assistant", "message_type": message_type, "content": content, **more}


LEGAL = [
    (user("text", "hi"), Message("user", "text", text="hi")),
    (user("text", ""), Message("user", "text", text="")),
    (user("audio", "a.wav"), Message("user", "audio", audio="a.wav")),
    (user("audio", Path("a.wav")), Message("user", "audio", audio=Path("a.wav"))),
    (user("audio", b"RIFF"), Message("user", "audio", audio=b"RIFF")),
    (user("audio", (TONE, 16000)), Message("user", "audio", audio=(TONE, 16000))),
    (user("audio", [TONE, np.int64(8000)]), Message("user", "audio", audio=(TONE, 8000))),
    (
        user("audio", "a.wav", audio_tokens=[OFFSET, END - 1]),
        Message("user", "audio", audio="a.wav", audio_tokens=(OFFSET, END - 1)),
    ),
    (user("audio-text", ["a.wav", "hi"]), Message("user", "audio-text", text="hi", audio="a.wav")),
    (assistant("audio", "a.wav"), Message("assistant", "audio", audio="a.wav")),
    (assistant("text", "hi", text_tokens=[1, 2]), Message("assistant", "text", text="hi", text_tokens=(1, 2))),
    (assistant("text", text_tokens=[]), Message("assistant", "text", text_tokens=())),
    (assistant("text", text_tokens=(0, OFFSET - 1)), Message("assistant", "text", text_tokens=(0, OFFSET - 1))),
    (
        assistant("audio-text", ("a.wav", "hi"), audio_tokens=None, text_tokens=None),
        Message("assistant", "audio-text", text="hi", audio="a.wav"),
    ),
    (
        assistant("audio-text", [None, "hi"], audio_tokens=[OFFSET]),
        Message("assistant", "audio-text", text="hi", audio_tokens=(OFFSET,)),
    ),
    (
        assistant("audio-text", ["a.wav", None], text_tokens=[3]),
        Message("assistant", "audio-text", audio="a.wav", text_tokens=(3,)),
    ),
    (
        {"role": "assistant", "message_type": "audio-text", "audio_tokens": [], "text_tokens": [3]},
        Message("assistant", "audio-text", audio_tokens=(), text_tokens=(3,)),
    ),
]


@pytest.mark.parametrize(("raw", "message"), LEGAL)
def test_legal_messages_are_read_as_meant(raw, message):
    assert parse_conversation([raw, HELLO], CONFIG)[0] == message


def test_what_the_encoders_must_do_follows_from_the_message():
    needs = {
        (m.message_type, m.audio_tokens is not None): (m.needs_codes, m.needs_features)
        for m in (message for _, message in LEGAL)
    }
    assert needs == {
        ("text", False): (False, False),
        ("audio", False): (True, True),
        ("audio", True): (False, True),
        ("audio-text", False): (True, False),
        ("audio-text", True): (False, False),
    }


MESSAGES = [
    ("hello", "a message is a mapping"),
    (None, "a message is a mapping"),
    ({}, "role must be 'user' or 'assistant', got None"),
    ({"message_type": "text", "content": "x"}, "role must be 'user' or 'assistant', got None"),
    ({"role": "system", "message_type": "text", "content": "x"}, "put instructions in a user text message"),
    ({"role": "tool", "message_type": "text", "content": "x"}, "role must be 'user' or 'assistant', got 'tool'"),
    ({"role": ["user"], "message_type": "text", "content": "x"}, "role must be"),
    ({"role": "user", "content": "x"}, "message_type is missing"),
    (user("image", "x"), "message_type must be 'text', 'audio' or 'audio-text', got 'image'"),
    (user(["text"], "x"), "message_type must be"),
    (user("text", "x", name="Bob"), "unknown field 'name'"),
    (user("text", "x", **{"message-type": "text"}), "unknown field 'message-type'"),
    ({"role": "user", "message_type": "text"}, "text content must be a string (it may be empty), got nothing"),
    (user("text", ["x"]), "text content must be a string (it may be empty), got list"),
    (user("text", b"x"), "text content must be a string (it may be empty), got bytes"),
    (user("text", "x\udc80"), "lone surrogate (U+DC80) at character 1"),
    ({"role": "user", "message_type": "audio"}, "audio content is missing"),
    (user("audio", audio_tokens=[OFFSET]), "continuous features of a clip come from its sound"),
    (user("audio", " "), "empty path"),
    (user("audio", b""), "no bytes"),
    (user("audio", 3), "must be a path, the bytes of a file or (samples, rate), got int"),
    (user("audio", TONE), "got ndarray"),
    (user("audio", (TONE,)), "(numpy array, rate in Hz)"),
    (user("audio", ([0.0], 16000)), "(numpy array, rate in Hz)"),
    (user("audio", (TONE, 0)), "positive whole number of Hz, got 0"),
    (user("audio", (TONE, 16000.0)), "positive whole number of Hz, got 16000.0"),
    (user("audio", (TONE, True)), "positive whole number of Hz, got True"),
    (user("audio", (TONE[:0], 16000)), "non-empty array of one or two axes, got shape (0,)"),
    (user("audio", (TONE.reshape(2, 2, 40), 16000)), "got shape (2, 2, 40)"),
    (user("audio", "a.wav", audio_tokens=[]), "must not be empty"),
    (user("audio", "a.wav", audio_tokens=[OFFSET - 1]), f"audio_tokens[0] must be an id in {OFFSET}..{END - 1}"),
    (user("audio", "a.wav", audio_tokens=[OFFSET, END]), f"audio_tokens[1] must be an id in {OFFSET}..{END - 1}"),
    (user("audio", "a.wav", audio_tokens=[True]), "audio_tokens[0] must be an id"),
    (user("audio", "a.wav", audio_tokens=[float(OFFSET)]), "audio_tokens[0] must be an id"),
    (user("audio", "a.wav", audio_tokens="1 2"), "audio_tokens must be a list of ids, got str"),
    (user("text", "x", audio_tokens=[OFFSET]), "do not belong to a text message"),
    (user("text", "x", text_tokens=[1]), "of the assistant only"),
    (user("audio-text", ["a.wav", "x"], text_tokens=[1]), "of the assistant only"),
    (assistant("audio", "a.wav", text_tokens=[1]), "text and audio-text messages"),
    (assistant("text", "x", text_tokens=[-1]), f"text_tokens[0] must be an id in 0..{OFFSET - 1}"),
    (assistant("text", "x", text_tokens=[0, OFFSET]), f"text_tokens[1] must be an id in 0..{OFFSET - 1}"),
    (assistant("text", 7, text_tokens=[1]), "text content must be a string"),
    (assistant("audio-text", "a.wav"), "must be [audio, transcript]"),
    (assistant("audio-text", ["a.wav"]), "must be [audio, transcript]"),
    (assistant("audio-text"), "lacks its audio"),
    (assistant("audio-text", [None, "x"]), "lacks its audio"),
    (assistant("audio-text", [3, "x"], audio_tokens=[OFFSET]), "got int"),
    (assistant("audio-text", ["a.wav", None]), "the transcript of audio-text content must be a string"),
    (assistant("audio-text", ["a.wav", 3]), "the transcript of audio-text content must be a string"),
]


@pytest.mark.parametrize(("raw", "rule"), MESSAGES)
def test_illegal_messages_are_refused_by_index_and_rule(raw, rule):
    for before in (0, 2):
        with pytest.raises(ConversationError) as error:
            parse_conversation([HELLO] * before + [raw, HELLO], CONFIG)
        assert error.value.index == before
        assert rule in error.value.rule
        assert str(error.value) == f"message {before}: {error.value.rule}"


@pytest.mark.parametrize("chats", [HELLO, "hello", None, 3, iter([HELLO])])
def test_a_conversation_is_a_list(chats):
    with pytest.raises(ConversationError, match="a conversation is a list of messages") as error:
        parse_conversation(chats, CONFIG)
    assert error.value.index is None


@pytest.mark.parametrize("must_end_with_user", [True, False])
def test_an_empty_conversation_is_illegal(must_end_with_user):
    with pytest.raises(ConversationError, match="the conversation is empty") as error:
        parse_conversation([], CONFIG, must_end_with_user)
    assert error.value.index is None


def test_only_training_conversations_may_end_with_the_assistant():
    with pytest.raises(ConversationError, match="ends with the assistant") as error:
        parse_conversation([HELLO, ANSWER], CONFIG)
    assert error.value.index == 1
    assert [m.role for m in parse_conversation((HELLO, ANSWER), CONFIG, must_end_with_user=False)] == [
        "user",
        "assistant",
    ]


def test_several_messages_of_a_role_and_a_greeting_are_legal():
    chats = [ANSWER, ANSWER, HELLO, HELLO, ANSWER, HELLO]
    assert [m.role for m in parse_conversation(chats, CONFIG)] == [raw["role"] for raw in chats]


def test_later_changes_of_the_input_do_not_reach_a_message():
    ids = [OFFSET]
    message = parse_conversation([user("audio", "a.wav", audio_tokens=ids)], CONFIG)[0]
    ids.append(0)
    assert message.audio_tokens == (OFFSET,)


@pytest.mark.parametrize("output_type", ["audio", "", None, "Both", ["text"]])
def test_other_output_types_are_refused(output_type):
    with pytest.raises(ParameterError, match="output_type must be 'text' or 'both'"):
        check_output_type(output_type)


@pytest.mark.parametrize("output_type", ["text", "both"])
def test_both_output_types_pass(output_type):
    check_output_type(output_type)


@pytest.mark.parity
def test_golden_conversations_are_legal():
    config = LMConfig.read(golden("e2e") / "model" / "config.json")
    for case in golden_json("e2e", "cases.json")["cases"]:
        messages = parse_conversation(case["messages"], config)
        assert [m.message_type for m in messages] == [raw["message_type"] for raw in case["messages"]]
