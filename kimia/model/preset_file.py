"""Presets of one's own: a JSON file says how chunks are cut and solved. No torch is needed to read one.

    {"name": "calibrated",
     "commits": [6, 12, 24, 37],   tokens that each push commits; the last size repeats
     "look_ahead": 4,              tokens solved with a chunk and committed by the next
     "hold": 8, "context": 16,     mel frames that a seam renders again, and of their past before them
     "kv_window": 900,             mel frames remembered
     "times": [0, 0.02, ..., 1]}   where the flow is evaluated; the last is where it ends

Whatever else stands in it (what was measured, say) is for people. `kimia calibrate-flow` writes such files; a process
learns them at its start (`adopt`), since the orchestrator, the language model and the detokenizer must cut alike.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from kimia.errors import ParameterError
from kimia.model.schedule import BUILT_IN, SCHEDULES, Schedule, prefer_schedule

FRAMES_PER_TOKEN = 4  # mel frames, a constant of the release's code
LONGEST_NAME = 64
MOST_TIMES = 1001  # the network knows a thousand times
FOLDER = "presets"  # of a checkpoint
PRESET_SUFFIX = ".json"


@dataclass(frozen=True)
class PresetFile:
    """What a file says. Raises ParameterError when a number lies outside its domain."""

    schedule: Schedule
    hold: int
    context: int
    kv_window: int
    times: tuple[float, ...]

    def __post_init__(self) -> None:
        name, seen = self.schedule.name, self.hold + self.context
        if not 0 < len(name) <= LONGEST_NAME or not name.replace("-", "").replace("_", "").isalnum():
            raise ParameterError(f"a preset's name has 1..{LONGEST_NAME} letters, digits, - and _, got {name!r}")
        if name in BUILT_IN:  # refused where it is made, too: a model's folder with such a file could not be served
            raise ParameterError(f"there is another preset {name}; give it a name of its own")
        if self.hold < 0 or self.hold % FRAMES_PER_TOKEN or self.context < 0:
            raise ParameterError(f"preset {name}: hold must be a multiple of {FRAMES_PER_TOKEN}, context not negative")
        if seen > FRAMES_PER_TOKEN * min(self.schedule.commits):
            raise ParameterError(
                f"preset {name}: a seam looks {seen} mel frames back, more than the smallest chunk commits "
                f"({FRAMES_PER_TOKEN * min(self.schedule.commits)}); make hold and context smaller"
            )
        if self.kv_window < 1:
            raise ParameterError(f"preset {name}: needs kv_window >= 1")
        check_times(self.times)

    @classmethod
    def read(cls, path: Path) -> PresetFile:
        """Raises ParameterError for a file that cannot be read or holds no preset."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ParameterError(f"{path}: no preset can be read ({error})") from error
        if not isinstance(values, dict):
            raise ParameterError(f"{path}: a preset is one JSON object")
        try:
            return cls._of(values)
        except ParameterError as error:
            raise ParameterError(f"{path}: {error}") from None

    @classmethod
    def _of(cls, values: Mapping[str, Any]) -> PresetFile:
        name, commits, times = (
            _field(values, key, kind) for key, kind in (("name", str), ("commits", list), ("times", list))
        )
        look_ahead, hold, context, window = (
            _field(values, key, int) for key in ("look_ahead", "hold", "context", "kv_window")
        )
        if look_ahead < 1:
            raise ParameterError("look_ahead must be at least 1: without it a turn cannot be taken over")
        schedule = Schedule(
            name,
            commits=tuple(_number(size, int, "commits") for size in commits),
            look_ahead=look_ahead,
            waits_for_next=False,
            held=(hold // FRAMES_PER_TOKEN,),
        )
        return cls(schedule, hold, context, window, tuple(float(_number(time, float, "times")) for time in times))

    def write(self, path: Path, **remarks: Any) -> None:
        """Write it, with what else people should know."""
        schedule = self.schedule
        values = {
            "name": schedule.name,
            "commits": schedule.commits,
            "look_ahead": schedule.look_ahead,
            "hold": self.hold,
            "context": self.context,
            "kv_window": self.kv_window,
            "times": self.times,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**values, **remarks}, indent=1) + "\n", encoding="utf-8")


def check_times(times: Iterable[float]) -> None:
    """Raise ParameterError unless they rise from 0 to 1 and each is a time of its own to the network."""
    points = tuple(times)
    rising = all(first < second for first, second in pairwise(points))
    if not 2 <= len(points) <= MOST_TIMES or points[0] != 0 or points[-1] != 1 or not rising:
        raise ParameterError(f"times must rise from 0 to 1, 2..{MOST_TIMES} of them, got {list(points[:20])}")


def _field(values: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in values:
        raise ParameterError(f"{key} is missing")
    return _number(values[key], kind, key)


def _number(value: Any, kind: type, key: str) -> Any:
    wanted = (int, float) if kind is float else kind
    if not isinstance(value, wanted) or isinstance(value, bool):
        raise ParameterError(f"{key}: expected {kind.__name__}, got {value!r}")
    return value


# ---- what a process knows ---------------------------------------------------------------------------------------

ADOPTED: dict[str, PresetFile] = {}  # by name


def adopt(paths: Iterable[str | Path], default: str = "") -> None:
    """Let turns ask for the presets of these files; `default` is what a turn gets that names none.

    For the start of a process, before any turn. Raises ParameterError for a file that is no preset, a name that is
    taken, or a default that is unknown.
    """
    for path in paths:
        found = PresetFile.read(Path(path))
        name = found.schedule.name
        if name in SCHEDULES and ADOPTED.get(name) != found:
            raise ParameterError(f"{path}: there is another preset {name}; give it a name of its own")
        ADOPTED[name] = found
        SCHEDULES[name] = found.schedule
    if default:
        prefer_schedule(default)


def files_of(folder: Path) -> list[Path]:
    """The preset files of a checkpoint."""
    return sorted((folder / FOLDER).glob(f"*{PRESET_SUFFIX}"))
