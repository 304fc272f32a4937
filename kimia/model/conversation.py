"""Conversations as users write them, checked completely before anything is computed.

A message is a mapping with `role`, `message_type`, `content` and, so that a generated answer goes back into the chat
without being encoded again, optionally its ids:

    {"role": "user",      "message_type": "text",       "content": "Answer in one sentence."}
    {"role": "user",      "message_type": "audio",      "content": "question.wav"}
    {"role": "assistant", "message_type": "audio-text", "content": ["answer.wav", "Gladly."]}
    {"role": "assistant", "message_type": "audio-text", "audio_tokens": [...], "text_tokens": [...]}

Notes
- Audio is a path, the bytes of an audio file, or (samples, rate in Hz).
- `audio_tokens` carry the token offset (`kimia_token_offset` + code), as in the release's fine-tuning data.
- An `audio` message needs its content beside its `audio_tokens`, because its continuous features come from the sound;
  an `audio-text` message is history without continuous features, so its ids suffice.
- Several messages of one role in a row form one turn. The assistant may speak first, as call centres do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from kimia.errors import ConversationError, ParameterError
from kimia.model.config import LMConfig
from kimia.model.text import check_encodable

Role: TypeAlias = Literal["user", "assistant"]
MessageType: TypeAlias = Literal["text", "audio", "audio-text"]
OutputType: TypeAlias = Literal["text", "both"]
AudioSource: TypeAlias = str | Path | bytes | tuple[np.ndarray, int]

FIELDS = ("role", "message_type", "content", "audio_tokens", "text_tokens")


@dataclass(frozen=True)
class Message:
    """One legal message."""

    role: Role
    message_type: MessageType
    text: str | None = None  # of a text message, or the transcript; None only beside `text_tokens`
    audio: AudioSource | None = None  # None for text, or beside `audio_tokens` of an audio-text message
    audio_tokens: tuple[int, ...] | None = None  # ids, token offset included
    text_tokens: tuple[int, ...] | None = None  # ids; they take the place of `text`

    @property
    def needs_features(self) -> bool:
        """Must the audio go through the continuous encoder?"""
        return self.message_type == "audio"

    @property
    def needs_codes(self) -> bool:
        """Must the audio go through the semantic tokenizer?"""
        return self.message_type != "text" and self.audio_tokens is None


def check_output_type(output_type: str) -> None:
    """Raise ParameterError unless `output_type` is one of OutputType."""
    if output_type not in get_args(OutputType):
        raise ParameterError(f"output_type must be 'text' or 'both' (text and speech), got {output_type!r}")


def parse_conversation(
    chats: Sequence[Mapping[str, Any]], config: LMConfig, must_end_with_user: bool = True
) -> tuple[Message, ...]:
    """Check a conversation; the ranges of ids come from `config`.

    A conversation to be answered must end with the user's turn; one to be trained on need not. Raises
    ConversationError naming the message and the rule. Files are not opened here.
    """
    if not isinstance(chats, (list, tuple)):
        raise ConversationError(f"a conversation is a list of messages, got {type(chats).__name__}")
    if not chats:
        raise ConversationError("the conversation is empty; give at least one user message")
    messages = tuple(_Reader(index, raw, config).message() for index, raw in enumerate(chats))
    if must_end_with_user and messages[-1].role != "user":
        raise ConversationError(
            "the conversation ends with the assistant, so there is nothing to answer; end with a user message",
            len(messages) - 1,
        )
    return messages


class _Reader:
    """Reads one message; every complaint carries its index."""

    def __init__(self, index: int, raw: Any, config: LMConfig) -> None:
        self.index = index
        self.config = config
        if not isinstance(raw, Mapping):
            raise self.error(f"a message is a mapping with role, message_type and content, got {type(raw).__name__}")
        self.raw = raw

    def error(self, rule: str) -> ConversationError:
        return ConversationError(rule, self.index)

    def message(self) -> Message:
        self._check_fields()
        role = self._role()
        audio_tokens, text_tokens = self._audio_tokens(), self._text_tokens(role)
        text: str | None = None
        audio: AudioSource | None = None
        match self.raw.get("message_type"):
            case "text":
                text = self._text(self.raw.get("content"), text_tokens is None, "text content")
                return Message(role, "text", text=text, text_tokens=text_tokens)
            case "audio":
                audio = self._audio(self.raw.get("content"))
                return Message(role, "audio", audio=audio, audio_tokens=audio_tokens)
            case "audio-text":
                audio, text = self._spoken(audio_tokens is None, text_tokens is None)
                return Message(role, "audio-text", text, audio, audio_tokens, text_tokens)
            case None:
                raise self.error("message_type is missing; give 'text', 'audio' or 'audio-text'")
            case other:
                raise self.error(f"message_type must be 'text', 'audio' or 'audio-text', got {other!r}")

    def _check_fields(self) -> None:
        unknown = [name for name in self.raw if name not in FIELDS]
        if unknown:
            raise self.error(f"unknown field {unknown[0]!r}; a message has {', '.join(FIELDS)}")

    def _role(self) -> Role:
        role: Any = self.raw.get("role")
        if role == "system":
            raise self.error("there is no system role in this model; put instructions in a user text message")
        if role not in get_args(Role):
            raise self.error(f"role must be 'user' or 'assistant', got {role!r}")
        return role

    def _text(self, value: Any, required: bool, what: str) -> str | None:
        if value is None and not required:
            return None
        if not isinstance(value, str):
            raise self.error(f"{what} must be a string (it may be empty), got {_kind(value)}")
        try:
            check_encodable(value)
        except ParameterError as error:
            raise self.error(str(error)) from error
        return value

    def _audio(self, value: Any) -> AudioSource:
        if value is None:
            raise self.error("audio content is missing; the continuous features of a clip come from its sound")
        if isinstance(value, (str, Path)):
            if not str(value).strip():
                raise self.error("audio content is an empty path")
            return value
        if isinstance(value, bytes):
            if not value:
                raise self.error("audio content is empty: no bytes")
            return value
        if isinstance(value, (list, tuple)):
            return self._samples(value)
        raise self.error(f"audio content must be a path, the bytes of a file or (samples, rate), got {_kind(value)}")

    def _samples(self, value: Sequence[Any]) -> AudioSource:
        """Check (samples, rate); their values are checked where audio is read."""
        if len(value) != 2 or not isinstance(value[0], np.ndarray):
            raise self.error("audio samples must be given as (numpy array, rate in Hz)")
        samples, rate = value
        if isinstance(rate, bool) or not isinstance(rate, (int, np.integer)) or rate <= 0:
            raise self.error(f"the sample rate must be a positive whole number of Hz, got {rate!r}")
        if samples.ndim not in (1, 2) or samples.size == 0:
            raise self.error(f"audio samples must be a non-empty array of one or two axes, got shape {samples.shape}")
        return samples, int(rate)

    def _spoken(self, needs_audio: bool, needs_text: bool) -> tuple[AudioSource | None, str | None]:
        """The [audio, transcript] of an audio-text message; either may be None beside its ids."""
        content = self.raw.get("content")
        if content is None:
            content = (None, None)
        if not isinstance(content, (list, tuple)) or len(content) != 2:
            raise self.error("audio-text content must be [audio, transcript]")
        if content[0] is None and needs_audio:
            raise self.error("audio-text content lacks its audio; give it, or give audio_tokens")
        audio = None if content[0] is None else self._audio(content[0])
        return audio, self._text(content[1], needs_text, "the transcript of audio-text content")

    def _audio_tokens(self) -> tuple[int, ...] | None:
        ids = self._ids("audio_tokens", self.config.token_offset, self.config.vocab_size)
        if ids is None:
            return None
        if self.raw.get("message_type") == "text":
            raise self.error("audio_tokens do not belong to a text message")
        if not ids and self.raw.get("message_type") == "audio":
            raise self.error("audio_tokens of an audio message must not be empty")
        return ids

    def _text_tokens(self, role: Role) -> tuple[int, ...] | None:
        ids = self._ids("text_tokens", 0, self.config.token_offset)
        if ids is None:
            return None
        if role != "assistant" or self.raw.get("message_type") == "audio":
            raise self.error("text_tokens belong to text and audio-text messages of the assistant only")
        return ids

    def _ids(self, field: str, low: int, high: int) -> tuple[int, ...] | None:
        """Ids of low..high-1, or None when the field is absent."""
        value = self.raw.get(field)
        if value is None:
            return None
        if not isinstance(value, (list, tuple)):
            raise self.error(f"{field} must be a list of ids, got {_kind(value)}")
        for position, token in enumerate(value):
            if isinstance(token, bool) or not isinstance(token, int) or not low <= token < high:
                raise self.error(f"{field}[{position}] must be an id in {low}..{high - 1}, got {token!r}")
        return tuple(value)


def _kind(value: Any) -> str:
    """How a complaint names a wrong value: nothing, or its type (never its content, which may be long or private)."""
    return "nothing" if value is None else type(value).__name__
