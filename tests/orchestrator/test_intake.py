import pytest

from kimia.errors import RequestError
from kimia.v1.audio_pb2 import ENCODING_MULAW, ENCODING_PCM_S16LE, AudioFormat
from orchestrator.checks import LONGEST_CLIP, LONGEST_TEXT, MOST_CLIPS, MOST_MESSAGES, MOST_TEXT
from orchestrator.intake import SHORTEST_PIECE, Intake

pytestmark = pytest.mark.unit

S16 = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)
MULAW = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)


@pytest.fixture
def intake():
    return Intake(clip_bytes=10_000, turn_bytes=25_000)


def refused(call, *args):
    with pytest.raises(RequestError, match="commit, or clear") as caught:
        call(*args, "field")
    assert caught.value.field == "field"


def test_one_stretch_of_sound_has_a_limit(intake):
    intake.clip("field")
    intake.sound(bytes(10_000), S16, "field")
    refused(intake.sound, bytes(2), S16)


def test_all_sound_together_has_a_limit(intake):
    for size in (10_000, 10_000, 5_000):
        intake.clip("field")
        intake.sound(bytes(size), S16, "field")
    refused(intake.sound, bytes(2), S16)


def test_what_was_committed_counts_no_more(intake):
    for _ in range(10):
        intake.clip("field")
        intake.sound(bytes(10_000), S16, "field")
        intake.text("a" * LONGEST_TEXT, "field")
        intake.clear()


def test_a_piece_of_one_sample_counts_as_ten_milliseconds():
    intake = Intake(1 << 30, 1 << 30)
    intake.clip("field")
    for _ in range(round(LONGEST_CLIP / SHORTEST_PIECE)):
        intake.sound(b"\0", MULAW, "field")
    refused(intake.sound, b"\0\0", MULAW)


def test_sound_of_an_earlier_connection_counts():
    intake = Intake(10_000, 10_000)
    intake.clip("field")
    intake.stored(9_000, S16)
    intake.sound(bytes(1_000), S16, "field")
    refused(intake.sound, bytes(2), S16)


def test_texts_have_limits(intake):
    with pytest.raises(RequestError, match="shorten it"):
        intake.text("a" * (LONGEST_TEXT + 1), "field")
    intake.clear()
    for _ in range(MOST_TEXT // LONGEST_TEXT):
        intake.text("é" * (LONGEST_TEXT // 2), "field")
    refused(intake.text, "a")


def test_messages_have_a_limit(intake):
    for _ in range(MOST_MESSAGES):
        intake.text("a", "field")
    refused(intake.text, "a")


def test_stretches_of_sound_have_a_limit(intake):
    for _ in range(MOST_CLIPS):
        intake.clip("field")
    refused(intake.clip)
