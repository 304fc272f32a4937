"""Samples on the wire: bytes in a caller's format to float32 samples and back, without torch.

G.711 is worked out here, as ITU-T recommends it: sign, three bits of segment, four bits of step. Levels are given at 16
bits, so that 1.0 is the full scale of every format. A whole file (ENCODING_FILE) is decoded by `kimia.model.audio`.
"""

from __future__ import annotations

import numpy as np

from kimia.errors import AudioError, RequestError
from kimia.v1.audio_pb2 import (
    ENCODING_ALAW,
    ENCODING_FILE,
    ENCODING_MULAW,
    ENCODING_PCM_F32LE,
    ENCODING_PCM_S16LE,
    AudioFormat,
    Encoding,
)

RATES = (8_000, 16_000, 24_000, 48_000)  # Hz
FULL_SCALE = 32768.0  # of 16-bit samples
SAMPLE_BYTES = {ENCODING_PCM_S16LE: 2, ENCODING_PCM_F32LE: 4, ENCODING_MULAW: 1, ENCODING_ALAW: 1}
NAMES = {
    ENCODING_PCM_S16LE: "PCM_S16LE",
    ENCODING_PCM_F32LE: "PCM_F32LE",
    ENCODING_MULAW: "MULAW",
    ENCODING_ALAW: "ALAW",
    ENCODING_FILE: "FILE",
}


# ---- formats ----------------------------------------------------------------------------------------------------


def check_format(format: AudioFormat, field: str, *, files: bool = False) -> None:
    """Raise RequestError, naming what is wrong below `field`, unless sound can be given in this format.

    Whole files are refused but where `files` says otherwise; they bring their own rate.
    """
    known = [name for number, name in NAMES.items() if files or number != ENCODING_FILE]
    if NAMES.get(format.encoding) not in known:
        given = NAMES.get(format.encoding, f"number {format.encoding}" if format.encoding else "nothing")
        raise RequestError(f"must be one of {', '.join(known)} here, got {given}", field=f"{field}.encoding")
    if format.encoding == ENCODING_FILE:
        if format.sample_rate:
            raise RequestError("is left out for a file, whose header says it", field=f"{field}.sample_rate")
    elif format.sample_rate not in RATES:
        rates = ", ".join(map(str, RATES))
        raise RequestError(f"must be one of {rates} Hz, got {format.sample_rate}", field=f"{field}.sample_rate")


def bytes_per_sample(encoding: Encoding.ValueType) -> int:
    """Bytes of one sample. Raises RequestError for an encoding without samples of one size (a file)."""
    if encoding not in SAMPLE_BYTES:
        names = ", ".join(NAMES[number] for number in SAMPLE_BYTES)
        raise RequestError(f"samples of one size have {names}; got {NAMES.get(encoding, encoding)}", field="encoding")
    return SAMPLE_BYTES[encoding]


# ---- bytes to samples and back ----------------------------------------------------------------------------------


def decode(data: bytes | bytearray | memoryview, format: AudioFormat) -> np.ndarray:
    """Samples (S,) float32 at the format's rate, full scale 1.0. Theirs is the only memory taken; `data` is not kept.

    Raises AudioError when the bytes are no whole number of samples, RequestError for a file.
    """
    size = bytes_per_sample(format.encoding)
    if len(data) % size:
        raise AudioError(
            f"{len(data)} bytes are no whole number of {NAMES[format.encoding]} samples ({size} bytes each)"
        )
    if format.encoding == ENCODING_PCM_S16LE:
        return _scaled(np.frombuffer(data, "<i2"))
    if format.encoding == ENCODING_PCM_F32LE:
        return np.frombuffer(data, "<f4").astype(np.float32)
    levels = MULAW_LEVELS if format.encoding == ENCODING_MULAW else ALAW_LEVELS
    return _scaled(levels[np.frombuffer(data, np.uint8)])


def _scaled(words: np.ndarray) -> np.ndarray:
    """16-bit words (S,) as float32 of full scale 1.0, in one pass: a power of two scales without rounding."""
    samples: np.ndarray = np.multiply(words, np.float32(1 / FULL_SCALE), dtype=np.float32)
    return samples


def encode(samples: np.ndarray, format: AudioFormat) -> bytes:
    """Bytes of samples (S,) float32, full scale 1.0; what lies beyond is clipped, but in floats kept.

    Raises RequestError for a file.
    """
    bytes_per_sample(format.encoding)
    if format.encoding == ENCODING_PCM_F32LE:
        return samples.astype("<f4").tobytes()
    words = to_s16(samples)
    if format.encoding == ENCODING_PCM_S16LE:
        return words.tobytes()
    codes = MULAW_CODES if format.encoding == ENCODING_MULAW else ALAW_CODES
    data: bytes = codes[words.view("<u2")].tobytes()
    return data


def to_s16(samples: np.ndarray) -> np.ndarray:
    """Samples (S,) of full scale 1.0 as signed 16-bit little-endian words: nearest, halves to even, clipped."""
    scaled = samples * FULL_SCALE
    np.rint(scaled, out=scaled)
    np.clip(scaled, -FULL_SCALE, FULL_SCALE - 1, out=scaled)
    words: np.ndarray = scaled.astype("<i2")
    return words


# ---- G.711 ------------------------------------------------------------------------------------------------------


def _mulaw_levels() -> np.ndarray:
    """16-bit level of each of the 256 codes; all bits are sent inverted."""
    code = ~np.arange(256) & 0xFF
    segment, step = code >> 4 & 7, code & 15
    magnitude = ((2 * step + 33) << segment + 2) - 132
    return np.where(code & 0x80, -magnitude, magnitude).astype(np.int16)


def _alaw_levels() -> np.ndarray:
    """16-bit level of each of the 256 codes; every second bit is sent inverted, a set sign bit means positive."""
    code = np.arange(256) ^ 0x55
    segment, step = code >> 4 & 7, code & 15
    magnitude = np.where(segment, (2 * step + 33) << np.maximum(segment, 1) + 2, (2 * step + 1) << 3)
    return np.where(code & 0x80, magnitude, -magnitude).astype(np.int16)


MULAW_LEVELS = _mulaw_levels()  # (256,)
ALAW_LEVELS = _alaw_levels()  # (256,)


# Magnitudes from which on the next of the 128 codes of a sign is taken, (127,): the standard's decision values.
_PLACE = np.arange(1, 128)
_SEGMENT, _STEP = _PLACE >> 4, _PLACE & 15
_MULAW_DECISIONS = ((_STEP + 16) << _SEGMENT + 3) - 132
_ALAW_DECISIONS = np.where(_SEGMENT, (_STEP + 16) << np.maximum(_SEGMENT, 1) + 3, _STEP << 4)


def _mulaw(words: np.ndarray) -> np.ndarray:
    """Codes (S,) uint8 of 16-bit words (S,); zero counts as positive."""
    place = np.searchsorted(_MULAW_DECISIONS, np.abs(words.astype(np.int32)), side="right")
    return (~np.where(words < 0, place | 0x80, place) & 0xFF).astype(np.uint8)


def _alaw(words: np.ndarray) -> np.ndarray:
    """Codes (S,) uint8 of 16-bit words (S,); zero counts as positive."""
    place = np.searchsorted(_ALAW_DECISIONS, np.abs(words.astype(np.int32)), side="right")
    return (np.where(words < 0, place, place | 0x80) ^ 0x55).astype(np.uint8)


_WORDS = np.arange(1 << 16, dtype="<u2").view("<i2")  # every 16-bit word, in the order of its bits
MULAW_CODES = _mulaw(_WORDS)  # (65536,)
ALAW_CODES = _alaw(_WORDS)  # (65536,)
