"""Positions reach the journal: the newest one, not too often, and late rather than never."""

import asyncio
from itertools import pairwise

import pytest

from kimia.errors import UnavailableError
from orchestrator.playback import PlaybackNotes

pytestmark = pytest.mark.unit

TURN = "s.1"


class Journal:
    """Writes down what is noted, and when; away for the first so many times."""

    def __init__(self, away=0):
        self.away = away
        self.noted = []
        self.moments = []

    async def note_playback(self, turn_id, playback):
        self.moments.append(asyncio.get_running_loop().time())
        if self.away:
            self.away -= 1
            raise UnavailableError("the journal is away")
        self.noted.append((turn_id, playback))

    async def until(self, count):
        async with asyncio.timeout(5):
            while len(self.noted) < count:
                await asyncio.sleep(0.001)
        return [playback.heard for _, playback in self.noted]


@pytest.fixture(autouse=True)
def pause(monkeypatch):
    monkeypatch.setattr("orchestrator.playback.PAUSE", 0.02)


async def test_of_many_positions_the_newest_is_written_and_not_too_often():
    journal = Journal()
    notes = PlaybackNotes(journal)
    for number in range(100):
        notes.add(TURN, number / 10, 0.0)
        await asyncio.sleep(0.001)
    while journal.noted[-1][1].heard != 9.9:
        await asyncio.sleep(0.001)
    heard = [playback.heard for _, playback in journal.noted]
    assert heard == sorted(set(heard))
    assert min(after - before for before, after in pairwise(journal.moments)) >= 0.019
    await notes.aclose()


async def test_a_position_that_waits_grows_old():
    clock = asyncio.get_running_loop().time
    journal = Journal(away=10**6)
    notes = PlaybackNotes(journal)
    before = clock()
    notes.add(TURN, 1.0, 0.5)
    added = clock()
    await asyncio.sleep(0.05)
    waited = clock() - added
    journal.away = 0
    await journal.until(1)
    ((_, playback),) = journal.noted
    assert 0.5 + waited <= playback.age <= 0.5 + clock() - before
    await notes.aclose()


async def test_a_journal_that_is_away_gets_it_when_it_is_back():
    journal = Journal(away=3)
    notes = PlaybackNotes(journal)
    notes.add(TURN, 1.0, 0.0)
    assert await journal.until(1) == [1.0]
    notes.add("s.2", 0.0, 0.0)
    await journal.until(2)
    assert journal.noted[1][0] == "s.2"
    await notes.aclose()


async def test_nothing_is_left_behind():
    notes = PlaybackNotes(Journal(away=10**6))
    await notes.aclose()
    notes.add(TURN, 1.0, 0.0)
    before = asyncio.all_tasks()
    await notes.aclose()
    assert asyncio.all_tasks() < before
