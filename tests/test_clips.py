"""Which clips of a turn are wanted, and which of them must still be encoded."""

import pytest

from kimia.clips import contents, early_bytes, early_segments, wanted_sounds
from kimia.errors import ConversationError
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_MULAW, ENCODING_PCM_S16LE, AudioFormat, Clip
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


# ---- segments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "first"),
    [
        (PHONE, 244_000),
        (AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000), 976_000),
        (AudioFormat(encoding=ENCODING_FILE), None),
        (AudioFormat(), None),
    ],
    ids=["phone", "pcm", "file", "nothing"],
)
def test_a_segment_can_be_encoded_half_a_second_behind_its_end(form: AudioFormat, first: int | None) -> None:
    assert early_bytes(form, 0) == first
    if first is None:
        assert early_segments(form, 10**9) == 0
    else:
        assert [early_segments(form, size) for size in (0, first - 1, first, early_bytes(form, 1))] == [0, 0, 1, 2]


@pytest.mark.parametrize("size", [1000, 100_000, 10**7])
def test_contents_depend_on_the_sound_and_not_on_its_pieces(size: int) -> None:
    data = bytes(at * 7 % 251 for at in range(500_000))
    cut = [data[at : at + size] for at in range(0, len(data), size)]
    one, two, rest = contents(PHONE, cut)
    assert [one, two, rest] == list(contents(PHONE, [data]))
    assert one.endswith("+")
    assert two.endswith("+")
    assert list(contents(PHONE, [data[:244_000]])) == [one, one.rstrip("+")]
    assert next(contents(PHONE, [data[:243_999]])) not in (one, one.rstrip("+"))
    changed = [data[:300_000], b"x", data[300_001:]]
    assert [a == b for a, b in zip(contents(PHONE, changed), (one, two, rest), strict=True)] == [True, False, False]
    assert set(contents(AudioFormat(encoding=ENCODING_MULAW, sample_rate=16000), [data])).isdisjoint({one, two, rest})
