"""Solving the flow: from noise to a normalised mel in Euler steps over a fixed time grid.

The grids reproduce the release to the bit: time is a float32 and truncated to an integer index, so that 0.5 may
become index 499 (15 points), and N points mean N - 1 steps for the default solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kimia.errors import ParameterError
from kimia.model.dit import Chunk, DiT
from kimia.model.preset_file import check_times

NEURAL_ODE_EULER = "neural_ode_euler"  # Euler over N grid points: N - 1 evaluations, none at t = 1
NAIVE_EULER = "naive_euler"  # constant step at all N grid points, t = 1 included
SOLVERS = (NEURAL_ODE_EULER, NAIVE_EULER)

TIME_SCALE = 1000  # the network knows t in 0..1 as an integer index
COMMIT_TIME = 999  # index int(0.999 * 1000), at which the finished mel's keys and values are written
NAIVE_SPAN = 1 - 1e-4  # how far the constant steps reach


@dataclass(frozen=True)
class TimeGrid:
    """The evaluations of one solve."""

    indices: tuple[int, ...]  # time index of each evaluation
    sizes: tuple[float, ...]  # step taken after it


def time_grid(points: int, solver: str = NEURAL_ODE_EULER) -> TimeGrid:
    """The grid of `points` time points. Raises ParameterError for an unknown solver or too few points."""
    if solver not in SOLVERS:
        raise ParameterError(f"ODE solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    least = 2 if solver == NEURAL_ODE_EULER else 1
    if points < least:
        raise ParameterError(f"the {solver} solver needs at least {least} time points, got {points}")
    grid = torch.linspace(0, 1, points, dtype=torch.float32)
    return _between(grid) if solver == NEURAL_ODE_EULER else _constant(grid)


def placed_grid(times: Sequence[float]) -> TimeGrid:
    """The grid of these time points, which rise from 0 to 1. Raises ParameterError."""
    check_times(times)
    return _between(torch.tensor(times, dtype=torch.float32))


def _between(grid: Tensor) -> TimeGrid:
    # The release adds up its steps; neighbouring points differ by less than a factor of two (or start at 0), so their
    # difference is exact in float32 and the sum is the grid point itself. (Other grids are not compared with it.)
    return TimeGrid(tuple(int(time * TIME_SCALE) for time in grid[:-1]), tuple(grid.diff().tolist()))


def _constant(grid: Tensor) -> TimeGrid:
    return TimeGrid(tuple(int(time * TIME_SCALE) for time in grid), (NAIVE_SPAN / len(grid),) * len(grid))


def solve(dit: DiT, noise: Tensor, chunk: Chunk, grid: TimeGrid) -> Tensor:
    """Integrate from noise (B, T, M) to the normalised mel (B, T, M), float32 whatever the network computes in.

    The prefix inside `chunk.cache` stays as it is; the rows behind it hold the last evaluation's keys and values.
    """
    times = dit.embed_times(grid.indices)  # (N, D)
    x = noise
    for index, size in enumerate(grid.sizes):
        x = x + size * dit(x, times[index : index + 1], chunk).float()
    return x


def commit(dit: DiT, mel: Tensor, chunk: Chunk) -> None:
    """Write the keys and values of a finished normalised mel (B, T, M) at the end of `chunk.cache`."""
    dit(mel, dit.embed_times((COMMIT_TIME,)), chunk)
