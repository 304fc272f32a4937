"""How far a stage may run: numbers on a clock of the test's own, and a gate that gives the row to others."""

import asyncio
import time

import pytest

from kimia.errors import ParameterError
from kimia.model.schedule import LOW_LATENCY, UPSTREAM
from kimia.runtime.pacing import Gate, Pace, sound_seconds
from kimia.runtime.rows import Row, Rows
from kimia.stage import CODE_SECONDS, DETOKENIZER, LLM, TOKENIZER
from kimia.streams.journal import Playback
from kimia.v1.conversation_pb2 import TurnOptions
from kimia.v1.turn_pb2 import Chunk, Encoded, Speech, Step
from tests.runtime.workers import ROUTE, new_turn

pytestmark = pytest.mark.unit

LEAD = 4.0
RATE = 24000


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def pace_of(kind, clock, lead=LEAD, route=ROUTE, **turn):
    return Pace(new_turn(route=route, **turn), kind, lead, clock)


def step(index, **more):
    return Chunk(index=index, step=Step(code=1), **more)


def speech(seconds, **more):
    return Chunk(speech=Speech(pcm=bytes(2 * round(seconds * RATE)), sample_rate=RATE), **more)


@pytest.mark.parametrize(("preset", "schedule"), [("", LOW_LATENCY), ("upstream", UPSTREAM)])
@pytest.mark.parametrize("heard", [0.0, 0.5, 3.3, 7.0])
def test_the_llm_runs_to_the_last_code_of_the_chunk_that_reaches_the_lead(preset, schedule, heard):
    pace = pace_of(LLM, Clock(), options=TurnOptions(preset=preset))
    pace.heard(Playback(heard, 0.0))
    codes = 0
    pace.made(Chunk(step=Step()))  # of the delay: no code
    while not pace.wait:
        pace.made(step(codes))
        codes += 1
    speech_seconds = [schedule.spoken(count) * CODE_SECONDS for count in range(codes + 1)]
    assert speech_seconds[codes] >= heard + LEAD > speech_seconds[codes - 1]
    assert codes - schedule.spoken(codes) == schedule.look_ahead + schedule.waits_for_next + held(schedule, codes)


def held(schedule, codes):
    pushes = sum(schedule.spoken(count) != schedule.spoken(count - 1) for count in range(1, codes + 1))
    return schedule.held[(pushes - 1) % len(schedule.held)]


def test_the_last_stage_gives_out_the_chunk_that_reaches_the_lead():
    clock = Clock()
    pace = pace_of(DETOKENIZER, clock)
    pace.heard(Playback(0.0, 0.0))
    for seconds, wait in ((0.5, 0.0), (1.5, 0.0), (1.9, 0.0), (3.0, 2.9)):
        pace.made(speech(seconds))
        assert pace.wait == pytest.approx(wait)
    clock.now += 2.9
    assert pace.wait == pytest.approx(0.0)


def test_both_stages_stop_and_go_on_at_the_same_position():
    clock = Clock()
    llm, last = (pace_of(kind, clock) for kind in (LLM, DETOKENIZER))
    for pace in (llm, last):
        pace.heard(Playback(0.0, 0.0))
    given = 0
    for count in range(200):
        llm.made(step(count))
        spoken = LOW_LATENCY.spoken(count + 1)
        if spoken > given:
            last.made(speech((spoken - given) * CODE_SECONDS))
            given = spoken
        assert llm.wait == pytest.approx(last.wait, abs=1e-9)


def test_between_two_reports_the_caller_hears_in_real_time():
    clock = Clock()
    pace = pace_of(DETOKENIZER, clock)
    pace.made(speech(10.0))
    assert pace.wait == 0.0  # nobody has said anything: the client may write a file
    pace.heard(Playback(1.0, 0.5))
    assert pace.wait == pytest.approx(4.5)
    clock.now += 2.0
    assert pace.wait == pytest.approx(2.5)
    pace.heard(Playback(1.2, 0.0))  # its player stood still
    assert pace.wait == pytest.approx(4.8)
    pace.heard(Playback(9.0, 0.0))
    assert pace.wait == 0.0


def test_behind_the_last_chunk_there_is_nothing_to_wait_for():
    pace = pace_of(DETOKENIZER, Clock())
    pace.heard(Playback(0.0, 0.0))
    pace.made(speech(10.0, final=True))
    assert pace.wait == 0.0


def test_nobody_waits_beyond_the_deadline():
    clock, turn = Clock(), new_turn()
    turn.deadline.FromMicroseconds(round((time.time() + 3.0) * 1e6))
    pace = Pace(turn, DETOKENIZER, LEAD, clock)
    pace.heard(Playback(0.0, 0.0))
    pace.made(speech(60.0))
    assert pace.wait == pytest.approx(3.0, abs=1.0)
    clock.now += 4.0
    assert pace.wait == 0.0


@pytest.mark.parametrize(("kind", "route"), [(TOKENIZER, ROUTE), (LLM, ROUTE[:2])], ids=["tokenizer", "text"])
def test_what_is_not_heard_is_not_paced(kind, route):
    pace = pace_of(kind, Clock(), route=route)
    pace.heard(Playback(0.0, 0.0))
    for index in range(200):
        pace.made(step(index))
    assert (pace.paced, pace.wait) == (False, 0.0)


def test_a_preset_that_is_not_known_is_refused():
    with pytest.raises(ParameterError, match="low-latency, upstream"):
        pace_of(LLM, Clock(), options=TurnOptions(preset="fast"))


def test_chunks_stand_for_sound():
    assert sound_seconds(speech(1.5)) == 1.5
    assert sound_seconds(step(0)) == CODE_SECONDS
    assert sound_seconds(Chunk(encoded=Encoded(codes=[1, 2]))) == 2 * CODE_SECONDS


# ---- the gate ---------------------------------------------------------------------------------------------------


def gate_of(rows, lead=LEAD):
    assert rows.try_acquire()
    return Gate(Pace(new_turn(), DETOKENIZER, lead), Row(rows), "detokenizer")


async def parked(rows, count):
    async with asyncio.timeout(5):
        while rows.parked != count:
            await asyncio.sleep(0.001)


async def test_a_stage_that_is_far_enough_gives_its_row_away_until_the_caller_has_heard_more():
    rows = Rows(1)
    gate = gate_of(rows)
    gate.heard(Playback(0.0, 0.0))
    gate.pace.made(speech(60.0))
    passing = asyncio.create_task(gate.passed())
    await parked(rows, 1)
    assert rows.try_acquire()
    gate.heard(Playback(5.0, 0.0))  # not enough
    await asyncio.sleep(0.01)
    gate.heard(Playback(58.0, 0.0))
    await asyncio.sleep(0.01)
    assert not passing.done()  # it is wanted, and has no row
    rows.release()
    await passing
    assert (rows.used, rows.parked) == (1, 0)
    assert gate.seconds > 0


async def test_it_goes_on_by_itself_as_time_passes():
    rows = Rows(1)
    gate = gate_of(rows)
    gate.heard(Playback(0.0, 0.0))
    gate.pace.made(speech(LEAD + 0.05))
    async with asyncio.timeout(5):
        await gate.passed()
    assert gate.pace.wait == 0.0
    assert (rows.used, rows.parked) == (1, 0)


@pytest.mark.parametrize(("seconds", "gives_way"), [(3.9, False), (4.0, True)])
async def test_a_turn_of_which_nobody_says_how_far_it_was_heard_gives_way_once_it_has_its_lead(seconds, gives_way):
    rows = Rows(1)
    first = gate_of(rows)
    first.heard(Playback(0.0, 0.0))
    first.pace.made(speech(60.0))
    waiting = asyncio.create_task(first.passed())
    await parked(rows, 1)
    second = gate_of(rows)
    second.pace.made(speech(seconds))
    await second.passed()  # nobody asks for its row
    first.heard(Playback(58.0, 0.0))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    passing = asyncio.create_task(second.passed())
    for _ in range(5):
        await asyncio.sleep(0)
    assert (waiting.done(), passing.done()) == (gives_way, not gives_way)
    for task in (waiting, passing):
        task.cancel()
    await asyncio.gather(waiting, passing, return_exceptions=True)
