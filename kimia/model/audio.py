"""Audio in: files and arrays as mono float32 waveforms, cut into segments, turned into log-mel spectrograms.

One loader serves both encoders. It gives the samples that the release's tools give (libsndfile, mean of the channels,
soxr "HQ", length rounded up), but block by block, so that memory is bounded by the result. A file over the time limit
is refused by its header, before anything is decoded; no more is ever read than the header promises. There is no
loudness normalisation, silence trimming or dithering.
"""

from __future__ import annotations

import io
import math
import stat
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import soxr

from kimia.errors import AudioError
from kimia.model.config import FeatureConfig

MIN_RATE, MAX_RATE = 8_000, 192_000  # Hz: telephony to studio
MAX_CHANNELS = 1024  # libsndfile's own bound
MAX_SECONDS = 3600.0  # an hour of features is about 1 GB in float32
MAX_AMPLITUDE = 2.0**31  # far above full scale (1.0), far below where the power spectrum overflows float32
UNKNOWN_FRAMES = 2**63 - 1  # what libsndfile says of a header without a length (piped FLAC)
BLOCK_FRAMES = 1 << 16
MEL_FLOOR = 1e-10  # power
BATCH_SEGMENTS = 16  # segments that an encoder takes at once
INTEGER_SCALE = {"int16": 2.0**15, "int32": 2.0**31}  # full scale of PCM arrays

AudioSource = str | Path | bytes | BinaryIO


# ---- files and arrays to waveforms ------------------------------------------------------------------------------


def load_audio(source: AudioSource, rate: int, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Decode a file (path, content or binary stream) to mono float32 samples (N,) at `rate` Hz, N >= 1.

    Formats are libsndfile's: WAV (PCM, float, mu-law, A-law), FLAC, OGG (Vorbis, Opus), MP3 and others; 8 to 192 kHz,
    any number of channels. Raises AudioError when the source is missing, empty, not audio, not finite or longer
    than `max_seconds`.
    """
    with _opened(source) as (file, name):
        _check_rate(file.samplerate, name)
        if file.frames == UNKNOWN_FRAMES:
            raise AudioError(f"{name}: its header gives no length (written to a pipe?); write it to a file once more")
        _check_seconds(file.frames, file.samplerate, max_seconds, name)
        return _resampled(_decoded(file, name), file.samplerate, rate, name)


def prepare_waveform(samples: np.ndarray, sample_rate: int, rate: int, max_seconds: float = MAX_SECONDS) -> np.ndarray:
    """Mono float32 samples (N,) at `rate` Hz from an array (N,) or (N, C) at `sample_rate` Hz.

    Floats have full scale 1.0; int16 and int32 arrays are scaled to it. Raises AudioError as `load_audio` does, and
    for other types and shapes.
    """
    name = "the array"
    if not isinstance(samples, np.ndarray) or samples.ndim not in (1, 2):
        raise AudioError(
            f"samples must be a NumPy array of shape (samples,) or (samples, channels), got {_kind(samples)}"
        )
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, (int, np.integer)):
        raise AudioError(f"the sample rate must be a whole number of Hz, got {sample_rate!r}")
    _check_rate(int(sample_rate), name)
    frames = samples[:, None] if samples.ndim == 1 else samples  # (N, C)
    _check_channels(frames.shape[1])
    _check_seconds(len(frames), int(sample_rate), max_seconds, name)
    blocks = (_scaled(frames[start : start + BLOCK_FRAMES]) for start in range(0, len(frames), BLOCK_FRAMES))
    return _resampled(blocks, int(sample_rate), rate, name)


@contextmanager
def _opened(source: AudioSource) -> Iterator[tuple[soundfile.SoundFile, str]]:
    """The open sound file and how to call it in messages."""
    with ExitStack() as stack:
        if isinstance(source, (str, Path)):
            name, stream = str(source), stack.enter_context(_open_path(source))
        else:
            name, stream = "the audio data", io.BytesIO(source) if isinstance(source, bytes) else source
        yield stack.enter_context(_sound_file(stream, name)), name


def _open_path(path: str | Path) -> BinaryIO:
    """Only a regular file is opened: a pipe cannot be searched, and opening one waits until somebody writes to it."""
    try:
        mode = Path(path).stat().st_mode
        if stat.S_ISREG(mode) or stat.S_ISDIR(mode):  # a directory gives the error that says so
            return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise AudioError(f"{path}: cannot be opened ({getattr(error, 'strerror', None) or error})") from error
    raise AudioError(f"{path}: is not a regular file; write it to a file first")


def _sound_file(stream: BinaryIO, name: str) -> soundfile.SoundFile:
    _check_stream(stream)
    start = stream.tell()
    if stream.seek(0, io.SEEK_END) == start:
        raise AudioError(f"{name}: is empty (0 bytes)")
    stream.seek(start)
    try:
        return soundfile.SoundFile(_Unnamed(stream))
    except soundfile.LibsndfileError as error:
        raise AudioError(
            f"{name}: is not audio that can be decoded ({error.error_string.rstrip('.')}); use WAV, FLAC, OGG or MP3"
        ) from error


def _check_stream(stream: object) -> None:
    if isinstance(stream, io.TextIOBase) or not all(hasattr(stream, name) for name in ("seek", "read", "tell")):
        raise AudioError(f"an audio source is a path, bytes or a seekable binary stream, got {_kind(stream)}")
    if hasattr(stream, "seekable") and not stream.seekable():
        raise AudioError("the audio data come from a stream that cannot seek (a pipe?); read it and pass its bytes")


class _Unnamed:
    """A stream without its name, so that the content alone decides the format (soundfile trusts endings like .raw)."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.read, self.tell = stream.seek, stream.read, stream.tell


def _decoded(file: soundfile.SoundFile, name: str) -> Iterator[np.ndarray]:
    """Blocks (n, C) up to the end of the data, never beyond the frames that the header promises."""
    while True:
        try:
            block = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(f"{name}: the data are damaged ({error.error_string.rstrip('.')})") from error
        if not len(block):
            return
        yield block


class Resampling:
    """Sound that comes block by block, as mono samples at `rate` Hz: bit-equal to resampling it at once."""

    def __init__(self, sample_rate: int, rate: int, name: str = "the sound", max_seconds: float = MAX_SECONDS) -> None:
        """Raises AudioError for a rate that no sound has; `name` is what later errors call the sound."""
        _check_rate(sample_rate, name)
        self._rates = sample_rate, rate
        self._name = name
        self._max_seconds = max_seconds
        self._stream = (
            None if sample_rate == rate else soxr.ResampleStream(sample_rate, rate, 1, "float32", quality="HQ")
        )
        self._read = 0  # samples taken
        self._given = 0

    def feed(self, block: np.ndarray) -> np.ndarray:
        """The next samples (M,) float32 that a block (N, C) of full scale 1.0 completes. Raises AudioError."""
        mono = _downmixed(block, self._name)
        self._read += len(mono)
        _check_seconds(self._read, self._rates[0], self._max_seconds, self._name)
        wave = mono if self._stream is None else self._stream.resample_chunk(mono)
        self._given += len(wave)
        return wave

    def finish(self) -> np.ndarray:
        """The last samples: ceil(N * rate / sample_rate) in all. Raises AudioError when there were none."""
        if not self._read:
            raise AudioError(f"{self._name}: holds no samples (cut off, or never finished by its writer?)")
        empty = np.zeros(0, np.float32)
        rest = empty if self._stream is None else self._stream.resample_chunk(empty, last=True)
        length = -(-self._read * self._rates[1] // self._rates[0]) - self._given
        return np.pad(rest[:length], (0, max(0, length - len(rest))))


def _resampled(blocks: Iterable[np.ndarray], sample_rate: int, rate: int, name: str) -> np.ndarray:
    """Downmix and resample a stream of blocks (n, C); its length is checked where it is known before."""
    resampling = Resampling(sample_rate, rate, name, math.inf)
    pieces = [resampling.feed(block) for block in blocks]
    return np.concatenate([*pieces, resampling.finish()])


def _downmixed(block: np.ndarray, name: str) -> np.ndarray:
    one = block.shape[1] == 1 and block.dtype == np.float32  # its mean is itself
    mono: np.ndarray = block[:, 0] if one else block.mean(axis=1, dtype=np.float32)
    if not (mono.max(initial=0.0) < MAX_AMPLITUDE and mono.min(initial=0.0) > -MAX_AMPLITUDE):  # NaN compares false
        raise AudioError(f"{name}: holds NaN, infinite or absurdly large samples; full scale is 1.0")
    return mono


def _scaled(block: np.ndarray) -> np.ndarray:
    if block.dtype.kind != "f" and block.dtype.name not in INTEGER_SCALE:
        raise AudioError(f"samples must be floating point, int16 or int32, got {block.dtype}")
    return (block / INTEGER_SCALE.get(block.dtype.name, 1.0)).astype(np.float32)


def _check_rate(sample_rate: int, name: str) -> None:
    if not MIN_RATE <= sample_rate <= MAX_RATE:
        raise AudioError(f"{name}: sample rate {sample_rate} Hz lies outside {MIN_RATE} to {MAX_RATE} Hz; resample it")


def _check_seconds(frames: int, sample_rate: int, max_seconds: float, name: str) -> None:
    if frames > max_seconds * sample_rate:
        raise AudioError(
            f"{name}: longer than the limit of {max_seconds:g} s (at least {frames / sample_rate:.1f} s); cut it"
        )


def _check_channels(channels: int) -> None:
    if not 1 <= channels <= MAX_CHANNELS:
        raise AudioError(f"{channels} channels; an array is laid out (samples, channels): transpose it?")


def _kind(value: object) -> str:
    return f"an array of shape {value.shape}" if isinstance(value, np.ndarray) else type(value).__name__


# ---- waveforms to log-mel spectrograms --------------------------------------------------------------------------


def segments(wave: np.ndarray, segment_samples: int) -> list[np.ndarray]:
    """Cut a waveform (N,) into consecutive pieces without overlap; all but the last have `segment_samples`."""
    if not isinstance(wave, np.ndarray) or wave.ndim != 1 or wave.dtype != np.float32:
        raise AudioError(f"a waveform is a float32 array (samples,), got {_kind(wave)}; see prepare_waveform")
    if not len(wave):
        raise AudioError("the waveform holds no samples")
    return [wave[start : start + segment_samples] for start in range(0, len(wave), segment_samples)]


@dataclass(frozen=True, eq=False)
class Segment:
    """What an encoder reads at once, independent of all else."""

    samples: np.ndarray  # (S,) float32
    whole: bool  # the whole waveform; else one of several segments, the last of which is padded like the others


def cut(wave: np.ndarray, segment_samples: int) -> list[Segment]:
    """The segments of a waveform (N,). Raises AudioError as `segments` does."""
    pieces = segments(wave, segment_samples)
    return [Segment(piece, whole=len(pieces) == 1) for piece in pieces]


class LogMel:
    """Whisper's log-mel spectrogram: log10 of the mel power, floored at 8 below its maximum, then (x + 4) / 4.

    The maximum is that of the whole segment, its padding included. Computed in float64: a cell far below the maximum
    keeps little of a float32 Fourier transform (up to 5e-5 apart between processors, amplified by the logarithm).
    """

    def __init__(self, config: FeatureConfig) -> None:
        self.config = config
        self.bank = _mel_bank(config)  # (n_fft / 2 + 1, M)
        self.window = np.hanning(config.n_fft + 1)[:-1]  # periodic

    def __call__(self, segment: np.ndarray, padded: int) -> np.ndarray:
        """Spectrogram (M, padded / hop), float32, of a segment (S,) followed by zeros up to `padded` samples.

        `padded` is a multiple of the hop, at least S and more than n_fft / 2.
        """
        n_fft, hop = self.config.n_fft, self.config.hop
        signal = np.pad(segment.astype(np.float64), (0, padded - len(segment)))
        signal = np.pad(signal, n_fft // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(signal, n_fft)[:-1:hop]  # (T, n_fft), the last one dropped
        power = np.abs(np.fft.rfft(frames * self.window)) ** 2  # (T, n_fft / 2 + 1)
        log_mel = np.log10(np.maximum(power @ self.bank, MEL_FLOOR)).T  # (M, T)
        return ((np.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0).astype(np.float32)


def _mel_bank(config: FeatureConfig) -> np.ndarray:
    """Slaney-scaled, area-normalised mel filters up to 8 kHz whatever the sample rate, as in the release."""
    from transformers.audio_utils import mel_filter_bank

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of filters that are empty at low rates: the release's bank too
        return mel_filter_bank(
            num_frequency_bins=config.n_fft // 2 + 1,
            num_mel_filters=config.mel_bins,
            min_frequency=0.0,
            max_frequency=8000.0,
            sampling_rate=config.sample_rate,
            norm="slaney",
            mel_scale="slaney",
        )
