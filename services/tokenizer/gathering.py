"""The sound of a turn as it arrives, cut into the segments that the encoders read.

A segment of sound that comes as samples can be encoded as soon as its 30 s are there, while the caller still speaks; a
file only when it is complete. Either way the segments are those of the whole clip, sample by sample.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from kimia.clips import EARLY_SECONDS, Sound
from kimia.errors import AudioError, ConversationError
from kimia.model.audio import Resampling, Segment, cut, load_audio
from kimia.sound import SAMPLE_BYTES, check_format, decode
from kimia.v1.audio_pb2 import ENCODING_FILE
from kimia.v1.turn_pb2 import Chunk


class Gathering:
    """The clips of one turn."""

    def __init__(self, sounds: Mapping[int, Sound], rate: int, segment_samples: int) -> None:
        """`rate` in Hz and `segment_samples` are those of the encoders."""
        self._clips = {number: ClipReader(sound, rate, segment_samples) for number, sound in sounds.items()}

    @property
    def complete(self) -> int:
        """Clips that have ended."""
        return sum(clip.ended for clip in self._clips.values())

    def take(self, chunk: Chunk) -> ClipReader | None:
        """Store a piece; its clip, if there is something to read of it now. Raises ConversationError, AudioError."""
        if not chunk.HasField("input"):
            return None
        number = chunk.input.clip
        if number not in self._clips:
            raise ConversationError(f"sound came for clip {number}, which no message has; send what the turn names")
        clip = self._clips[number]
        clip.store(chunk.input.data, ends=chunk.input.clip_end)
        return clip if clip.ready else None

    def check_complete(self) -> None:
        """Raise AudioError when a clip has begun but not ended, or never came although it must be encoded."""
        for clip in self._clips.values():
            if clip.ended:
                continue
            if clip.begun:
                raise AudioError("its sound was cut off; mark the last piece as clip_end", clip.sound.index)
            if clip.sound.must_be_encoded:
                raise AudioError("its sound never came", clip.sound.index)


class ClipReader:
    """One clip: pieces of bytes in, segments out."""

    def __init__(self, sound: Sound, rate: int, segment_samples: int) -> None:
        self.sound = sound
        self.ended = False
        self.given = 0  # segments read so far
        self.seconds = 0.0  # spent on reading
        self._rate = rate
        self._segment_samples = segment_samples
        self._bytes = 0  # that have come
        self._unread = bytearray()
        self._wave = np.zeros(0, np.float32)  # read, and in no segment yet
        self._resampling: Resampling | None = None

    @property
    def begun(self) -> bool:
        """Whether anything of it has come."""
        return self._bytes > 0

    @property
    def ready(self) -> bool:
        """Whether `read` gives something: the clip has ended, or the next segment is there, and more behind it."""
        form = self.sound.clip.format
        if self.ended or form.encoding not in SAMPLE_BYTES:
            return self.ended
        seconds = (self.given + 1) * self._segment_samples / self._rate + EARLY_SECONDS
        return self._bytes >= seconds * form.sample_rate * SAMPLE_BYTES[form.encoding]

    def store(self, data: bytes, *, ends: bool) -> None:
        """One more piece. Raises AudioError behind the end."""
        if self.ended:
            raise AudioError("sound came after the end of its clip", self.sound.index)
        self._bytes += len(data)
        self._unread += data
        self.ended = ends

    def read(self) -> list[Segment]:
        """The segments that are complete, all of them once the clip has ended.

        Raises AudioError, naming the message, for sound that is none; RequestError for a wrong format.
        """
        begin = time.perf_counter()
        try:
            segments = self._read()
        except AudioError as error:
            raise AudioError(str(error), self.sound.index) from error
        finally:
            self.seconds += time.perf_counter() - begin
        self.given += len(segments)
        return segments

    def _read(self) -> list[Segment]:
        form = self.sound.clip.format
        kind = "audio" if self.sound.heard else "spoken.clip"
        check_format(form, f"messages[{self.sound.index}].{kind}.format", files=True)
        if not self._bytes:
            raise AudioError("the clip is empty (0 bytes)")
        if form.encoding == ENCODING_FILE:
            return cut(load_audio(bytes(self._unread), self._rate), self._segment_samples)
        self._wave = np.concatenate([self._wave, *self._samples()])
        count = len(self._wave)
        if not self.ended:
            count -= count % self._segment_samples
        pieces: Sequence[Segment] = cut(self._wave[:count], self._segment_samples) if count else ()
        self._wave = self._wave[count:]
        return [Segment(piece.samples, piece.whole and self.ended and not self.given) for piece in pieces]

    def _samples(self) -> list[np.ndarray]:
        """What has come since the last time, at the encoders' rate."""
        form = self.sound.clip.format
        if self._resampling is None:
            self._resampling = Resampling(form.sample_rate, self._rate)
        size = len(self._unread)
        if not self.ended:
            size -= size % SAMPLE_BYTES[form.encoding]
        unread, self._unread = self._unread, self._unread[size:]
        waves = [self._resampling.feed(decode(memoryview(unread)[:size], form)[:, None])]
        return [*waves, self._resampling.finish()] if self.ended else waves
