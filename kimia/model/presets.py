"""How a detokenizer run is cut and solved: the release's schedule, one made for short waiting, and those of files.

A non-final push commits all its tokens but the last `look_ahead`, which only show the network what comes next and are
solved again with the following push. Chunk boundaries depend on the preset and the index of the code alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from kimia.errors import ParameterError
from kimia.model import schedule
from kimia.model.bigvgan import MEL_FLOOR
from kimia.model.crossfade import OverlapSeam, ReleaseSeam, Seam
from kimia.model.flow import NEURAL_ODE_EULER, TimeGrid, placed_grid, time_grid
from kimia.model.preset_file import ADOPTED, PresetFile
from kimia.model.schedule import Schedule, find_schedule


@dataclass(frozen=True)
class Preset(Schedule):
    """One way of streaming: the cuts, and how chunks are solved and joined. Raises ParameterError as Schedule does."""

    seam: Seam  # how chunks are joined
    prompt_padding: float  # log-mel value of prompt frames that the prompt's waveform does not cover
    max_positions: int | None  # forget when position + 2 x committed frames pass it; None: only when positions run out
    kv_window: int = 900  # mel frames remembered (18 s at 50 Hz)
    ode_points: int = 30  # points of the time grid
    solver: str = NEURAL_ODE_EULER
    times: tuple[float, ...] = ()  # the grid's points, where they are not evenly spaced: then they count alone

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kv_window < 1:
            raise ParameterError(f"preset {self.name}: needs kv_window >= 1")
        self.grid  # noqa: B018 (raises)

    @property
    def grid(self) -> TimeGrid:
        """Where the flow is evaluated."""
        return placed_grid(self.times) if self.times else time_grid(self.ode_points, self.solver)


# The release learns of the end of the answer before it synthesises anything.
UPSTREAM = Preset(
    **vars(schedule.UPSTREAM),
    seam=ReleaseSeam(),
    prompt_padding=0.0,  # far above the mean of a log-mel, but what the release does
    max_positions=4096,
)

# The first chunk is exactly what the seam wants to see again of it.
LOW_LATENCY = Preset(
    **vars(schedule.LOW_LATENCY),
    seam=OverlapSeam(hold=8, context=16),
    prompt_padding=math.log(MEL_FLOOR),
    max_positions=None,
)

PRESETS = {preset.name: preset for preset in (UPSTREAM, LOW_LATENCY)}


def find_preset(name: str) -> Preset:
    """A preset by its name; the default for an empty one. Raises ParameterError that lists the names."""
    name = find_schedule(name).name
    return PRESETS[name] if name in PRESETS else preset_of(ADOPTED[name])


def preset_of(file: PresetFile) -> Preset:
    """What a file describes: joined as `low-latency` is."""
    return replace(
        LOW_LATENCY,
        **vars(file.schedule),
        seam=OverlapSeam(file.hold, file.context),
        kv_window=file.kv_window,
        times=file.times,
    )
