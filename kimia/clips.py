"""Which messages of a turn bring sound, and what of it is known already; torch-free, for stages and control plane."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kimia.errors import ConversationError
from kimia.v1.audio_pb2 import ENCODING_UNSPECIFIED, Clip
from kimia.v1.conversation_pb2 import Message

EARLY_SECONDS = 0.5  # of sound behind a segment that lets it be encoded before its clip ends: more than a filter holds


@dataclass(frozen=True)
class Sound:
    """The clip of one message, of which the language model wants codes and, where `heard`, features."""

    index: int  # of the message
    clip: Clip
    heard: bool  # an `audio` message; else spoken history, by its codes alone

    @property
    def must_be_encoded(self) -> bool:
        """Whether the tokenizer stage must be given the sound: its features, or codes, are not known."""
        return not (self.heard and self.clip.feature_keys)


def wanted_sounds(messages: Sequence[Message]) -> dict[int, Sound]:
    """The clips that the language model reads from the `encoded` log, by their number, in the order of the messages.

    Spoken history whose codes are known is not among them. Raises ConversationError when two have the same number.
    """
    sounds: dict[int, Sound] = {}
    for index, message in enumerate(messages):
        sound = _sound(index, message)
        if sound is None:
            continue
        number = sound.clip.number
        if number in sounds:
            raise ConversationError(f"its clip has the number {number} of an earlier one; number the clips", index)
        sounds[number] = sound
    return sounds


def codes_known(spoken: Clip) -> bool:
    """Whether spoken history needs no sound: its codes are there, or there are none (neither codes nor a format)."""
    return bool(spoken.codes) or spoken.format.encoding == ENCODING_UNSPECIFIED


def _sound(index: int, message: Message) -> Sound | None:
    if message.HasField("audio"):
        return Sound(index, message.audio, heard=True)
    if message.HasField("spoken") and not codes_known(message.spoken.clip):
        return Sound(index, message.spoken.clip, heard=False)
    return None
