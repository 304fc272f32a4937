"""Who is solved next, and what becomes of chunks whose turn ends or fails."""

import asyncio
from dataclasses import replace

import pytest
import torch

from kimia.compute import ComputeThread
from kimia.errors import ParameterError
from kimia.model.chunking import pushes
from kimia.model.presets import LOW_LATENCY
from services.detokenizer.scheduler import Scheduler, most_urgent
from tests.model.tiny_detokenizer import FLOW, random_detokenizer

pytestmark = pytest.mark.parity

QUICK = replace(LOW_LATENCY, ode_points=4)


def codes(count: int, start: int = 0) -> list[int]:
    return [(start + 3 * index) % FLOW.audio_codes for index in range(count)]


@pytest.fixture
def scheduler():
    threads = ComputeThread(), ComputeThread()
    yield Scheduler(random_detokenizer(), *threads)
    for thread in threads:
        thread.close()


class Groups(list):
    """The chunks of every evaluation, by the seconds at which they are due; `hold` keeps the first one waiting."""

    def __init__(self, scheduler, hold=None):
        super().__init__()
        self.scheduler = scheduler
        self.hold = hold
        self.advance = scheduler._engine.advance
        scheduler._engine.advance = self.note

    def note(self, solvings):
        due = {id(job.begun.solving): job.due for job in self.scheduler._jobs}
        self.append([due[id(solving)] for solving in solvings])
        if self.hold:
            asyncio.run_coroutine_threadsafe(self.hold(), self.scheduler.loop).result(10)
            self.hold = None
        self.advance(solvings)


async def spoken(scheduler, seed, count=60, due=0.0):
    stream = scheduler.detokenizer.stream(QUICK, seed)
    made = [await scheduler.push(stream, push, due) for push in pushes(QUICK, codes(count, seed))]
    assert all(seconds > 0 for _, seconds in made)
    return torch.cat([pcm for pcm, _ in made])


@pytest.mark.parametrize(("most", "error"), [(1, 0.0), (100, 1e-4)], ids=["as on a CPU", "together"])
async def test_turns_at_once_are_as_each_alone(scheduler, most, error):
    scheduler._most = most
    expected = [scheduler.detokenizer.synthesize(codes(60, seed), QUICK, seed) for seed in range(4)]
    groups = Groups(scheduler)
    got = await asyncio.gather(*(spoken(scheduler, seed) for seed in range(4)))
    assert (max(len(group) for group in groups) > 1) == (most > 1)
    for one, other in zip(got, expected, strict=True):
        assert (one - other).abs().max() <= error


async def test_who_is_due_first_is_solved_first_and_the_rest_goes_on_behind(scheduler):
    scheduler.loop = asyncio.get_running_loop()
    urgent = []

    async def come_between():
        urgent.append(asyncio.create_task(spoken(scheduler, 1, count=4, due=1.0)))
        await asyncio.sleep(0)

    groups = Groups(scheduler, come_between)
    late = await spoken(scheduler, 2, count=4, due=2.0)
    early = await urgent[0]
    assert groups == [[2.0], [1.0], [1.0], [1.0], [2.0], [2.0]]
    assert torch.equal(late, scheduler.detokenizer.synthesize(codes(4, 2), QUICK, 2))
    assert torch.equal(early, scheduler.detokenizer.synthesize(codes(4, 1), QUICK, 1))


def test_an_evaluation_is_filled_with_the_most_urgent(scheduler):
    class Due:
        def __init__(self, due, frames):
            self.due = due
            self.begun = self
            self.solving = self
            self.chunk = self
            self.frames = frames

    jobs = [Due(3, 10), Due(1, 60), Due(2, 40), Due(4, 1)]
    assert [job.due for job in most_urgent(jobs, 100)] == [1, 2]
    assert [job.due for job in most_urgent(jobs, 1000)] == [1, 2, 3, 4]
    assert [job.due for job in most_urgent(jobs, 50)] == [1]


async def test_who_leaves_is_solved_no_further(scheduler):
    scheduler.loop = asyncio.get_running_loop()

    async def leave():
        turn.cancel()
        await asyncio.sleep(0)

    groups = Groups(scheduler, leave)
    turn = asyncio.create_task(spoken(scheduler, 1))
    with pytest.raises(asyncio.CancelledError):
        await turn
    await scheduler.flow.turn().run(len, ())
    assert len(groups) == 1


async def test_a_failure_is_its_own_turns_alone(scheduler):
    stream = scheduler.detokenizer.stream(QUICK, 1)
    [bad, *_] = pushes(QUICK, [FLOW.audio_codes] * 20)
    failed, fine = await asyncio.gather(scheduler.push(stream, bad, 0.0), spoken(scheduler, 2), return_exceptions=True)
    assert isinstance(failed, ParameterError)
    assert torch.equal(fine, scheduler.detokenizer.synthesize(codes(60, 2), QUICK, 2))


async def test_an_evaluation_that_fails_ends_what_it_held_and_nothing_else(scheduler):
    def broken(_):
        scheduler._engine.advance = advance
        raise MemoryError("too much")

    advance, scheduler._engine.advance = scheduler._engine.advance, broken
    with pytest.raises(MemoryError):
        await spoken(scheduler, 1)
    assert torch.equal(await spoken(scheduler, 1), scheduler.detokenizer.synthesize(codes(60, 1), QUICK, 1))
