"""Each finished segment of a clip is told once, whatever comes between, and no call fails because of it."""

import pytest

from kimia.errors import UnavailableError
from kimia.v1.audio_pb2 import ENCODING_MULAW, AudioFormat
from kimia.v1.turn_pb2 import Caller, Chunk, InputAudio, Turn
from orchestrator.copies import TurnCopy
from orchestrator.early import EarlySound

pytestmark = pytest.mark.unit

PHONE = AudioFormat(encoding=ENCODING_MULAW, sample_rate=8000)
SECOND = bytes(8000)


class Early:
    def __init__(self):
        self.told = []
        self.down = False

    async def offer(self, turn):
        self.told.append((turn.id, turn.caller.tenant, turn.messages[0].audio.number))
        if self.down:
            raise UnavailableError("down")


def opened(turn_id="s.1", clips=()):
    copy = TurnCopy(Turn(id=turn_id, session_id="s", caller=Caller(tenant="t")), 1)
    add(copy, clips)
    return copy


def add(copy, clips):
    start = len(copy.input)
    copy.add([Chunk(index=start + at, input=InputAudio(clip=clip, data=SECOND)) for at, clip in enumerate(clips)])


async def test_a_segment_is_told_when_more_has_come_behind_it():
    early = Early()
    sound, copy = EarlySound(early), opened()
    for seconds in range(1, 63):
        add(copy, [0])
        await sound.stored(copy, PHONE)
        assert len(early.told) == (seconds > 30) + (seconds > 60)
    assert early.told == [("s.1", "t", 0)] * 2


async def test_clips_and_turns_are_counted_for_themselves():
    early = Early()
    sound, copy = EarlySound(early), opened(clips=[0] * 29)
    await sound.stored(copy, PHONE)
    add(copy, [1] * 31)
    await sound.stored(copy, PHONE)
    await sound.stored(opened("s.2", [0] * 20), PHONE)
    assert early.told == [("s.1", "t", 1)]


async def test_a_clip_that_another_connection_began_is_counted_from_its_beginning():
    early = Early()
    await EarlySound(early).stored(opened(clips=[0] * 31), PHONE)
    assert early.told == [("s.1", "t", 0)]


async def test_it_is_a_hint_only():
    early = Early()
    early.down = True
    await EarlySound(early).stored(opened(clips=[0] * 31), PHONE)
    assert len(early.told) == 1
