import numpy as np
import pytest
import soxr
from hypothesis import given, settings
from hypothesis import strategies as st

from kimia.sound import encode
from kimia.v1.audio_pb2 import ENCODING_ALAW, ENCODING_MULAW, ENCODING_PCM_F32LE, ENCODING_PCM_S16LE, AudioFormat
from kimia.v1.turn_pb2 import Speech
from orchestrator.sound import OutputSound, output_format

pytestmark = pytest.mark.unit

NATIVE = 24000


def tone(samples):
    return (np.sin(np.arange(samples) / 20) * 12000).astype("<i2")


def speech(words):
    return Speech(pcm=words.tobytes(), sample_rate=NATIVE)


def pieces(words, cuts, form):
    sound = OutputSound(form)
    parts = np.split(words, cuts)
    return [sound.feed(speech(part), at == len(parts) - 1) for at, part in enumerate(parts)], sound


def test_native_speech_is_passed_on():
    out, sound = pieces(tone(1000), [300], output_format(AudioFormat()))
    assert b"".join(out) == tone(1000).tobytes()
    assert sound.samples == 1000


@pytest.mark.parametrize("encoding", [ENCODING_PCM_S16LE, ENCODING_PCM_F32LE, ENCODING_MULAW, ENCODING_ALAW])
@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
def test_speech_in_any_format_is_that_of_the_whole(encoding, rate):
    form = AudioFormat(encoding=encoding, sample_rate=rate)
    words = tone(24000)
    out, sound = pieces(words, [1000, 9000], form)
    floats = words.astype(np.float32) / np.float32(32768)
    whole = encode(floats if rate == NATIVE else soxr.resample(floats, NATIVE, rate), form)
    assert sound.samples == rate
    assert len(b"".join(out)) == len(whole)
    if encoding == ENCODING_PCM_F32LE:
        assert np.allclose(np.frombuffer(b"".join(out), "<f4"), np.frombuffer(whole, "<f4"), atol=1e-5)
    else:
        different = np.frombuffer(b"".join(out), np.uint8) != np.frombuffer(whole, np.uint8)
        assert different.mean() < 0.01


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(0, 5000), max_size=4).map(sorted))
def test_who_begins_again_gets_the_same_pieces(cuts):
    form = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)
    assert pieces(tone(5000), cuts, form)[0] == pieces(tone(5000), cuts, form)[0]


def test_an_empty_end_brings_out_what_was_held_back():
    form = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=8000)
    sound = OutputSound(form)
    first = sound.feed(speech(tone(3000)), False)
    rest = sound.feed(Speech(), True)
    assert len(first) < 2000
    assert len(first) + len(rest) == 2000


def test_a_turn_without_speech():
    sound = OutputSound(AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000))
    assert sound.feed(Speech(sample_rate=NATIVE), True) == b""
    assert OutputSound(AudioFormat(encoding=ENCODING_ALAW, sample_rate=8000)).feed(Speech(), True) == b""
    assert sound.samples == 0
