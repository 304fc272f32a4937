"""Which clips of a turn are wanted, and which of them must still be encoded."""

import pytest

from kimia.clips import wanted_sounds
from kimia.errors import ConversationError
from kimia.v1.audio_pb2 import ENCODING_MULAW, AudioFormat, Clip
from kimia.v1.conversation_pb2 import Message, Spoken, Text

pytestmark = pytest.mark.unit

PHONE = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)


def spoken(**clip) -> Message:
    return Message(spoken=Spoken(clip=Clip(**clip), transcript=Text(text="yes")))


def test_sounds_are_found_by_number_in_the_order_of_the_messages() -> None:
    messages = [
        Message(text=Text(text="hello")),
        Message(audio=Clip(number=7, format=PHONE)),
        spoken(number=3, format=PHONE),
        Message(audio=Clip(number=1, format=PHONE, codes=[4], feature_keys=["key"])),
    ]
    sounds = wanted_sounds(messages)
    assert [(number, sound.index, sound.heard) for number, sound in sounds.items()] == [
        (7, 1, True),
        (3, 2, False),
        (1, 3, True),
    ]
    assert [sound.must_be_encoded for sound in sounds.values()] == [True, True, False]


def test_codes_of_a_heard_clip_do_not_make_its_features_known() -> None:
    [sound] = wanted_sounds([Message(audio=Clip(format=PHONE, codes=[4, 5]))]).values()
    assert sound.must_be_encoded


def test_spoken_history_with_codes_or_without_any_sound_is_not_wanted() -> None:
    assert wanted_sounds([spoken(codes=[1, 2]), spoken()]) == {}


def test_equal_numbers_are_refused() -> None:
    with pytest.raises(ConversationError, match=r"message 1: .*number 0"):
        wanted_sounds([Message(audio=Clip(format=PHONE)), Message(audio=Clip(format=PHONE))])
