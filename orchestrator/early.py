"""Tells the tokenizers of sound that is complete while its caller still speaks."""

from __future__ import annotations

from contextlib import suppress

from kimia.clips import early_segments
from kimia.errors import UnavailableError
from kimia.streams.early import Early
from kimia.v1.audio_pb2 import AudioFormat, Clip
from kimia.v1.conversation_pb2 import ROLE_USER, Message
from kimia.v1.turn_pb2 import Turn
from orchestrator.copies import TurnCopy


class EarlySound:
    """What one call has told of the clip that it collects."""

    def __init__(self, early: Early) -> None:
        self._early = early
        self._clip = "", 0  # turn and number
        self._counted = 0  # chunks of the turn's input
        self._bytes = 0  # of the clip
        self._told = 0  # segments of it

    async def stored(self, opened: TurnCopy, form: AudioFormat) -> None:
        """More input of an open turn lies in the journal. A segment is told once; that it is told is not sure."""
        if opened.turn_id != self._clip[0]:
            self._counted = 0
        new = opened.input[self._counted :]
        self._counted = len(opened.input)
        for chunk in new:
            if (clip := (opened.turn_id, chunk.input.clip)) != self._clip:
                self._clip, self._bytes, self._told = clip, 0, 0
            self._bytes += len(chunk.input.data)
        segments = early_segments(form, self._bytes)
        if segments > self._told:
            self._told = segments
            with suppress(UnavailableError):
                await self._early.offer(_turn(opened.turn, form, self._clip[1]))


def _turn(turn: Turn, form: AudioFormat, clip: int) -> Turn:
    message = Message(role=ROLE_USER, audio=Clip(format=form, number=clip))
    return Turn(id=turn.id, session_id=turn.session_id, caller=turn.caller, messages=[message])
