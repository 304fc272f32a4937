"""What a caller hears: speech is played in real time from its first piece on, and the player runs dry when the next
piece comes too late. Pure accounting; times are seconds of one clock, whichever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

Interval = tuple[float, float]  # begin, end


@dataclass
class Player:
    """Plays without any buffer in front: it begins with the first piece and waits for none that is there."""

    fed: float = 0.0  # seconds of speech so far
    dry_at: float = 0.0  # when all of it will have been played
    gaps: list[float] = field(default_factory=list)  # between two pieces
    reserves: list[float] = field(default_factory=list)  # speech not yet played when the next piece came
    dry: list[Dry] = field(default_factory=list)
    _last: float | None = None  # when the last piece came

    def feed(self, now: float, seconds: float) -> None:
        """A piece of speech has come."""
        if self._last is None:
            self.dry_at = now
        else:
            self.gaps.append(now - self._last)
            self.reserves.append(max(self.dry_at - now, 0.0))
            self._wait(now)
        self._last = now
        self.fed += seconds
        self.dry_at = max(self.dry_at, now) + seconds

    def heard(self, now: float) -> float:
        """Seconds of speech that were played until now."""
        return self.fed - max(self.dry_at - now, 0.0)

    def stop(self, now: float) -> None:
        """The caller interrupts an answer of which more was to come."""
        if self._last is not None:
            self._wait(now)

    def _wait(self, now: float) -> None:
        if now > self.dry_at and self._last is not None:
            self.dry.append(Dry(self.dry_at, now, self._last))


@dataclass(frozen=True)
class Dry:
    """An underrun: nothing to play from `begin` to `end`; the piece before it came at `since`."""

    begin: float
    end: float
    since: float

    @property
    def seconds(self) -> float:
        return self.end - self.begin


def played(arrivals: Iterable[tuple[float, float]], stopped: float | None = None) -> Player:
    """An answer from (time, seconds of speech) of its pieces; `stopped`: when its caller interrupted it."""
    player = Player()
    for now, seconds in arrivals:
        if stopped is not None and now > stopped:
            break
        player.feed(now, seconds)
    if stopped is not None:
        player.stop(stopped)
    return player


# ---- stalls -----------------------------------------------------------------------------------------------------


def union(intervals: Iterable[Sequence[float]]) -> list[Interval]:
    """The same time without overlap, in order."""
    merged: list[Interval] = []
    for begin, end in sorted((interval[0], interval[1]) for interval in intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def within(intervals: Iterable[Interval], begin: float, end: float) -> float:
    """Seconds of disjoint intervals that lie between two times."""
    return sum(max(min(high, end) - max(low, begin), 0.0) for low, high in intervals)


def unexplained(dry: Dry, stalls: Iterable[Interval]) -> float:
    """Seconds of an underrun that stalls do not account for.

    A stall can hold a piece up by no more than its own length, wherever it falls between the piece before and the late
    one: so much of the underrun is explained and no more.
    """
    return max(dry.seconds - within(stalls, dry.since, dry.end), 0.0)
