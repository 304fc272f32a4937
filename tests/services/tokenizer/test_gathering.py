"""Clips in pieces: the same segments however they are cut and whenever they come."""

import numpy as np
import pytest

from kimia.clips import wanted_sounds
from kimia.errors import AudioError, ConversationError
from kimia.model.audio import cut, prepare_waveform
from kimia.sound import decode, encode
from kimia.v1.audio_pb2 import ENCODING_ALAW, ENCODING_MULAW, ENCODING_PCM_F32LE, ENCODING_PCM_S16LE, AudioFormat
from kimia.v1.turn_pb2 import Chunk, InputAudio
from services.tokenizer.gathering import Gathering
from tests.model.plain_encoder import speech_like
from tests.services.turns import FILE, PCM16, QUESTION, heard, turn

pytestmark = pytest.mark.unit

RATE, SEGMENT = 16000, 32000  # two seconds


def gathering(form, number=0):
    return Gathering(wanted_sounds(turn([heard(number, form)]).messages), RATE, SEGMENT)


def read(form, data, size):
    """(segments, bytes that had come) of each reading."""
    clips, readings = gathering(form), []
    for start in range(0, len(data), size):
        end = start + size
        piece = InputAudio(data=data[start:end], clip_end=end >= len(data))
        if clip := clips.take(Chunk(input=piece)):
            readings.append((clip.read(), min(end, len(data))))
    assert clips.complete == 1
    clips.check_complete()
    return readings


@pytest.mark.parametrize("size", [997, 4000, 10**9])
@pytest.mark.parametrize("encoding", [ENCODING_PCM_S16LE, ENCODING_PCM_F32LE, ENCODING_MULAW, ENCODING_ALAW])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_segments_are_those_of_the_whole_clip_bit_by_bit(encoding, rate, size):
    form = AudioFormat(encoding=encoding, sample_rate=rate)
    data = encode(speech_like(rate * 9 // 2 + 7), form)
    whole = cut(prepare_waveform(decode(data, form), rate, RATE), SEGMENT)
    found = [segment for segments, _ in read(form, data, size) for segment in segments]
    assert len(found) == 3
    for ours, theirs in zip(found, whole, strict=True):
        assert np.array_equal(ours.samples, theirs.samples)
        assert ours.whole == theirs.whole


def test_a_segment_is_there_half_a_second_after_its_end():
    data = encode(speech_like(8000 * 5), AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000))
    readings = read(AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000), data, 800)
    assert [(len(segments), came) for segments, came in readings] == [(1, 20_000), (1, 36_000), (1, 40_000)]


@pytest.mark.parametrize(
    ("seconds", "wholes"), [(1.9, [True]), (2.0, [True]), (2.4, [False, False]), (4.0, [False, False])]
)
def test_only_a_clip_of_one_segment_is_whole(seconds, wholes):
    data = encode(speech_like(round(seconds * RATE)), PCM16)
    for size in (3200, 10**9):
        assert [segment.whole for segments, _ in read(PCM16, data, size) for segment in segments] == wholes


def test_a_file_is_read_at_its_end():
    data = QUESTION.read_bytes()
    [(segments, came)] = read(FILE, data, 1000)
    assert came == len(data)
    assert sum(len(segment.samples) for segment in segments) == 24001


@pytest.mark.parametrize(
    ("data", "rule"),
    [(bytes(321), "whole number"), (b"", "empty"), (b"ab" * 50_000, None)],
    ids=["odd", "empty", "fine"],
)
def test_what_is_wrong_with_a_clip_is_said_when_it_is_read(data, rule):
    clip = gathering(PCM16).take(Chunk(input=InputAudio(data=data, clip_end=True)))
    if rule is None:
        assert len(clip.read()) == 2
        return
    with pytest.raises(AudioError, match=rf"message 0: .*{rule}"):
        clip.read()


def test_pieces_that_belong_nowhere():
    clips = gathering(PCM16)
    assert clips.take(Chunk(final=True)) is None
    with pytest.raises(ConversationError, match="clip 9"):
        clips.take(Chunk(input=InputAudio(clip=9)))
    with pytest.raises(AudioError, match="never came"):
        clips.check_complete()
    assert clips.take(Chunk(input=InputAudio(data=b"ab"))) is None
    with pytest.raises(AudioError, match="cut off"):
        clips.check_complete()
    clips.take(Chunk(input=InputAudio(data=b"ab", clip_end=True)))
    with pytest.raises(AudioError, match="after the end"):
        clips.take(Chunk(input=InputAudio(data=b"ab")))
