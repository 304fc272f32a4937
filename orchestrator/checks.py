"""Requests, looked at before anything is stored or computed: every complaint names the field and says what to do.

Only what needs no model is checked here: ids, for one, are checked against the vocabulary by the language model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from kimia.errors import RequestError
from kimia.model.philox import SEED_LIMIT
from kimia.model.schedule import SCHEDULES
from kimia.sound import bytes_per_sample, check_format
from kimia.v1.audio_pb2 import ENCODING_FILE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import (
    OUTPUT_TYPE_TEXT,
    ROLE_ASSISTANT,
    ROLE_USER,
    Message,
    OutputType,
    Spoken,
    Text,
    TrackSampling,
    TurnOptions,
)
from kimia.v1.kimi_audio_pb2 import GenerateRequest
from kimia.v1.turn_pb2 import Caller, JobClass

DEFAULT_TENANT = "default"
UNREASONABLE = 1e30  # numbers from here on count as infinite, as in kimia.model.sampler
SMALLEST_PENALTY = 1e-6
LONGEST_CLIP = 600.0  # seconds: what the context of the model holds, with room for an answer
MOST_MESSAGES = 8192  # of one request: as many as the context of the model has positions
MOST_CLIPS = 256  # of one request: each is encoded by itself
MOST_IDS = 8192  # of one message, text ids or semantic tokens: a position each
LONGEST_TEXT = 256 << 10  # bytes of one text: 32 for each position
MOST_TEXT = 1 << 20  # bytes of all texts of one request, of which the model forgets the oldest
LONGEST_KEY = 128  # characters of an idempotency key
LONGEST_TRACE = 128  # characters of a traceparent

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


# ---- who asks ---------------------------------------------------------------------------------------------------


def checked_caller(caller: Caller, field: str = "caller") -> Caller:
    """The caller with the default tenant filled in. Raises RequestError."""
    checked = Caller()
    checked.CopyFrom(caller)
    checked.tenant = caller.tenant or DEFAULT_TENANT
    for name in ("tenant", "key_id"):
        value = getattr(checked, name)
        if value and not _NAME.fullmatch(value):
            raise RequestError("must be 1 to 64 letters, digits, '_', '.' or '-'", field=f"{field}.{name}")
    if len(caller.traceparent) > LONGEST_TRACE:
        raise RequestError("is longer than any W3C traceparent; leave it out", field=f"{field}.traceparent")
    return checked


def check_idempotency_key(key: str, field: str) -> None:
    """Raise RequestError for a key that is too long to be one."""
    if len(key) > LONGEST_KEY:
        raise RequestError(f"must have at most {LONGEST_KEY} characters, got {len(key)}", field=field)


# ---- options ----------------------------------------------------------------------------------------------------


def check_options(options: TurnOptions, field: str) -> None:
    """Raise RequestError unless an answer can be made this way."""
    if options.output_type not in OutputType.values():
        raise RequestError(f"is no output type: {options.output_type}; use TEXT or BOTH", field=f"{field}.output_type")
    _check_track(options.text, f"{field}.text")
    _check_track(options.audio, f"{field}.audio")
    if options.HasField("max_new_tokens") and options.max_new_tokens < 1:
        raise RequestError("must be at least 1; leave it out for no limit", field=f"{field}.max_new_tokens")
    if options.seed >= SEED_LIMIT:
        raise RequestError(f"must be below 2**63, got {options.seed}", field=f"{field}.seed")
    if options.preset and options.preset not in SCHEDULES:
        raise RequestError(f"must be one of {', '.join(SCHEDULES)}, got {options.preset!r}", field=f"{field}.preset")
    if options.HasField("output_format"):
        check_format(options.output_format, f"{field}.output_format")


def _check_track(track: TrackSampling, field: str) -> None:
    _check_number(track.temperature, 0.0, f"{field}.temperature")
    if track.HasField("repetition_penalty"):
        _check_number(track.repetition_penalty, SMALLEST_PENALTY, f"{field}.repetition_penalty")
    if track.repetition_window < 0:
        raise RequestError("must be 0 (all ids) or more", field=f"{field}.repetition_window")


def _check_number(value: float, minimum: float, field: str) -> None:
    if not math.isfinite(value) or not minimum <= value < UNREASONABLE:
        raise RequestError(f"must be a finite number of at least {minimum:g}, got {value}", field=field)


def check_say(text: str, options: TurnOptions, field: str, options_field: str) -> None:
    """Raise RequestError unless this text can be said."""
    if not text.strip():
        raise RequestError("there is nothing to say: the text is empty", field=field)
    check_text_size(text, field)
    if options.output_type == OUTPUT_TYPE_TEXT:
        raise RequestError(
            "a text to say makes speech; use BOTH, or leave it out", field=f"{options_field}.output_type"
        )


# ---- messages ---------------------------------------------------------------------------------------------------


def check_generate(request: GenerateRequest) -> None:
    """Raise RequestError unless the turn that is asked for makes sense, whatever its session remembers."""
    check_idempotency_key(request.idempotency_key, "idempotency_key")
    if request.job_class not in JobClass.values():
        raise RequestError(f"is no job class: {request.job_class}; use INTERACTIVE or BATCH", field="job_class")
    check_options(request.options, "options")
    check_messages(request.messages, "messages")
    if request.HasField("say"):
        check_say(request.say, request.options, "say", "options")
    else:
        check_answerable(request.messages, "messages")


def check_answerable(messages: Sequence[Message], field: str) -> None:
    """Raise RequestError unless there is something to answer."""
    if not messages:
        raise RequestError("the conversation is empty; give at least one user message", field=field)
    if messages[-1].role != ROLE_USER:
        rule = "the conversation ends with the assistant, so there is nothing to answer; end with a user message"
        raise RequestError(rule, field=f"{field}[{len(messages) - 1}]")


def check_messages(messages: Sequence[Message], field: str) -> None:
    """Raise RequestError, naming the message, unless every message is complete and together they are not too much."""
    if len(messages) > MOST_MESSAGES:
        rule = f"at most {MOST_MESSAGES} are taken, got {len(messages)}; leave the oldest out"
        raise RequestError(rule, field=field)
    clips = text = 0
    for index, message in enumerate(messages):
        name = f"{field}[{index}]"
        _check_message(message, name)
        clips += not message.HasField("text")
        text += len(_text_of(message).text.encode())
        if clips > MOST_CLIPS:
            raise RequestError(f"at most {MOST_CLIPS} messages with sound are taken; leave the oldest out", field=name)
        if text > MOST_TEXT:
            raise RequestError(f"at most {MOST_TEXT} bytes of text are taken; leave the oldest out", field=name)


def check_sound_bytes(messages: Sequence[Message], clip_bytes: int, turn_bytes: int, field: str) -> None:
    """Raise RequestError for more sound than the settings allow."""
    total = 0
    for index, message in enumerate(messages):
        size = len(message.audio.data) if message.HasField("audio") else len(message.spoken.clip.data)
        total += size
        if size > clip_bytes or total > turn_bytes:
            rule = f"at most {clip_bytes} bytes of sound are taken in one message, {turn_bytes} in all; shorten it"
            raise RequestError(rule, field=f"{field}[{index}]")


def _text_of(message: Message) -> Text:
    return message.text if message.HasField("text") else message.spoken.transcript


def check_text_size(text: str, field: str) -> None:
    """Raise RequestError for a text that no context of the model could hold."""
    size = len(text.encode())
    if size > LONGEST_TEXT:
        raise RequestError(f"has {size} bytes, at most {LONGEST_TEXT} are taken; shorten it", field=field)


def _check_message(message: Message, field: str) -> None:
    if message.role not in (ROLE_USER, ROLE_ASSISTANT):
        rule = "must be USER or ASSISTANT; there is no system role, put instructions in a user text message"
        raise RequestError(rule, field=f"{field}.role")
    match message.WhichOneof("content"):
        case "text":
            _check_text(message.text, message.role == ROLE_ASSISTANT, f"{field}.text")
        case "audio":
            _check_clip(message.audio, f"{field}.audio")
        case "spoken":
            _check_spoken(message.spoken, message.role == ROLE_ASSISTANT, f"{field}.spoken")
        case _:
            raise RequestError("has no content; give text, audio or spoken", field=field)


def _check_text(text: Text, by_ids: bool, field: str) -> None:
    if text.ids and not by_ids:
        raise RequestError("belong to messages of the assistant only; give the text", field=f"{field}.ids")
    _check_count(len(text.ids), f"{field}.ids")
    check_text_size(text.text, f"{field}.text")


def _check_count(count: int, field: str) -> None:
    if count > MOST_IDS:
        raise RequestError(f"has {count} ids, at most {MOST_IDS} are taken; shorten it", field=field)


def _check_spoken(spoken: Spoken, by_ids: bool, field: str) -> None:
    _check_text(spoken.transcript, by_ids, f"{field}.transcript")
    _check_count(len(spoken.clip.codes), f"{field}.clip.codes")
    if spoken.clip.codes:
        _check_private(spoken.clip, f"{field}.clip")
    else:
        _check_clip(spoken.clip, f"{field}.clip")


def _check_clip(clip: Clip, field: str) -> None:
    _check_private(clip, field)
    check_format(clip.format, f"{field}.format", files=True)
    data = clip.data  # read once: each look at a field of bytes copies it
    if not data:
        raise RequestError("is empty; give the sound", field=f"{field}.data")
    if clip.format.encoding != ENCODING_FILE:
        check_samples(data, clip.format, f"{field}.data")
        if sound_seconds(len(data), clip.format) > LONGEST_CLIP:
            raise RequestError(f"is longer than {LONGEST_CLIP:g} s; shorten it", field=f"{field}.data")


def _check_private(clip: Clip, field: str) -> None:
    """What the service writes into a clip leads to stored sound and features: no caller may set it."""
    for name in ("number", "source_turn", "source_number", "feature_keys"):
        if getattr(clip, name):
            raise RequestError("is set by the service; leave it out", field=f"{field}.{name}")


# ---- sound ------------------------------------------------------------------------------------------------------


def check_samples(data: bytes, form: AudioFormat, field: str) -> None:
    """Raise RequestError unless `data` is a whole number of samples."""
    size = bytes_per_sample(form.encoding)
    if len(data) % size:
        raise RequestError(f"{len(data)} bytes are no whole number of samples of {size} bytes", field=field)


def sound_seconds(size: int, form: AudioFormat) -> float:
    """How long so many bytes of samples in a PCM or G.711 format last."""
    return size / (bytes_per_sample(form.encoding) * form.sample_rate)
