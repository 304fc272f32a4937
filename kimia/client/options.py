"""How an answer is made: keyword arguments as fields of the contract. What is not given, the service decides."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from kimia.errors import ParameterError
from kimia.v1.audio_pb2 import (
    ENCODING_ALAW,
    ENCODING_MULAW,
    ENCODING_PCM_F32LE,
    ENCODING_PCM_S16LE,
    AudioFormat,
    Encoding,
)
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_BOTH, OUTPUT_TYPE_TEXT, OutputType, TurnOptions

RATES = (8000, 16000, 24000, 48000)  # Hz
NATIVE_RATE = 24000  # Hz, of the model's own speech
ENCODINGS: dict[str, Encoding.ValueType] = {
    "s16le": ENCODING_PCM_S16LE,
    "f32le": ENCODING_PCM_F32LE,
    "mulaw": ENCODING_MULAW,
    "alaw": ENCODING_ALAW,
}
SAMPLE_BYTES = {"s16le": 2, "f32le": 4, "mulaw": 1, "alaw": 1}
OUTPUT_TYPES: dict[str, OutputType.ValueType] = {"text": OUTPUT_TYPE_TEXT, "both": OUTPUT_TYPE_BOTH}
TRACK_FIELDS = {  # end of upstream's argument name -> field of TrackSampling
    "temperature": "temperature",
    "top_k": "top_k",
    "repetition_penalty": "repetition_penalty",
    "repetition_window_size": "repetition_window",
}


class Options(TypedDict, total=False):
    """Keyword arguments of an answer, with the names of `kimia.pipeline`."""

    text_temperature: float
    text_top_k: int
    text_repetition_penalty: float
    text_repetition_window_size: int
    audio_temperature: float
    audio_top_k: int
    audio_repetition_penalty: float
    audio_repetition_window_size: int
    max_new_tokens: int | None  # steps of the answer, 12.5 per second of speech; -1 or None: no limit of the caller's
    seed: int | None  # repeats the turn exactly; drawn by the service when None
    preset: str  # "low-latency" (default), "upstream", or one of the service's own
    output_rate: int  # Hz of the speech: 8000, 16000, 24000 (default) or 48000
    output_encoding: str  # "s16le" (default), "f32le", "mulaw" or "alaw"


class TurnSettings(Options, total=False):
    """Keyword arguments of one turn outside a call."""

    session: str  # session to go on with or to begin
    batch: bool  # served when no interactive turn waits
    idempotency_key: str  # a second request with it follows the same turn; drawn when not given


def audio_format(encoding: str, rate: int) -> AudioFormat:
    """A format of the contract. Raises ParameterError."""
    if encoding not in ENCODINGS:
        raise ParameterError(f"the encoding must be one of {', '.join(ENCODINGS)}, got {encoding!r}")
    if rate not in RATES:
        raise ParameterError(f"the sample rate must be one of {', '.join(map(str, RATES))} Hz, got {rate!r}")
    return AudioFormat(encoding=ENCODINGS[encoding], sample_rate=rate)


def encoding_name(format: AudioFormat) -> str:
    """What an encoding is called here; empty for one that is not known."""
    return next((name for name, number in ENCODINGS.items() if number == format.encoding), "")


def turn_options(output_type: str | None, options: Mapping[str, Any]) -> TurnOptions:
    """Options of the contract; `output_type` None leaves it to the call's configuration. Raises ParameterError."""
    result = TurnOptions()
    if output_type is not None:
        result.output_type = _output_type(output_type)
    for name, value in options.items():
        if name not in Options.__annotations__:
            raise ParameterError(f"unknown option {name!r}; there are {', '.join(sorted(Options.__annotations__))}")
        if value is not None and not name.startswith("output_"):
            _set(result, name, value)
    if {"output_rate", "output_encoding"} & set(options):
        encoding, rate = options.get("output_encoding", "s16le"), options.get("output_rate", NATIVE_RATE)
        result.output_format.CopyFrom(audio_format(encoding, rate))
    return result


def _output_type(name: str) -> OutputType.ValueType:
    if name not in OUTPUT_TYPES:
        raise ParameterError(f"output_type must be 'text' or 'both' (text and speech), got {name!r}")
    return OUTPUT_TYPES[name]


def _set(result: TurnOptions, name: str, value: Any) -> None:
    """One option; ranges are the service's matter, types are checked by protobuf."""
    track, _, end = name.partition("_")
    try:
        if name == "max_new_tokens":
            if value != -1:
                result.max_new_tokens = value
        elif track in ("text", "audio"):
            setattr(getattr(result, track), TRACK_FIELDS[end], value)
        else:
            setattr(result, name, value)
    except (TypeError, ValueError) as error:
        raise ParameterError(f"{name} cannot be {value!r} ({error})") from error
