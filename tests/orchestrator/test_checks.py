import math

import pytest

from kimia.errors import RequestError
from kimia.model import sampler
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_MULAW, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import (
    OUTPUT_TYPE_TEXT,
    ROLE_ASSISTANT,
    ROLE_USER,
    Message,
    Spoken,
    Text,
    TrackSampling,
    TurnOptions,
)
from kimia.v1.kimi_audio_pb2 import GenerateRequest
from kimia.v1.turn_pb2 import Caller
from orchestrator import checks
from orchestrator.checks import check_generate, check_options, checked_caller

pytestmark = pytest.mark.unit

S16 = AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=16000)


def user(**content):
    return Message(role=ROLE_USER, **content)


def assistant(**content):
    return Message(role=ROLE_ASSISTANT, **content)


HELLO = user(text=Text(text="hello"))


def clip(data=b"\0\0", **fields):
    return Clip(format=fields.pop("format", S16), data=data, **fields)


GOOD = {
    "text": [HELLO],
    "an empty text": [user(text=Text())],
    "sound": [user(audio=clip())],
    "a file": [user(audio=clip(b"RIFF", format=AudioFormat(encoding=ENCODING_FILE)))],
    "spoken history by codes": [assistant(spoken=Spoken(clip=Clip(codes=[1]), transcript=Text(ids=[4]))), HELLO],
    "sound whose codes are known": [user(audio=clip(codes=[1]))],
    "spoken history by sound and codes": [assistant(spoken=Spoken(clip=clip(codes=[1]))), HELLO],
    "spoken history by sound": [assistant(spoken=Spoken(clip=clip(), transcript=Text(text="a"))), HELLO],
    "an answer by ids": [assistant(text=Text(ids=[4])), HELLO],
}


@pytest.mark.parametrize("name", GOOD)
def test_what_can_be_answered(name):
    check_generate(GenerateRequest(messages=GOOD[name]))


BAD = {
    "messages": [],
    "messages[0]": [assistant(text=Text(text="hello"))],
    "messages[0].role": [Message(role=0, text=Text(text="You are a bot"))],
    "messages[1].role": [HELLO, Message(role=7, text=Text(text="hello"))],
    "messages[1]": [HELLO, user(), HELLO],
    "messages[0].text.ids": [user(text=Text(ids=[1]))],
    "messages[0].audio.data": [user(audio=clip(b""))],
    "messages[1].audio.data": [HELLO, user(audio=clip(b"\0"))],
    "messages[2].audio.data": [
        HELLO,
        HELLO,
        user(audio=clip(bytes(601 * 8000), format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000))),
    ],
    "messages[2].audio.format.sample_rate": [
        HELLO,
        HELLO,
        user(audio=clip(format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=44100))),
    ],
    "messages[0].audio.format.encoding": [user(audio=clip(format=AudioFormat()))],
    "messages[1].audio.format.encoding": [HELLO, user(audio=clip(format=AudioFormat(encoding=42, sample_rate=8000)))],
    "messages[0].audio.feature_keys": [user(audio=clip(feature_keys=["{0}:blob:other:x:y:0"]))],
    "messages[0].audio.source_turn": [user(audio=clip(source_turn="other.1"))],
    "messages[0].audio.number": [user(audio=clip(number=1))],
    "messages[0].spoken.clip.format.encoding": [assistant(spoken=Spoken(transcript=Text(text="a"))), HELLO],
    "messages[0].spoken.clip.data": [assistant(spoken=Spoken(clip=clip(b""))), HELLO],
    "messages[0].spoken.clip.source_number": [
        assistant(spoken=Spoken(clip=Clip(codes=[1], source_number=1))),
        HELLO,
    ],
    "messages[0].spoken.transcript.ids": [user(spoken=Spoken(clip=Clip(codes=[1]), transcript=Text(ids=[1])))],
}


@pytest.mark.parametrize("field", BAD)
def test_wrong_messages_name_their_field(field):
    with pytest.raises(RequestError) as caught:
        check_generate(GenerateRequest(messages=BAD[field]))
    assert caught.value.field == field


BAD_OPTIONS = {
    "options.output_type": TurnOptions(output_type=9),
    "options.text.temperature": TurnOptions(text=TrackSampling(temperature=math.nan)),
    "options.audio.temperature": TurnOptions(audio=TrackSampling(temperature=-0.1)),
    "options.text.repetition_penalty": TurnOptions(text=TrackSampling(repetition_penalty=0)),
    "options.audio.repetition_penalty": TurnOptions(audio=TrackSampling(repetition_penalty=math.inf)),
    "options.text.repetition_window": TurnOptions(text=TrackSampling(repetition_window=-1)),
    "options.max_new_tokens": TurnOptions(max_new_tokens=0),
    "options.seed": TurnOptions(seed=1 << 63),
    "options.preset": TurnOptions(preset="fast"),
    "options.output_format.encoding": TurnOptions(output_format=AudioFormat(encoding=ENCODING_FILE)),
    "options.output_format.sample_rate": TurnOptions(
        output_format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=11025)
    ),
}


@pytest.mark.parametrize("field", BAD_OPTIONS)
def test_wrong_options_name_their_field(field):
    with pytest.raises(RequestError) as caught:
        check_generate(GenerateRequest(messages=[HELLO], options=BAD_OPTIONS[field]))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "request_"),
    [
        ("say", GenerateRequest(say="")),
        ("say", GenerateRequest(say=" \n")),
        ("say", GenerateRequest(say="a" * (checks.LONGEST_TEXT + 1))),
        ("messages", GenerateRequest(messages=[HELLO] * (checks.MOST_MESSAGES + 1))),
        ("messages[4]", GenerateRequest(messages=[user(text=Text(text="a" * checks.LONGEST_TEXT))] * 5)),
        ("messages[0].text.text", GenerateRequest(messages=[user(text=Text(text="é" * checks.LONGEST_TEXT))])),
        (f"messages[{checks.MOST_CLIPS}]", GenerateRequest(messages=[user(audio=clip())] * (checks.MOST_CLIPS + 1))),
        (
            "messages[0].spoken.clip.codes",
            GenerateRequest(messages=[user(spoken=Spoken(clip=Clip(codes=[1] * (checks.MOST_IDS + 1)))), HELLO]),
        ),
        ("options.output_type", GenerateRequest(say="hi", options=TurnOptions(output_type=OUTPUT_TYPE_TEXT))),
        ("job_class", GenerateRequest(messages=[HELLO], job_class=5)),
        ("idempotency_key", GenerateRequest(messages=[HELLO], idempotency_key="k" * 129)),
    ],
)
def test_wrong_requests_name_their_field(field, request_):
    with pytest.raises(RequestError) as caught:
        check_generate(request_)
    assert caught.value.field == field


def test_say_needs_no_question():
    check_generate(GenerateRequest(say="hello"))


def test_options_that_can_be_had():
    check_options(
        TurnOptions(
            text=TrackSampling(temperature=0.7, top_k=-1, repetition_penalty=1.2, repetition_window=0),
            max_new_tokens=1,
            seed=(1 << 63) - 1,
            preset="upstream",
            output_format=AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000),
        ),
        "options",
    )


def test_numbers_agree_with_the_model():
    assert checks.SMALLEST_PENALTY == sampler.SMALLEST_PENALTY
    assert checks.UNREASONABLE == sampler.UNREASONABLE


def test_the_tenant_has_a_default():
    assert checked_caller(Caller(key_id="k")) == Caller(tenant="default", key_id="k")


@pytest.mark.parametrize(
    ("field", "caller"),
    [
        ("caller.tenant", Caller(tenant="a:b")),
        ("caller.key_id", Caller(key_id="x" * 65)),
        ("caller.traceparent", Caller(traceparent="0" * 200)),
    ],
)
def test_wrong_callers_name_their_field(field, caller):
    with pytest.raises(RequestError) as caught:
        checked_caller(caller)
    assert caught.value.field == field


def test_sound_has_the_limits_of_the_settings():
    messages = [user(audio=clip(bytes(10))), HELLO, user(spoken=Spoken(clip=clip(bytes(12))))]
    checks.check_sound_bytes(messages, 12, 22, "messages")
    for most in ((11, 22), (12, 21)):
        with pytest.raises(RequestError, match="shorten it") as caught:
            checks.check_sound_bytes(messages, *most, "messages")
        assert caught.value.field == "messages[2]"
