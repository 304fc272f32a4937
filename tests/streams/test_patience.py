"""An outage is waited out and told once."""

import asyncio

import pytest

from kimia.errors import NotFoundError, UnavailableError
from kimia.streams import patience
from kimia.streams.patience import LONGEST_PAUSE, Patience, end, pause_after

pytestmark = pytest.mark.unit


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    monkeypatch.setattr(patience, "FIRST_PAUSE", 1e-4)
    monkeypatch.setattr(patience, "LONGEST_PAUSE", 1e-3)


class Flaky:
    """Fails so many times, then answers."""

    def __init__(self, failures, error=UnavailableError):
        self.left = failures
        self.error = error

    async def __call__(self):
        self.left -= 1
        if self.left >= 0:
            raise self.error("down")
        return "answer"


async def test_the_answer_comes_as_soon_as_there_is_one():
    told = []
    waiting = Patience(lambda error: told.append(str(error)), lambda: told.append("found"))
    assert await waiting.reach(Flaky(0)) == "answer"
    assert told == []
    assert await waiting.reach(Flaky(5)) == "answer"
    assert told == ["down", "found"]
    assert not waiting.out


async def test_tasks_share_one_outage():
    told = []
    waiting = Patience(lambda error: told.append("lost"), lambda: told.append("found"))
    await asyncio.gather(*(waiting.reach(Flaky(3)) for _ in range(4)))
    assert told[0] == "lost"
    assert told[-1] == "found"
    assert told.count("lost") == told.count("found") == 1


async def test_nobody_need_listen_and_other_errors_pass():
    assert await Patience().reach(Flaky(2)) == "answer"
    with pytest.raises(NotFoundError):
        await Patience().reach(Flaky(1, NotFoundError))


def test_pauses_grow_up_to_a_bound():
    assert 0 < pause_after(1) <= 1e-4
    assert pause_after(3) > pause_after(1)
    assert pause_after(10_000) <= 1e-3 < LONGEST_PAUSE


async def test_tasks_that_swallow_a_cancellation_end_all_the_same(monkeypatch):
    monkeypatch.setattr(patience, "CANCEL_AGAIN", 0.001)
    swallowed = []

    async def stubborn(times):
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                swallowed.append(times)
                if swallowed.count(times) > times:
                    raise

    async def failing():
        raise ValueError

    tasks = [asyncio.create_task(task) for task in (stubborn(2), stubborn(0), failing())]
    await asyncio.sleep(0)
    await end(tasks)
    await end([])
    assert all(task.done() for task in tasks)
    assert (swallowed.count(2), swallowed.count(0)) == (3, 1)
