"""Samples on the wire: G.711 by the standard's values and by libsndfile, PCM both ways, and what is refused."""

import io

import numpy as np
import pytest
import soundfile

from kimia.errors import AudioError, RequestError
from kimia.sound import ALAW_LEVELS, MULAW_LEVELS, bytes_per_sample, check_format, decode, encode, to_s16
from kimia.v1.audio_pb2 import (
    ENCODING_ALAW,
    ENCODING_FILE,
    ENCODING_MULAW,
    ENCODING_PCM_F32LE,
    ENCODING_PCM_S16LE,
    ENCODING_UNSPECIFIED,
    AudioFormat,
)

pytestmark = pytest.mark.unit

LAWS = {ENCODING_MULAW: "ULAW", ENCODING_ALAW: "ALAW"}
WORDS = np.arange(-32768, 32768).astype(np.int16)  # every 16-bit sample


def of(encoding: int, rate: int = 8000) -> AudioFormat:
    return AudioFormat(encoding=encoding, sample_rate=rate)


# ---- G.711 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "level"),
    [(0xFF, 0), (0x7F, 0), (0xFE, 2), (0x7E, -2), (0xEF, 33), (0x80, 8031), (0x00, -8031), (0xA0, 1983), (0x8F, 4191)],
)
def test_mulaw_levels_of_table_2_of_the_standard(code: int, level: int) -> None:
    """G.711's table counts in 14 bits."""
    assert MULAW_LEVELS[code] == 4 * level


@pytest.mark.parametrize(
    ("code", "level"), [(0xD5, 1), (0x55, -1), (0xD4, 3), (0xC5, 33), (0xAA, 4032), (0x2A, -4032), (0x80, 688)]
)
def test_alaw_levels_of_table_1_of_the_standard(code: int, level: int) -> None:
    """G.711's table counts in 13 bits."""
    assert ALAW_LEVELS[code] == 8 * level


@pytest.mark.parametrize("encoding", LAWS)
def test_every_code_comes_back(encoding: int) -> None:
    codes = bytes(range(256))
    again = encode(decode(codes, of(encoding)), of(encoding))
    negative_zero = {0x7F: 0xFF} if encoding == ENCODING_MULAW else {}  # mu-law has two zeros, 16 bits have one
    assert list(again) == [negative_zero.get(code, code) for code in codes]


@pytest.mark.parametrize(("encoding", "name"), LAWS.items())
def test_every_sample_is_decoded_and_encoded_as_by_libsndfile(encoding: int, name: str) -> None:
    file = io.BytesIO()
    soundfile.write(file, WORDS, 8000, format="RAW", subtype=name)
    written = file.getvalue()
    assert encode(WORDS / np.float32(32768), of(encoding)) == written
    file.seek(0)
    read, _ = soundfile.read(file, dtype="float32", samplerate=8000, channels=1, format="RAW", subtype=name)
    assert np.array_equal(decode(written, of(encoding)), read)


@pytest.mark.parametrize(
    ("encoding", "level", "below", "above"),
    [
        (ENCODING_MULAW, 4 * 4063, 0x90, 0x8F),
        (ENCODING_MULAW, 4 * 31, 0xF0, 0xEF),
        (ENCODING_ALAW, 8 * 2048, 0xBA, 0xA5),
    ],
)
def test_the_standards_decision_values(encoding: int, level: int, below: int, above: int) -> None:
    """A segment begins where its steps do, which is not midway between two levels."""
    words = np.array([level - 1, level], np.float32) / np.float32(32768)
    assert list(encode(words, of(encoding))) == [below, above]


# ---- PCM --------------------------------------------------------------------------------------------------------


def test_all_16_bit_samples_come_back() -> None:
    data = WORDS.astype("<i2").tobytes()
    samples = decode(data, of(ENCODING_PCM_S16LE))
    assert samples.dtype == np.float32
    assert (samples.min(), samples.max()) == (-1.0, 32767 / 32768)
    assert encode(samples, of(ENCODING_PCM_S16LE)) == data


def test_floats_come_back_as_they_are() -> None:
    samples = np.array([0.0, 1e-9, -1.5, 0.25], np.float32)
    assert np.array_equal(decode(encode(samples, of(ENCODING_PCM_F32LE)), of(ENCODING_PCM_F32LE)), samples)


def test_words_are_nearest_and_clipped() -> None:
    samples = np.array([0.4, 0.5, 1.5, -0.6, 40000, -40000], np.float32) / np.float32(32768)
    assert to_s16(samples).tolist() == [0, 0, 2, -1, 32767, -32768]


@pytest.mark.parametrize("encoding", [ENCODING_PCM_S16LE, ENCODING_PCM_F32LE, *LAWS])
def test_nothing_is_nothing(encoding: int) -> None:
    assert decode(b"", of(encoding)).shape == (0,)
    assert encode(np.zeros(0, np.float32), of(encoding)) == b""


@pytest.mark.parametrize(("encoding", "size"), [(ENCODING_PCM_S16LE, 3), (ENCODING_PCM_F32LE, 6)])
def test_half_a_sample_is_refused(encoding: int, size: int) -> None:
    with pytest.raises(AudioError, match=f"{size} bytes"):
        decode(bytes(size), of(encoding))


# ---- formats ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8000, 16000, 24000, 48000])
@pytest.mark.parametrize("encoding", [ENCODING_PCM_S16LE, ENCODING_PCM_F32LE, *LAWS])
def test_formats_of_the_contract(encoding: int, rate: int) -> None:
    check_format(of(encoding, rate), "input_format")


@pytest.mark.parametrize(
    ("format", "field"),
    [
        (of(ENCODING_UNSPECIFIED), "f.encoding"),
        (of(ENCODING_FILE, 0), "f.encoding"),
        (of(99), "f.encoding"),
        (of(ENCODING_MULAW, 0), "f.sample_rate"),
        (of(ENCODING_PCM_S16LE, 44100), "f.sample_rate"),
    ],
    ids=["unset", "file", "unknown", "no rate", "44.1 kHz"],
)
def test_other_formats_are_refused_by_their_field(format: AudioFormat, field: str) -> None:
    with pytest.raises(RequestError) as caught:
        check_format(format, "f")
    assert caught.value.field == field


def test_files_are_for_those_who_take_them() -> None:
    check_format(of(ENCODING_FILE, 0), "f", files=True)
    with pytest.raises(RequestError, match="header"):
        check_format(of(ENCODING_FILE, 16000), "f", files=True)


def test_a_file_has_no_samples_of_one_size() -> None:
    assert bytes_per_sample(ENCODING_PCM_F32LE) == 4
    for refused in (lambda: bytes_per_sample(ENCODING_FILE), lambda: decode(b"RIFF", of(ENCODING_FILE))):
        with pytest.raises(RequestError, match="FILE"):
            refused()
