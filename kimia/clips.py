"""Which messages of a turn bring sound, what of it is known already, and how it is cut; torch-free, for stages and
control plane.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from kimia.errors import ConversationError
from kimia.sound import SAMPLE_BYTES
from kimia.stage import CODE_SECONDS
from kimia.v1.audio_pb2 import ENCODING_UNSPECIFIED, AudioFormat, Clip
from kimia.v1.conversation_pb2 import Message

SEGMENT_SECONDS = 30.0  # of sound that the encoders read at once
SEGMENT_POSITIONS = round(SEGMENT_SECONDS / CODE_SECONDS)  # 375
GOES_ON = "+"
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


# ---- segments ---------------------------------------------------------------------------------------------------


def early_bytes(format: AudioFormat, segment: int) -> int | None:
    """Bytes of a clip with which its `segment` (from 0) can be encoded before the clip ends. None: only at the end."""
    if format.encoding not in SAMPLE_BYTES:
        return None
    seconds = (segment + 1) * SEGMENT_SECONDS + EARLY_SECONDS
    return round(seconds * format.sample_rate) * SAMPLE_BYTES[format.encoding]


def early_segments(format: AudioFormat, size: int) -> int:
    """How many segments of a clip can be encoded once so many bytes of it are there, though it may go on."""
    count = 0
    while (needed := early_bytes(format, count)) and needed <= size:
        count += 1
    return count


def contents(format: AudioFormat, pieces: Iterable[bytes]) -> Iterator[str]:
    """Names of what a clip's features depend on: one of each segment that can be encoded early, one of all the rest.

    SHA-256 of the format and of the bytes up to there, so equal sound has equal names wherever it comes from; GOES_ON
    behind it for a segment that is not the clip's last, since a clip that ends there has another last stretch.
    """
    digest = hashlib.sha256(format.SerializeToString())
    size, segment = 0, 0
    for piece in pieces:
        rest = piece
        while (needed := early_bytes(format, segment)) and needed <= size + len(rest):
            digest.update(rest[: needed - size])
            rest, size, segment = rest[needed - size :], needed, segment + 1
            yield digest.hexdigest() + GOES_ON
        digest.update(rest)
        size += len(rest)
    yield digest.hexdigest()
