"""Who takes steps together, who waits, and what a turn that does not ask costs: nothing."""

import asyncio
import math
import threading
from collections.abc import Iterator
from itertools import pairwise

import pytest

from kimia.compute import ComputeThread
from kimia.errors import NumericsError
from kimia.model.engine import Engine, context_bytes
from kimia.model.generate import GenerateOptions, generate
from kimia.model.lm import DualTrackLM, Row
from kimia.model.philox import Track
from kimia.model.prefix import Prefixes
from kimia.runtime.metrics import PREFIX_BYTES
from services.llm.scheduler import Answering, Scheduler
from tests.model.tiny_lm import TOKENS, WIDE, random_lm, random_row

pytestmark = pytest.mark.unit

SHORT = random_row(8, seed=11)
LONG = random_row(450, seed=12)


@pytest.fixture(scope="module")
def lm() -> DualTrackLM:
    return random_lm(WIDE, seed=3)


class Watched:
    """A scheduler, and what its engine was asked to do: ("read", turn) and ("step", turn, ...), by order of joining."""

    def __init__(self, lm: DualTrackLM, rows: int, prefixes: Prefixes | None = None) -> None:
        self.engine = Engine(lm, rows, prefixes)
        self.compute = ComputeThread()
        self.scheduler = Scheduler(self.engine, self.compute)
        self.turns: list[Answering] = []
        self.log: list[tuple] = []
        prefill, step = self.engine.prefill, self.engine.step

        def reading(answer):
            self.log.append(("read", self._number(answer)))
            prefill(answer)

        def stepping(answers):
            self.log.append(("step", *sorted(map(self._number, answers))))
            return step(answers)

        self.engine.prefill, self.engine.step = reading, stepping

    def _number(self, answer) -> int:
        return next(number for number, turn in enumerate(self.turns) if turn.answer is answer)

    def join(self, prompt=SHORT, steps=20, conversation="", **options) -> Answering:
        options = GenerateOptions("both", steps, **options)
        self.turns.append(self.scheduler.join(prompt, TOKENS, options, conversation))
        return self.turns[-1]

    async def idle(self) -> None:
        """Until nothing more is computed without being asked for."""
        while not self.scheduler._pump.done():
            await asyncio.sleep(0)


@pytest.fixture
def watched(lm: DualTrackLM) -> Iterator[Watched]:
    watched = Watched(lm, rows=4)
    yield watched
    watched.compute.close()


async def all_of(turn: Answering) -> list:
    try:
        steps = []
        while (step := await turn.next()) is not None:
            steps.append((step.text_id, step.audio_id))
        return steps
    finally:
        turn.leave()


def twin(lm: DualTrackLM, steps=20, **options) -> list:
    run = generate(lm, SHORT, TOKENS, GenerateOptions("both", steps, **options))
    return [(step.text_id, step.audio_id) for step in run]


async def test_turns_that_ask_at_once_step_together(watched: Watched, lm: DualTrackLM) -> None:
    turns = [watched.join(forced_text=(n,) * 30, seed=n) for n in range(4)]
    answers = await asyncio.gather(*map(all_of, turns))
    assert answers == [twin(lm, forced_text=(n,) * 30, seed=n) for n in range(4)]
    steps = [entry[1:] for entry in watched.log if entry[0] == "step"]
    assert steps.count((0, 1, 2, 3)) >= min(map(len, answers)) - 4  # the first ones begin while others are read


async def test_more_turns_than_rows_take_turns(watched: Watched) -> None:
    turns = [watched.join(forced_text=(1,) * 30, seed=9) for _ in range(6)]
    answers = await asyncio.gather(*map(all_of, turns))
    assert answers == answers[:1] * 6
    steps = [entry[1:] for entry in watched.log if entry[0] == "step"]
    assert max(map(len, steps)) == 4
    half = [number for step in steps[: len(steps) // 2] for number in step]
    counts = [half.count(number) for number in range(6)]
    assert max(counts) - min(counts) <= 6  # the first to be read begin a little earlier


async def test_a_long_prompt_stalls_nobody(watched: Watched) -> None:
    """Between two pieces of it everybody who speaks takes a step."""
    speaking, long = watched.join(forced_text=(1,) * 90, steps=60, seed=9), watched.join(LONG, steps=2)
    await speaking.next()
    watched.log.clear()
    await asyncio.gather(all_of(speaking), all_of(long))
    reads = [place for place, entry in enumerate(watched.log) if entry == ("read", 1)]
    assert len(reads) == -(-449 // watched.engine.piece)
    speaks = min(len(reads) - 1, sum(entry == ("step", 0) for entry in watched.log) - 2)
    assert speaks > 5
    assert all(("step", 0) in watched.log[one:other] for one, other in pairwise(reads[: speaks + 1]))


async def test_who_does_not_ask_takes_one_step_and_no_row(watched: Watched, lm: DualTrackLM) -> None:
    parked = [watched.join(forced_text=(n,) * 30, seed=n) for n in range(5)]
    for turn in parked:
        await turn.next()
    await watched.idle()
    assert [turn.answer.tracks.index for turn in parked] == [2] * 5
    other = watched.join(forced_text=(7,) * 30, seed=7)
    watched.log.clear()
    assert await all_of(other) == twin(lm, forced_text=(7,) * 30, seed=7)
    assert set(watched.log) == {("read", 5), ("step", 5)}
    rest = await asyncio.gather(*map(all_of, parked))
    assert [len(steps) for steps in rest] == [len(twin(lm, forced_text=(n,) * 30, seed=n)) - 1 for n in range(5)]


async def test_who_leaves_takes_no_step_more(watched: Watched) -> None:
    stays, leaves = watched.join(seed=9), watched.join(seed=9)
    await asyncio.gather(stays.next(), leaves.next())
    leaves.leave()
    await watched.idle()
    watched.log.clear()
    await all_of(stays)
    assert {entry[1:] for entry in watched.log} == {(0,)}


async def test_who_is_cancelled_while_it_is_read_is_read_no_further(watched: Watched) -> None:
    task = asyncio.create_task(all_of(watched.join(LONG)))
    while not watched.log:
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    await watched.idle()
    assert len(watched.log) <= 3


async def test_the_last_step_is_not_missed_by_who_asks_while_it_is_made(watched: Watched, monkeypatch) -> None:
    """The engine knows that the answer is over before the step has been given."""
    turn, made, released = watched.join(steps=2), threading.Event(), threading.Event()
    real = watched.engine.step

    def slow(answers):
        steps = real(answers)
        if answers[0].over:
            made.set()
            released.wait()
        return steps

    monkeypatch.setattr(watched.engine, "step", slow)
    await turn.next()
    await asyncio.to_thread(made.wait)
    asking = asyncio.create_task(turn.next())
    await asyncio.sleep(0)
    released.set()
    assert (await asking).stop == "max_new_tokens"
    assert await turn.next() is None


async def test_no_budget_no_step(watched: Watched) -> None:
    assert await all_of(watched.join(steps=0)) == []
    assert watched.log == []


async def test_what_breaks_one_turn_ends_one_turn(watched: Watched, monkeypatch) -> None:
    good, bad = watched.join(forced_text=(1,) * 30, seed=9), watched.join(seed=1)
    real = watched.engine._fused.step

    def poisoned(feeds, wanted):
        logits = real(feeds, wanted)
        logits[Track.TEXT] = math.nan
        return logits

    monkeypatch.setattr(watched.engine._fused, "step", poisoned)
    fine, broken = await asyncio.gather(all_of(good), all_of(bad), return_exceptions=True)
    assert len(fine) > 3
    assert isinstance(broken, NumericsError)


async def test_what_breaks_the_step_ends_all_that_took_it_and_nobody_after(watched: Watched, monkeypatch) -> None:
    turns = [watched.join(seed=n) for n in range(2)]
    monkeypatch.setattr(watched.engine, "step", lambda answers: 1 / 0)
    broken = await asyncio.gather(*map(all_of, turns), return_exceptions=True)
    assert [type(error) for error in broken] == [ZeroDivisionError] * 2
    monkeypatch.undo()
    assert await all_of(watched.join(seed=1))


async def test_time_is_shared_between_those_who_compute_together(watched: Watched) -> None:
    turns = [watched.join(forced_text=(1,) * 30, seed=9) for _ in range(3)]
    await asyncio.gather(*map(all_of, turns))
    assert sum(turn.seconds for turn in turns) == pytest.approx(watched.scheduler._compute.seconds)
    assert all(turn.seconds > 0 for turn in turns)


# ---- the next turn of a conversation ------------------------------------------------------------------------------

PROMPT, SPOKEN, QUESTION = random_row(150, seed=13), random_row(90, seed=14), random_row(30, seed=15)
NEXT = Row(
    PROMPT.audio_ids + SPOKEN.audio_ids + QUESTION.audio_ids, PROMPT.text_ids + SPOKEN.text_ids + QUESTION.text_ids
)


@pytest.fixture
def keeping(lm: DualTrackLM) -> Iterator[Watched]:
    watched = Watched(lm, rows=4, prefixes=Prefixes(8 * context_bytes(lm)))
    ahead = watched.engine.read_ahead
    watched.engine.read_ahead = lambda name: watched.log.append(("ahead", name)) or ahead(name)
    yield watched
    watched.compute.close()


async def first_turn(watched: Watched, conversation: str = "c", prompt: Row = PROMPT) -> None:
    turn = watched.join(prompt, conversation=conversation, seed=5)
    while await turn.next() is not None:
        pass
    turn.leave(SPOKEN)


async def second_turn(watched: Watched, conversation: str = "c") -> int:
    """Its answer is that of a whole prefill; how much it reused."""
    turn, alone = (watched.join(NEXT, conversation=name, seed=6) for name in (conversation, ""))
    one, other = await asyncio.gather(all_of(turn), all_of(alone))
    assert one == other
    return turn.answer.reused


async def test_in_idle_time_the_history_is_read_ahead(keeping: Watched) -> None:
    await first_turn(keeping)
    await keeping.idle()
    assert keeping.log[-2:] == [("ahead", "c")] * 2  # one piece, and none left
    assert PREFIX_BYTES._value.get() == keeping.engine.prefixes.nbytes > 0
    assert await second_turn(keeping) == 192


async def test_a_turn_that_comes_at_once_finds_what_was_read(keeping: Watched) -> None:
    await first_turn(keeping)
    assert await second_turn(keeping) == 128


async def test_nothing_is_read_ahead_while_somebody_asks(keeping: Watched) -> None:
    speaking = keeping.join(forced_text=(1,) * 90, steps=60, seed=9)
    await speaking.next()
    await first_turn(keeping)
    keeping.log.clear()
    await all_of(speaking)
    assert ("ahead", "c") not in keeping.log
    assert len(keeping.log) > 5
    await keeping.idle()
    assert keeping.log[-2:] == [("ahead", "c")] * 2


async def test_turns_that_have_what_they_need_for_now_hinder_nothing(keeping: Watched) -> None:
    parked = keeping.join(forced_text=(1,) * 90, steps=60, seed=9)
    await parked.next()
    await first_turn(keeping)
    await keeping.idle()
    assert keeping.log[-2:] == [("ahead", "c")] * 2
    assert len(await all_of(parked)) > 5


async def test_who_asks_while_it_is_quiet_comes_first(keeping: Watched) -> None:
    waiting = keeping.join(forced_text=(1,) * 90, steps=60, seed=9)
    await waiting.next()
    await keeping.idle()
    await first_turn(keeping)
    keeping.log.clear()
    await waiting.next()
    assert keeping.log == []  # it was there already
    await waiting.next()
    assert keeping.log[0] == ("step", 0)
    waiting.leave()


async def test_what_is_kept_makes_way_for_the_caches_of_turns(keeping: Watched) -> None:
    await first_turn(keeping)
    await keeping.idle()
    keeping.engine.prefixes.limit = keeping.engine.prefixes.nbytes + 1
    await all_of(keeping.join(LONG, steps=2))
    assert len(keeping.engine.prefixes) == 0
    assert await second_turn(keeping) == 0


async def test_a_conversation_is_forgotten(keeping: Watched) -> None:
    await first_turn(keeping)
    keeping.scheduler.forget("c".__eq__)
    await keeping.idle()
    assert len(keeping.engine.prefixes) == 0
    assert PREFIX_BYTES._value.get() == 0


async def test_a_conversation_that_does_not_go_on_is_forgotten(keeping: Watched, monkeypatch) -> None:
    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", lambda *call: calls.append(call))
    calls: list[tuple] = []
    await first_turn(keeping)
    await keeping.idle()
    monkeypatch.undo()
    [(seconds, expire, *what)] = [call for call in calls if call[0] > 60]
    assert seconds == keeping.engine.prefixes.life + 1
    expire(*what)
    await keeping.idle()
    assert len(keeping.engine.prefixes) == 1
    keeping.engine.prefixes.life = 0
    expire(*what)
    await keeping.idle()
    assert len(keeping.engine.prefixes) == 0


async def test_what_goes_wrong_in_idle_time_harms_nobody(keeping: Watched, monkeypatch) -> None:
    monkeypatch.setattr(keeping.engine, "read_ahead", lambda name: 1 / 0)
    await first_turn(keeping)
    await keeping.idle()
    assert len(keeping.engine.prefixes) == 0
    assert await second_turn(keeping) == 0


async def test_nothing_is_kept_of_a_turn_that_broke(keeping: Watched, monkeypatch) -> None:
    monkeypatch.setattr(keeping.engine, "step", lambda answers: 1 / 0)
    turn = keeping.join(PROMPT, conversation="c")
    with pytest.raises(ZeroDivisionError):
        await turn.next()
    turn.leave()
    await keeping.idle()
    assert len(keeping.engine.prefixes) == 0
