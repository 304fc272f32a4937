"""How a detokenizer run is cut and solved: the release's schedule, and one made for short waiting.

A non-final push commits all its tokens but the last `look_ahead`, which only show the network what comes next and are
solved again with the following push. Chunk boundaries depend on the preset and the index of the code alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from kimia.errors import ParameterError
from kimia.model.bigvgan import MEL_FLOOR
from kimia.model.crossfade import OverlapSeam, ReleaseSeam, Seam
from kimia.model.flow import NEURAL_ODE_EULER, time_grid


@dataclass(frozen=True)
class Preset:
    """One way of streaming. Raises ParameterError when a number lies outside its domain."""

    name: str
    commits: tuple[int, ...]  # tokens that each non-final push commits; the last size repeats
    look_ahead: int  # tokens solved with a chunk but committed by the next
    waits_for_next: bool  # a full push waits for one code more, which proves that it is not the last
    seam: Seam  # how chunks are joined
    prompt_padding: float  # log-mel value of prompt frames that the prompt's waveform does not cover
    max_positions: int | None  # forget when position + 2 x committed frames pass it; None: only when positions run out
    kv_window: int = 900  # mel frames remembered (18 s at 50 Hz)
    ode_points: int = 30  # points of the time grid
    solver: str = NEURAL_ODE_EULER

    def __post_init__(self) -> None:
        if not self.commits or min(self.commits) < 1:
            raise ParameterError(f"preset {self.name}: every push must commit at least one token, got {self.commits}")
        if self.look_ahead < 0 or self.kv_window < 1:
            raise ParameterError(f"preset {self.name}: needs look_ahead >= 0 and kv_window >= 1")
        time_grid(self.ode_points, self.solver)

    def push_size(self, index: int) -> int:
        """Tokens of the non-final push `index`: the first also brings the look-ahead of all later ones."""
        committed = self.commits[min(index, len(self.commits) - 1)]
        return committed + (self.look_ahead if index == 0 else 0)


# Pushes of 30 tokens, as in the release, which learns of the end of the answer before it synthesises anything.
UPSTREAM = Preset(
    name="upstream",
    commits=(18, 30),
    look_ahead=12,
    waits_for_next=True,
    seam=ReleaseSeam(),
    prompt_padding=0.0,  # far above the mean of a log-mel, but what the release does
    max_positions=4096,
)

# First audio after 10 codes; chunks grow to the 3 s that the network was trained on (chunk_params.max_chunk).
# The first chunk is exactly what the seam wants to see again of it.
LOW_LATENCY = Preset(
    name="low-latency",
    commits=(6, 12, 24, 37),
    look_ahead=4,
    waits_for_next=False,
    seam=OverlapSeam(hold=8, context=16),
    prompt_padding=math.log(MEL_FLOOR),
    max_positions=None,
)

PRESETS = {preset.name: preset for preset in (UPSTREAM, LOW_LATENCY)}


def find_preset(name: str) -> Preset:
    """A preset by its name. Raises ParameterError that lists the names."""
    if name not in PRESETS:
        raise ParameterError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
