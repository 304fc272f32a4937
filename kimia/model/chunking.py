"""Cutting a stream of semantic tokens into the pushes of a preset, without knowing where it ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kimia.model.schedule import Schedule


@dataclass(frozen=True)
class Push:
    """Tokens handed to the detokenizer at once."""

    tokens: tuple[int, ...]
    final: bool


class ChunkPlanner:
    """Fed one legal code at a time, says what to push; one planner per turn.

    The cuts depend on the preset and the index of the code, never on when codes arrive or whether the end is known.
    """

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._pending: list[int] = []
        self._pushes = 0

    def feed(self, code: int) -> Push | None:
        """Take the next code; the push that it completes, if any."""
        self._pending.append(code)
        size = self.schedule.push_size(self._pushes)
        if len(self._pending) < size + self.schedule.waits_for_next:
            return None
        tokens, self._pending = self._pending[:size], self._pending[size:]
        self._pushes += 1
        return Push(tuple(tokens), final=False)

    def finish(self) -> Push:
        """The last push: whatever is left, possibly nothing (it still brings out what was held back)."""
        tokens, self._pending = self._pending, []
        return Push(tuple(tokens), final=True)


def pushes(schedule: Schedule, codes: Iterable[int]) -> Iterator[Push]:
    """All pushes of a whole turn, the same as when its codes arrive one by one."""
    planner = ChunkPlanner(schedule)
    for code in codes:
        push = planner.feed(code)
        if push is not None:
            yield push
    yield planner.finish()
