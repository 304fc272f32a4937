"""Audio files and arrays to waveforms, segments and log-mel spectrograms; every kind of bad input."""

import hashlib
import io
import math
import os
import socket
import struct
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import soxr

from kimia.errors import AudioError
from kimia.model.audio import LogMel, Resampling, load_audio, prepare_waveform, segments
from kimia.model.config import FeatureConfig
from tests.golden_data import golden, golden_json
from tests.model import recordings
from tests.model.plain_encoder import log_mel, speech_like

pytestmark = pytest.mark.unit

RATE = 16000


def encoded(samples, rate=RATE, container="WAV", subtype="PCM_16"):
    """The bytes of an audio file."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    content = io.BytesIO()
    with soundfile.SoundFile(content, "w", rate, channels, subtype, format=container) as file:
        for start in range(0, len(samples), 4096):  # libsndfile's Vorbis encoder crashes on long blocks
            file.write(samples[start : start + 4096])
    return content.getvalue()


def sha256(wave):
    return hashlib.sha256(wave.astype("<f4").tobytes()).hexdigest()


# ---- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", recordings.CASES)
def test_golden_waveform(name):
    values, arrays = recordings.expected(name)
    wave = recordings.waveform(name)
    assert (len(wave), sha256(wave)) == (values["samples_16k"], values["wav16k_sha256_f32le"])
    if "wav16k" in arrays:
        assert np.array_equal(wave, arrays["wav16k"])


def test_end_to_end_waveforms():
    for name, values in golden_json("e2e", "cases.json")["audio"].items():
        wave = load_audio(golden("e2e") / name, RATE)
        assert (len(wave), sha256(wave)) == (values["samples_16k"], values["wav16k_sha256_f32le"]), name


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("WAV", "DOUBLE", 0),
        ("WAV", "ULAW", 0.02),
        ("WAV", "ALAW", 0.02),
        ("FLAC", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.3),
        ("OGG", "OPUS", 0.4),
        ("MP3", "MPEG_LAYER_III", 0.3),
    ],
)
def test_formats(container, subtype, tolerance):
    samples = speech_like(RATE + 77)
    wave = load_audio(encoded(samples, RATE, container, subtype), RATE)
    assert (wave.dtype, wave.ndim) == (np.float32, 1)
    assert len(wave) == len(samples)
    assert np.abs(wave - samples).max() <= tolerance


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 24000, 44100, 48000, 96000, 192000, 12345])
@pytest.mark.parametrize("samples", [1, 2, 441, 70001])
def test_resampling_in_blocks_equals_one_piece(rate, samples):
    stereo = np.stack([speech_like(samples), speech_like(samples, seed=1)], 1)
    wave = load_audio(encoded(stereo, rate, subtype="FLOAT"), RATE)
    plain = soxr.resample(stereo.mean(1), rate, RATE, quality="HQ")
    assert len(wave) == math.ceil(samples * RATE / rate)
    assert np.array_equal(wave[: len(plain)], plain[: len(wave)])
    assert not wave[len(plain) :].any()


def test_downmix_is_the_mean_of_all_channels_before_resampling():
    channels = np.stack([speech_like(50000, seed) for seed in range(5)], 1)
    wave = load_audio(encoded(channels, 44100, subtype="FLOAT"), RATE)
    assert np.array_equal(wave, prepare_waveform(channels.mean(1, dtype=np.float32), 44100, RATE))


def test_sources_agree(tmp_path):
    content = encoded(speech_like(5000), 8000)
    path = tmp_path / "call.raw"  # the ending must not matter
    path.write_bytes(content)
    waves = [load_audio(source, RATE) for source in (path, str(path), content, io.BytesIO(content))]
    with path.open("rb") as stream:
        waves.append(load_audio(stream, RATE))
    assert all(np.array_equal(wave, waves[0]) for wave in waves)


@pytest.mark.parametrize(("dtype", "scale"), [("int16", 2**15), ("int32", 2**31), ("float64", 1), ("float32", 1)])
def test_arrays_are_scaled_by_type(dtype, scale):
    samples = np.array([[0.5, 0.25], [-1.0, 0.5]]) * scale
    wave = prepare_waveform(samples.astype(dtype), RATE, RATE)
    assert wave.dtype == np.float32
    assert wave.tolist() == [0.375, -0.25]


def test_one_sample_is_audio():
    assert load_audio(encoded(np.array([0.5], np.float32)), RATE).tolist() == [0.5]
    assert len(prepare_waveform(np.array([0.5]), 48000, RATE)) == 1


def test_limit_counts_exactly():
    samples = speech_like(RATE)
    assert len(load_audio(encoded(samples), RATE, max_seconds=1.0)) == RATE
    with pytest.raises(AudioError, match=r"limit of 0\.99"):
        load_audio(encoded(samples), RATE, max_seconds=0.99)


def test_two_hours_are_refused_by_the_header(tmp_path, monkeypatch):
    path = tmp_path / "long.wav"
    size = 2 * 3600 * 8000
    with path.open("wb") as file:
        file.write(
            b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 8000, 1, 8)
        )
        file.write(b"data" + struct.pack("<I", size))
        file.truncate(size + 44)  # a sparse file
    monkeypatch.setattr(soundfile.SoundFile, "read", None)  # must not be called
    with pytest.raises(AudioError, match=r"limit of 3600 s.*7200"):
        load_audio(path, RATE)


def test_a_header_may_promise_more_than_follows():
    content = bytearray(encoded(speech_like(4000)))
    at = content.index(b"data") + 4
    content[at : at + 4] = struct.pack("<I", 0xFFFFFFFF)  # what a program writes that streams
    assert len(load_audio(bytes(content), RATE)) == 4000


# ---- what is refused ---------------------------------------------------------------------------------------------


WAV = encoded(speech_like(3000))


def with_bytes(content, at, new):
    return content[:at] + new + content[at + len(new) :]


def unknown_length_flac():
    content = bytearray(encoded(speech_like(3000), container="FLAC"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)  # the total number of samples: unknown
    return bytes(content)


BAD_CONTENT = {
    "empty": (b"", "empty"),
    "no frames": (encoded(np.zeros(0, np.float32)), "no samples"),
    "truncated header": (WAV[:20], "can be decoded"),
    "header only": (WAV[:36], "can be decoded"),
    "text": (b"hello, this is no audio at all\n" * 20, "can be decoded"),
    "no channels": (with_bytes(WAV, 22, b"\0\0"), "Channel count is zero"),
    "rate too low": (with_bytes(WAV, 24, struct.pack("<I", 7999)), "7999 Hz"),
    "rate too high": (with_bytes(WAV, 24, struct.pack("<I", 192001)), "192001 Hz"),
    "NaN": (encoded(np.array([0.1, np.nan], np.float32), subtype="FLOAT"), "NaN"),
    "infinite": (encoded(np.array([0.1, -np.inf], np.float32), subtype="FLOAT"), "infinite"),
    "overflowing": (encoded(np.array([0.1, 1e30], np.float32), subtype="FLOAT"), "large"),
    "cut FLAC": (encoded(speech_like(30000), container="FLAC")[:20000], "damaged"),
    "FLAC of unknown length": (unknown_length_flac(), "no length"),
}


@pytest.mark.parametrize("kind", BAD_CONTENT)
def test_bad_content(kind, tmp_path):
    content, message = BAD_CONTENT[kind]
    path = tmp_path / "bad.wav"
    path.write_bytes(content)
    for source in (content, path):
        with pytest.raises(AudioError, match=message):
            load_audio(source, RATE)


def test_bad_sources(tmp_path):
    text = io.StringIO("text")
    for source, message in [
        (tmp_path / "missing.wav", r"missing\.wav: cannot be opened \(No such file"),
        (tmp_path, "directory"),
        ("null\0character", "cannot be opened"),
        (text, "binary stream, got StringIO"),
        (7, "got int"),
        (None, "got NoneType"),
    ]:
        with pytest.raises(AudioError, match=message):
            load_audio(source, RATE)


def test_only_regular_files_are_opened(tmp_path, monkeypatch):
    """A pipe without a writer would be waited for; one with a writer cannot be searched."""
    monkeypatch.chdir(tmp_path)  # a socket's name must be short
    os.mkfifo("fifo.wav")
    unread, written = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener, os.fdopen(unread, "rb"), os.fdopen(written, "wb") as writer:
        listener.bind("socket")
        writer.write(WAV[:1000])
        writer.flush()
        for path in ("fifo.wav", "socket", "/dev/zero", f"/dev/fd/{unread}"):
            with pytest.raises(AudioError, match="is not a regular file; write it to a file first"):
                load_audio(path, RATE)


def test_streams_must_seek():
    unread, written = os.pipe()
    os.close(written)
    with os.fdopen(unread, "rb") as stream, pytest.raises(AudioError, match="cannot seek"):
        load_audio(stream, RATE)


class Minimal:
    """A stream that does not say whether it can seek."""

    def __init__(self, content):
        stream = io.BytesIO(content)
        self.read, self.seek, self.tell = stream.read, stream.seek, stream.tell


def test_a_stream_need_not_say_that_it_seeks():
    assert np.array_equal(load_audio(Minimal(WAV), RATE), load_audio(WAV, RATE))


def test_links_to_files_are_followed(tmp_path):
    (tmp_path / "a.wav").write_bytes(WAV)
    (tmp_path / "link").symlink_to(tmp_path / "a.wav")
    assert np.array_equal(load_audio(tmp_path / "link", RATE), load_audio(WAV, RATE))


GOOD = np.zeros(100, np.float32)


@pytest.mark.parametrize(
    ("samples", "rate", "message"),
    [
        ([0.0, 0.1], RATE, "NumPy array.*got list"),
        (np.zeros((2, 2, 2)), RATE, "shape"),
        (np.zeros(()), RATE, "shape"),
        (np.zeros(0), RATE, "no samples"),
        (np.zeros((0, 2)), RATE, "no samples"),
        (np.zeros((5, 0)), RATE, "0 channels"),
        (np.zeros((2, 48000)), RATE, "transpose"),
        (np.zeros(5, np.complex64), RATE, "complex64"),
        (np.zeros(5, np.uint8), RATE, "uint8"),
        (np.zeros(5, object), RATE, "object"),
        (np.array(["a"]), RATE, "<U1"),
        (np.array([np.nan]), RATE, "NaN"),
        (np.array([0.0, np.inf]), 8000, "NaN"),
        (GOOD, 7999, "7999 Hz"),
        (GOOD, 192001, "192001 Hz"),
        (GOOD, 16000.0, "whole number"),
        (GOOD, True, "whole number"),
        (np.broadcast_to(np.float32(0), 3600 * 8000 + 1), 8000, "limit of 3600 s"),
    ],
)
def test_bad_arrays(samples, rate, message):
    with pytest.raises(AudioError, match=message):
        prepare_waveform(samples, rate, RATE)


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("size", [1, 333, 100_000])
def test_sound_that_comes_in_blocks_is_resampled_as_a_whole(rate, size):
    samples = speech_like(3000 if size == 1 else 30_001)
    resampling = Resampling(rate, RATE)
    pieces = [resampling.feed(samples[at : at + size, None]) for at in range(0, len(samples), size)]
    assert np.array_equal(np.concatenate([*pieces, resampling.finish()]), prepare_waveform(samples, rate, RATE))


def test_blocks_are_checked_as_they_come():
    with pytest.raises(AudioError, match="7999 Hz"):
        Resampling(7999, RATE)
    with pytest.raises(AudioError, match="no samples"):
        Resampling(8000, RATE).finish()
    with pytest.raises(AudioError, match="limit of 1 s"):
        Resampling(8000, RATE, max_seconds=1).feed(np.zeros((8001, 1), np.float32))
    with pytest.raises(AudioError, match="NaN"):
        Resampling(8000, RATE).feed(np.full((1, 1), np.nan, np.float32))


# ---- segments and mel --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("samples", "lengths"), [(1, [1]), (10, [10]), (11, [10, 1]), (30, [10, 10, 10])])
def test_segments_follow_each_other(samples, lengths):
    wave = np.arange(samples, dtype=np.float32)
    pieces = segments(wave, 10)
    assert [len(piece) for piece in pieces] == lengths
    assert np.array_equal(np.concatenate(pieces), wave)


@pytest.mark.parametrize("wave", [np.zeros(0, np.float32), np.zeros((5, 1), np.float32), np.zeros(5), [0.0]])
def test_segments_take_waveforms_only(wave):
    with pytest.raises(AudioError):
        segments(wave, 10)


@pytest.mark.parametrize(
    "config",
    [FeatureConfig(128, 160, 400, 16000, 480000), FeatureConfig(40, 100, 256, 8000, 16000)],
    ids=["release", "other"],
)
@pytest.mark.parametrize("samples", [1, 700, 12801])
def test_log_mel_follows_its_definition(config, samples):
    padded = -(-samples // 1600) * 1600
    mel = LogMel(config)
    segment = speech_like(samples)
    plain = log_mel(segment, padded, mel.bank, config.n_fft, config.hop)
    assert plain.shape == (config.mel_bins, padded // config.hop)
    np.testing.assert_allclose(mel(segment, padded), plain, atol=1e-6)


@pytest.mark.parametrize("padded", [17 * 1280, 480000])
def test_log_mel_agrees_with_transformers(padded):
    from transformers.models.whisper.feature_extraction_whisper import WhisperFeatureExtractor

    segment = speech_like(17 * 1280 - 300)
    extractor = WhisperFeatureExtractor(feature_size=128)
    theirs = extractor(segment, sampling_rate=RATE, padding="max_length", max_length=padded)["input_features"][0]
    ours = LogMel(FeatureConfig(128, 160, 400, RATE, 480000))(segment, padded)
    np.testing.assert_allclose(ours, theirs, atol=5e-5)


def test_silence_is_constant():
    mel = LogMel(FeatureConfig(128, 160, 400, RATE, 480000))(np.zeros(1000, np.float32), 1280)
    assert (mel == -1.5).all()


def test_import_is_light():
    code = "import sys, kimia.model.audio; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_segments_keep_every_sample_in_order():
    wave = np.arange(25, dtype=np.float32)
    pieces = segments(wave, 10)
    assert [len(piece) for piece in pieces] == [10, 10, 5]
    assert np.array_equal(np.concatenate(pieces), wave)
    assert [len(piece) for piece in segments(wave[:20], 10)] == [10, 10]
