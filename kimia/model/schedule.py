"""How a stream of semantic tokens is cut into chunks of speech: numbers alone, needed where there is no torch.

`kimia.model.presets` adds how a chunk is solved and joined.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from kimia.errors import ParameterError


@dataclass(frozen=True)
class Schedule:
    """The cuts of one preset. Raises ParameterError when a number lies outside its domain."""

    name: str
    commits: tuple[int, ...]  # tokens that each non-final push commits; the last size repeats
    look_ahead: int  # tokens solved with a chunk but committed by the next
    waits_for_next: bool  # a full push waits for one code more, which proves that it is not the last
    held: tuple[int, ...] = field(default=(0,), kw_only=True)  # committed tokens that are held back after each push

    def __post_init__(self) -> None:
        if not self.commits or min(self.commits) < 1:
            raise ParameterError(f"preset {self.name}: every push must commit at least one token, got {self.commits}")
        if self.look_ahead < 0:
            raise ParameterError(f"preset {self.name}: needs look_ahead >= 0")

    def commit(self, index: int) -> int:
        """Tokens that the non-final push `index` commits."""
        return self.commits[min(index, len(self.commits) - 1)]

    def push_size(self, index: int) -> int:
        """Tokens of the non-final push `index`: the first also brings the look-ahead of all later ones."""
        return self.commit(index) + (self.look_ahead if index == 0 else 0)

    def spoken(self, codes: int) -> int:
        """Tokens whose speech is given out once so many have come and the end is not known; `held` sizes take turns."""
        pushes = committed = 0
        while committed + self.commit(pushes) + self.look_ahead + self.waits_for_next <= codes:
            committed += self.commit(pushes)
            pushes += 1
        return committed - self.held[(pushes - 1) % len(self.held)] if pushes else 0


# First audio after 10 codes; chunks grow to the 3 s that the network was trained on (chunk_params.max_chunk).
LOW_LATENCY = Schedule("low-latency", commits=(6, 12, 24, 37), look_ahead=4, waits_for_next=False, held=(2,))
# Pushes of 30 tokens, as in the release. Its seam holds back half of what it has: 9 tokens and 21, in turn.
UPSTREAM = Schedule("upstream", commits=(18, 30), look_ahead=12, waits_for_next=True, held=(9, 21))

# What turns may ask for; the first is for those that name none. Files add to it (`kimia.model.preset_file`).
BUILT_IN = {schedule.name: schedule for schedule in (LOW_LATENCY, UPSTREAM)}
SCHEDULES = dict(BUILT_IN)


def default_name() -> str:
    """The preset of a turn that names none."""
    return next(iter(SCHEDULES))


def find_schedule(name: str) -> Schedule:
    """The schedule of a preset by its name; the default for an empty one. Raises ParameterError with all names."""
    if (name or default_name()) not in SCHEDULES:
        raise ParameterError(f"preset must be one of {', '.join(SCHEDULES)}, got {name!r}")
    return SCHEDULES[name or default_name()]


def prefer_schedule(name: str) -> None:
    """Make it the default. For the start of a process. Raises ParameterError for an unknown name."""
    first = find_schedule(name)
    others = {other: schedule for other, schedule in SCHEDULES.items() if other != name}
    SCHEDULES.clear()
    SCHEDULES.update({name: first, **others})
