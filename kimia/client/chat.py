"""Conversations as users write them (the dict messages of `kimia.pipeline`) as messages of the contract.

    {"role": "user",      "message_type": "text",       "content": "Answer in one sentence."}
    {"role": "user",      "message_type": "audio",      "content": "question.wav"}
    {"role": "assistant", "message_type": "audio-text", "content": ["answer.wav", "Gladly."]}
    {"role": "assistant", "message_type": "audio-text", "codes": [...], "text_tokens": [...]}

Audio is a path, the bytes of a WAV, FLAC, OGG or MP3 file, or (bytes of signed 16-bit little-endian samples, rate in
Hz).
`codes` are semantic tokens without the model's token offset; `audio_tokens`, which include it, are refused, since a
client does not know it. What depends on the model (ranges of ids, lengths) the service checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kimia.client.options import RATES
from kimia.errors import AudioError, ConversationError
from kimia.v1.audio_pb2 import ENCODING_FILE, ENCODING_PCM_S16LE, AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, ROLE_USER, Message, Spoken, Text

Chat = Sequence[Mapping[str, Any]]

FIELDS = ("role", "message_type", "content", "codes", "text_tokens")
ROLES = {"user": ROLE_USER, "assistant": ROLE_ASSISTANT}
LARGEST_ID = 2**32 - 1


def read_chat(chats: Chat) -> list[Message]:
    """Messages of the contract, files read. Raises ConversationError or AudioError naming the message."""
    if isinstance(chats, (str, bytes, Mapping)) or not isinstance(chats, Sequence):
        raise ConversationError(f"a conversation is a list of messages, got {type(chats).__name__}")
    return [_message(index, raw) for index, raw in enumerate(chats)]


def _message(index: int, raw: Any) -> Message:
    try:
        return _parsed(raw)
    except ConversationError as error:
        raise ConversationError(error.rule, index) from None
    except AudioError as error:
        raise AudioError(f"message {index}: {error}") from error


def _parsed(raw: Any) -> Message:
    if not isinstance(raw, Mapping):
        raise ConversationError(f"a message is a mapping with role, message_type and content, got {type(raw).__name__}")
    _check_fields(raw)
    role, content = ROLES[raw["role"]], raw.get("content")
    match raw.get("message_type"):
        case "text":
            return Message(role=role, text=_text(content, raw.get("text_tokens")))
        case "audio":
            return Message(role=role, audio=_clip(content, raw.get("codes")))
        case "audio-text":
            return Message(role=role, spoken=_spoken(content, raw))
        case other:
            raise ConversationError(f"message_type must be 'text', 'audio' or 'audio-text', got {other!r}")


def _check_fields(raw: Mapping[str, Any]) -> None:
    if "audio_tokens" in raw:
        raise ConversationError(
            "audio_tokens carry the model's token offset, which a client does not know; "
            "give `codes`: the same ids less the offset"
        )
    unknown = [name for name in raw if name not in FIELDS]
    if unknown:
        raise ConversationError(f"unknown field {unknown[0]!r}; a message has {', '.join(FIELDS)}")
    if raw.get("role") not in ROLES:
        raise ConversationError(f"role must be 'user' or 'assistant', got {raw.get('role')!r}")


def _text(content: Any, ids: Any) -> Text:
    if content is None and ids is None:
        raise ConversationError("text content is missing")
    if not isinstance(content, str | None):
        raise ConversationError(f"text content must be a string, got {type(content).__name__}")
    try:
        return Text(text=content or "", ids=_ids("text_tokens", ids))
    except (UnicodeEncodeError, ValueError) as error:
        raise ConversationError("text content holds a lone surrogate, which no encoding can carry") from error


def _spoken(content: Any, raw: Mapping[str, Any]) -> Spoken:
    audio, transcript = (None, None) if content is None else _pair(content)
    if audio is None and raw.get("codes") is None:
        raise ConversationError("audio-text content lacks its audio; give it, or give codes")
    return Spoken(clip=_clip(audio, raw.get("codes")), transcript=_text(transcript, raw.get("text_tokens")))


def _pair(content: Any) -> Sequence[Any]:
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise ConversationError("audio-text content must be [audio, transcript]")
    return content


def _clip(source: Any, codes: Any) -> Clip:
    ids = _ids("codes", codes)
    if source is None:
        if codes is None:
            raise ConversationError("audio content is missing")
        return Clip(codes=ids)
    if isinstance(source, (list, tuple)):
        data, rate = _samples(source)
        return Clip(format=AudioFormat(encoding=ENCODING_PCM_S16LE, sample_rate=rate), data=data, codes=ids)
    return Clip(format=AudioFormat(encoding=ENCODING_FILE), data=_content(source), codes=ids)


def _content(source: Any) -> bytes:
    """The bytes of a file."""
    if isinstance(source, (str, Path)):
        return read_file(source)
    if not isinstance(source, bytes):
        raise ConversationError(
            f"audio content must be a path, the bytes of a file or (PCM bytes, rate), got {type(source).__name__}"
        )
    if not source:
        raise AudioError("audio content is empty: no bytes")
    return source


def read_file(path: str | Path) -> bytes:
    """The content of a sound file. Raises AudioError."""
    try:
        if not Path(path).is_file():
            raise AudioError(f"{path}: is no file" if Path(path).exists() else f"{path}: does not exist")
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        raise AudioError(f"{path}: cannot be read ({error})") from error
    if not data:
        raise AudioError(f"{path}: is empty")
    return data


def _samples(source: Sequence[Any]) -> tuple[bytes, int]:
    if len(source) != 2 or not isinstance(source[0], (bytes, bytearray, memoryview)):
        raise ConversationError("samples are given as (bytes of signed 16-bit little-endian PCM, rate in Hz)")
    data, rate = bytes(source[0]), source[1]
    if rate not in RATES:
        raise AudioError(f"the sample rate must be one of {', '.join(map(str, RATES))} Hz, got {rate!r}")
    if not data or len(data) % 2:
        raise AudioError(f"PCM must be whole 16-bit samples and not empty, got {len(data)} bytes")
    return data, int(rate)


def _ids(field: str, value: Any) -> list[int]:
    if value is None:
        return []
    if not isinstance(value, (list, tuple)):
        raise ConversationError(f"{field} must be a list of ids, got {type(value).__name__}")
    for position, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= LARGEST_ID:
            raise ConversationError(f"{field}[{position}] must be an id, got {token!r}")
    return list(value)
