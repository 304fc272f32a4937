"""Requests of the contract from what users write; everything that can be checked without the service is checked."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from kimia.client.chat import Chat, read_chat
from kimia.client.connection import Identity
from kimia.client.options import Options, audio_format, turn_options
from kimia.errors import ConversationError, ParameterError
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH, JOB_CLASS_UNSPECIFIED


class CallSettings(Options, total=False):
    """Keyword arguments of a call; the options hold for its answers unless a commit says otherwise."""

    session: str  # session to go on with or to begin
    input_rate: int  # Hz of the caller's sound: 8000, 16000 (default), 24000 or 48000
    input_encoding: str  # "s16le" (default), "f32le", "mulaw" or "alaw"


def generate_request(
    identity: Identity, chats: Chat, output_type: str, settings: Mapping[str, Any]
) -> pb.GenerateRequest:
    """A turn that answers. Raises ConversationError, AudioError or ParameterError."""
    messages = read_chat(chats)
    if not messages:
        raise ConversationError("the conversation is empty; give at least one user message")
    if messages[-1].role != ROLE_USER:
        raise ConversationError(
            "the conversation ends with the assistant, so there is nothing to answer; end with a user message",
            len(messages) - 1,
        )
    return _turn_request(identity, messages, output_type, settings)


def say_request(identity: Identity, text: str, chats: Chat, settings: Mapping[str, Any]) -> pb.GenerateRequest:
    """A turn that speaks a given text."""
    check_text(text)
    request = _turn_request(identity, read_chat(chats), "both", settings)
    request.say = text
    return request


def transcribe_request(
    identity: Identity, audio: Any, instruction: str, settings: Mapping[str, Any]
) -> pb.GenerateRequest:
    """A turn that writes down what is said."""
    chats = (
        {"role": "user", "message_type": "text", "content": instruction},
        {"role": "user", "message_type": "audio", "content": audio},
    )
    return generate_request(identity, chats, "text", settings)


def call_config(identity: Identity, chats: Chat, output_type: str, settings: Mapping[str, Any]) -> pb.CallConfig:
    """How a call is set up; `settings` are the options of answers, `session`, `input_rate` and `input_encoding`."""
    rest = dict(settings)
    session = rest.pop("session", "")
    form = audio_format(rest.pop("input_encoding", "s16le"), rest.pop("input_rate", 16000))
    return pb.CallConfig(
        caller=identity.caller(),
        session_id=session,
        input_format=form,
        options=turn_options(output_type, rest),
        messages=read_chat(chats),
    )


def check_text(text: str) -> None:
    """Raise ParameterError unless there is something to say."""
    if not isinstance(text, str):
        raise ParameterError(f"the text must be a string, got {type(text).__name__}")
    if not text:
        raise ParameterError("there is nothing to say: the text is empty")


def new_key() -> str:
    """An idempotency key."""
    return uuid.uuid4().hex


def _turn_request(
    identity: Identity, messages: list[Message], output_type: str, settings: Mapping[str, Any]
) -> pb.GenerateRequest:
    rest = dict(settings)
    session, batch, key = rest.pop("session", ""), rest.pop("batch", False), rest.pop("idempotency_key", "")
    return pb.GenerateRequest(
        caller=identity.caller(),
        session_id=session or "",
        idempotency_key=key or new_key(),  # a lost request can be sent again
        messages=messages,
        options=turn_options(output_type, rest),
        job_class=JOB_CLASS_BATCH if batch else JOB_CLASS_UNSPECIFIED,
    )


# ---- sessions ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """What the service remembers of a session."""

    id: str
    create_time: datetime | None
    expire_time: datetime | None
    messages: tuple[Message, ...] = field(repr=False)  # of the contract; sounds without data
    turn_ids: tuple[str, ...]  # oldest first
    next_audio_index: int
    running_turn_id: str  # empty when none is being answered


def read_session(response: pb.GetSessionResponse) -> Session:
    """The same, from the wire."""
    return Session(
        id=response.session_id,
        create_time=_time(response.create_time) if response.HasField("create_time") else None,
        expire_time=_time(response.expire_time) if response.HasField("expire_time") else None,
        messages=tuple(response.messages),
        turn_ids=tuple(response.turn_ids),
        next_audio_index=response.next_audio_index,
        running_turn_id=response.running_turn_id,
    )


def _time(stamp: Timestamp) -> datetime:
    return stamp.ToDatetime(tzinfo=UTC)
