"""Conversations as users write them, as messages of the contract."""

import pytest

from kimia.client.chat import read_chat
from kimia.errors import AudioError, ConversationError
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_PCM_S16LE
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, ROLE_USER

pytestmark = pytest.mark.unit


def user(kind: str, content=None, **more) -> dict:
    return {"role": "user", "message_type": kind, "content": content, **more}


def answered(kind: str, content=None, **more) -> dict:
    return user(kind, content, **more) | {"role": "assistant"}


def test_text() -> None:
    first, second = read_chat([user("text", "Hello?"), answered("text", text_tokens=[1, 2])])
    assert (first.role, first.text.text) == (ROLE_USER, "Hello?")
    assert (second.role, second.text.text, list(second.text.ids)) == (ROLE_ASSISTANT, "", [1, 2])


def test_sound_by_path_bytes_and_samples(tmp_path) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF1")
    chat = [user("audio", str(tmp_path / "a.wav")), user("audio", b"RIFF2"), user("audio", (bytes(4), 8000))]
    clips = [message.audio for message in read_chat(chat)]
    assert [clip.data for clip in clips] == [b"RIFF1", b"RIFF2", bytes(4)]
    assert [clip.format.encoding for clip in clips] == [ENCODING_FILE, ENCODING_FILE, ENCODING_PCM_S16LE]
    assert clips[2].format.sample_rate == 8000


def test_spoken_history() -> None:
    sound, ids = read_chat(
        [answered("audio-text", [b"RIFF", "Gladly."]), answered("audio-text", codes=[5, 6], text_tokens=[7])]
    )
    assert (sound.spoken.clip.data, sound.spoken.transcript.text) == (b"RIFF", "Gladly.")
    assert (list(ids.spoken.clip.codes), list(ids.spoken.transcript.ids)) == ([5, 6], [7])


@pytest.mark.parametrize(
    ("message", "rule"),
    [
        ("hello", "a message is a mapping"),
        (user("text", None), "text content is missing"),
        (user("text", 5), "must be a string"),
        (user("text", "\ud800"), "lone surrogate"),
        (user("audio", None), "audio content is missing"),
        (user("audio", 5), "must be a path"),
        (user("audio", ([1], 8000)), "samples are given as"),
        (user("audio", (b"", 8000, 1)), "samples are given as"),
        (user("audio-text", "x"), r"must be \[audio, transcript\]"),
        (user("audio-text", [None, "x"]), "lacks its audio"),
        (user("audio", b"RIFF", codes="5"), "codes must be a list"),
        (user("audio", b"RIFF", codes=[-1]), r"codes\[0\] must be an id"),
        (user("audio", b"RIFF", codes=[1, True]), r"codes\[1\] must be an id"),
        (user("audio", b"RIFF", audio_tokens=[152064]), "give `codes`"),
        (user("video", b"RIFF"), "message_type must be"),
        (user("text", "x", name="y"), "unknown field 'name'"),
        (user("text", "x") | {"role": "system"}, "role must be"),
    ],
)
def test_what_breaks_a_rule_names_its_message(message, rule) -> None:
    with pytest.raises(ConversationError, match=rule) as raised:
        read_chat([user("text", "first"), message])
    assert raised.value.index == 1


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("no such.wav", "does not exist"),
        (".", "is no file"),
        ("x" * 300, "cannot be read"),
        (b"", "no bytes"),
        ((bytes(3), 8000), "whole 16-bit samples"),
        ((b"", 8000), "whole 16-bit samples"),
        ((bytes(2), 44100), "must be one of 8000"),
    ],
)
def test_sound_that_cannot_be_used_names_its_message(content, complaint) -> None:
    with pytest.raises(AudioError, match=f"message 0: .*{complaint}") as raised:
        read_chat([user("audio", content)])
    assert isinstance(raised.value.__cause__, AudioError)


def test_an_empty_file(tmp_path) -> None:
    (tmp_path / "a.wav").touch()
    with pytest.raises(AudioError, match="is empty"):
        read_chat([user("audio", tmp_path / "a.wav")])


@pytest.mark.parametrize("chat", ["hello", b"x", {"role": "user"}, 5, None])
def test_a_conversation_is_a_list(chat) -> None:
    with pytest.raises(ConversationError, match="is a list of messages"):
        read_chat(chat)
