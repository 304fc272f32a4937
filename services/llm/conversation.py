"""A turn's messages as the model library knows them, and the clips that belong to them.

The rules are those of `kimia.model.conversation`, which reads the same conversation as users of the library write it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence

import torch

from kimia.clips import codes_known, wanted_sounds
from kimia.compute import cut_off, feature_rows, row_count
from kimia.errors import AudioError, ConversationError
from kimia.model.config import LMConfig
from kimia.model.conversation import Message, Role
from kimia.model.encode import EncodedAudio
from kimia.model.generate import Result
from kimia.model.prompt import Encoded as EncodedClip
from kimia.pipeline import CodesOnly
from kimia.v1 import conversation_pb2
from kimia.v1.conversation_pb2 import ROLE_ASSISTANT, ROLE_USER, Spoken, Text
from kimia.v1.turn_pb2 import Chunk, Encoded, Turn

ROLES: dict[int, Role] = {ROLE_USER: "user", ROLE_ASSISTANT: "assistant"}


# ---- messages ---------------------------------------------------------------------------------------------------


def read_messages(turn: Turn, config: LMConfig) -> tuple[Message, ...]:
    """The conversation of a turn, checked. Raises ConversationError that names the message.

    It ends with the user; where a text is said, it may also end with the assistant or be empty.
    """
    messages = tuple(_Reader(index, config).message(message) for index, message in enumerate(turn.messages))
    if turn.HasField("say"):
        return messages
    if not messages:
        raise ConversationError("the conversation is empty; give at least one user message")
    if messages[-1].role != "user":
        rule = "the conversation ends with the assistant, so there is nothing to answer; end with a user message"
        raise ConversationError(rule, len(messages) - 1)
    return messages


class _Reader:
    """Reads one message; every complaint carries its index."""

    def __init__(self, index: int, config: LMConfig) -> None:
        self.index = index
        self.config = config

    def message(self, message: conversation_pb2.Message) -> Message:
        if message.role not in ROLES:
            raise ConversationError("its role must be USER or ASSISTANT", self.index)
        role = ROLES[message.role]
        match message.WhichOneof("content"):
            case "text":
                return Message(role, "text", message.text.text, text_tokens=self._text_ids(message.text, role))
            case "audio":
                return Message(role, "audio")
            case "spoken":
                return self._spoken(message.spoken, role)
        raise ConversationError("has no content; give text, audio or spoken", self.index)

    def _spoken(self, spoken: Spoken, role: Role) -> Message:
        ids = self._text_ids(spoken.transcript, role)
        if not codes_known(spoken.clip):
            return Message(role, "audio-text", spoken.transcript.text, text_tokens=ids)
        codes = self._checked("codes", spoken.clip.codes, self.config.audio_codes)
        offset = self.config.token_offset
        return Message(role, "audio-text", spoken.transcript.text, None, tuple(offset + code for code in codes), ids)

    def _text_ids(self, text: Text, role: Role) -> tuple[int, ...] | None:
        if not text.ids:
            return None
        if role != "assistant":
            raise ConversationError("text ids belong to messages of the assistant only; give the text", self.index)
        return self._checked("text ids", text.ids, self.config.token_offset)

    def _checked(self, name: str, ids: Sequence[int], end: int) -> tuple[int, ...]:
        for position, token in enumerate(ids):
            if token >= end:
                raise ConversationError(f"{name}[{position}] must be in 0..{end - 1}, got {token}", self.index)
        return tuple(ids)


def spoken_message(result: Result, config: LMConfig, heard: int | None = None) -> Message:
    """An answer as the conversation's next turn will be told of it; `heard` keeps its first codes only.

    The rule is that of `orchestrator.memory.answer_of`.
    """
    if not result.returned_audio:
        return Message("assistant", "text", text_tokens=result.text_ids)
    codes = result.audio_codes[:heard]
    led = result.returned_text[: config.audio_delay + len(codes)]
    return Message(
        "assistant",
        "audio-text",
        audio_tokens=tuple(config.token_offset + code for code in codes),
        text_tokens=tuple(token for token in led if token < config.token_offset),
    )


# ---- clips ------------------------------------------------------------------------------------------------------


async def gather_clips(turn: Turn, inbox: AsyncIterator[Chunk]) -> dict[int, list[Encoded]]:
    """The pieces of every clip that the prompt needs, by index of their message; nothing is read when it needs none.

    Raises ConversationError naming the message whose clip is not there, StateError when the inbox ends too early.
    """
    sounds = wanted_sounds(turn.messages)
    pieces: dict[int, list[Encoded]] = {sound.index: [] for sound in sounds.values()}
    missing = dict(sounds)
    if not missing:
        return pieces
    async for chunk in inbox:
        sound = missing.get(chunk.encoded.clip) if chunk.HasField("encoded") else None
        if sound is not None:
            pieces[sound.index].append(chunk.encoded)
            if chunk.encoded.clip_end:
                del missing[chunk.encoded.clip]
        if not missing:
            return pieces
        if chunk.final:
            raise ConversationError("its audio has not been encoded", next(iter(missing.values())).index)
    raise cut_off("encoded")


def join_clips(
    messages: Sequence[Message], pieces: Mapping[int, Sequence[Encoded]], width: int
) -> dict[int, EncodedClip]:
    """Clips as the prompt takes them, by index of their message; `width` is that of a row of features.

    Raises AudioError that names the message.
    """
    return {index: _joined(index, parts, messages[index].needs_features, width) for index, parts in pieces.items()}


def _joined(index: int, pieces: Sequence[Encoded], heard: bool, width: int) -> EncodedClip:
    codes = tuple(code for piece in pieces for code in piece.codes)
    if not heard:
        return CodesOnly(codes)
    try:
        return EncodedAudio(codes, _rows(pieces, width))
    except AudioError as error:
        raise AudioError(str(error), index) from error


def _rows(pieces: Sequence[Encoded], width: int) -> torch.Tensor:
    """The features of the pieces of a clip (codes, width): read once, laid end to end once."""
    kinds = {piece.feature_type for piece in pieces}
    if len(kinds) > 1:  # of workers with different KIMIA_DTYPE
        return torch.cat([_rows([piece], width) for piece in pieces])
    data = [_checked_features(piece, width) for piece in pieces]
    return feature_rows(bytearray().join(data), kinds.pop(), width)


def _checked_features(piece: Encoded, width: int) -> bytes:
    features, codes = piece.features, len(piece.codes)
    rows = row_count(features, piece.feature_type, piece.feature_width)
    if (rows, piece.feature_width) != (codes, width):
        raise AudioError(f"features of shape {(rows, piece.feature_width)} do not fit {codes} codes and width {width}")
    return features
