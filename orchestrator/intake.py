"""How much a caller has sent for the next turn, and how much may come: what no context of the model could hold is
refused before it is stored.
"""

from __future__ import annotations

from kimia.errors import RequestError
from kimia.sound import bytes_per_sample
from kimia.v1.audio_pb2 import AudioFormat
from orchestrator.checks import LONGEST_CLIP, MOST_CLIPS, MOST_MESSAGES, MOST_TEXT, check_text_size, sound_seconds

SHORTEST_PIECE = 0.01  # seconds; a shorter piece takes an entry of the input log all the same, and counts as so long


class Intake:
    """Counts text and sound up to the next commit. Every method raises RequestError where it becomes too much."""

    def __init__(self, clip_bytes: int, turn_bytes: int) -> None:
        self._most = (clip_bytes, turn_bytes)
        self.clear()

    def clear(self) -> None:
        """It was committed, or given up."""
        self._messages = self._clips = self._text = 0
        self._clip_bytes = self._turn_bytes = 0
        self._seconds = 0.0

    def text(self, text: str, field: str) -> None:
        """One more text."""
        check_text_size(text, field)
        self._text += len(text.encode())
        self._message(field)
        if self._text > MOST_TEXT:
            raise RequestError(f"more than {MOST_TEXT} bytes of text were not committed; {_ADVICE}", field=field)

    def clip(self, field: str) -> None:
        """A stretch of sound begins."""
        self._clips += 1
        self._clip_bytes = 0
        self._message(field)
        if self._clips > MOST_CLIPS:
            raise RequestError(f"more than {MOST_CLIPS} stretches of sound were not committed; {_ADVICE}", field=field)

    def sound(self, data: bytes, form: AudioFormat, field: str) -> None:
        """One more piece of the last clip."""
        self.stored(len(data), form)
        clip_bytes, turn_bytes = self._most
        if self._seconds > LONGEST_CLIP:
            raise RequestError(f"more than {LONGEST_CLIP:g} s of sound were not committed; {_ADVICE}", field=field)
        if self._turn_bytes > turn_bytes:
            raise RequestError(f"more than {turn_bytes} bytes of sound were not committed; {_ADVICE}", field=field)
        if self._clip_bytes > clip_bytes:
            raise RequestError(f"more than {clip_bytes} bytes of sound came in one stretch; {_ADVICE}", field=field)

    def stored(self, size: int, form: AudioFormat) -> None:
        """A piece that was taken already: by an earlier connection, maybe. Never raises."""
        sample = bytes_per_sample(form.encoding)
        size = max(size, round(SHORTEST_PIECE * form.sample_rate) * sample)
        self._clip_bytes += size
        self._turn_bytes += size
        self._seconds += sound_seconds(size, form)

    def _message(self, field: str) -> None:
        self._messages += 1
        if self._messages > MOST_MESSAGES:
            raise RequestError(f"more than {MOST_MESSAGES} messages were not committed; {_ADVICE}", field=field)


_ADVICE = "commit, or clear"
