"""Keyword arguments of an answer as options of the contract."""

import pytest

from kimia.client.options import (
    ENCODINGS,
    RATES,
    SAMPLE_BYTES,
    TRACK_FIELDS,
    Options,
    audio_format,
    encoding_name,
    turn_options,
)
from kimia.errors import ParameterError
from kimia.pipeline import Options as PipelineOptions
from kimia.v1.audio_pb2 import AudioFormat
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_BOTH, OUTPUT_TYPE_TEXT, OUTPUT_TYPE_UNSPECIFIED, TrackSampling

pytestmark = pytest.mark.unit


def test_what_is_not_given_is_not_set() -> None:
    options = turn_options(None, {"seed": None, "max_new_tokens": -1})
    assert options.ByteSize() == 0
    assert options.output_type == OUTPUT_TYPE_UNSPECIFIED
    assert turn_options("both", {}).output_type == OUTPUT_TYPE_BOTH


def test_every_option_has_its_place() -> None:
    options = turn_options(
        "text",
        {
            "text_temperature": 0.7,
            "text_top_k": 3,
            "audio_repetition_penalty": 1.2,
            "audio_repetition_window_size": 32,
            "max_new_tokens": 40,
            "seed": 7,
            "preset": "upstream",
        },
    )
    assert options.output_type == OUTPUT_TYPE_TEXT
    assert (options.text.temperature, options.text.top_k) == (0.7, 3)
    assert (options.audio.repetition_penalty, options.audio.repetition_window) == (1.2, 32)
    assert (options.max_new_tokens, options.seed, options.preset) == (40, 7, "upstream")
    assert not options.audio.HasField("temperature")


def test_the_names_are_those_of_the_pipeline() -> None:
    assert set(PipelineOptions.__annotations__) == set(Options.__annotations__) - {"output_rate", "output_encoding"}
    assert set(TRACK_FIELDS.values()) == {field.name for field in TrackSampling.DESCRIPTOR.fields}


def test_formats() -> None:
    assert set(ENCODINGS) == set(SAMPLE_BYTES)
    for name in ENCODINGS:
        for rate in RATES:
            form = audio_format(name, rate)
            assert (encoding_name(form), form.sample_rate) == (name, rate)
    assert encoding_name(AudioFormat()) == ""
    options = turn_options("both", {"output_rate": 8000, "output_encoding": "mulaw"})
    assert options.output_format == audio_format("mulaw", 8000)
    assert turn_options("both", {"output_rate": 8000}).output_format == audio_format("s16le", 8000)
    assert turn_options("both", {"output_encoding": "alaw"}).output_format == audio_format("alaw", 24000)


@pytest.mark.parametrize(
    ("output_type", "given", "complaint"),
    [
        ("speech", {}, "output_type must be"),
        ("both", {"temperature": 1.0}, "unknown option 'temperature'; there are audio_repetition_penalty"),
        ("both", {"seed": "x"}, "seed cannot be 'x'"),
        ("both", {"seed": -1}, "seed cannot be -1"),
        ("both", {"text_top_k": 2**40}, "text_top_k cannot be"),
        ("both", {"max_new_tokens": 1.5}, "max_new_tokens cannot be"),
        ("both", {"output_rate": 44100}, "sample rate must be one of"),
        ("both", {"output_encoding": "opus"}, "encoding must be one of"),
    ],
)
def test_mistakes(output_type, given, complaint) -> None:
    with pytest.raises(ParameterError, match=complaint):
        turn_options(output_type, given)
