"""Chunks of many turns in one evaluation of the flow: what `solve` and `commit` do for one chunk, step by step.

A step may advance any chunks together, whatever their lengths, prefixes and places on their time grids, so who has
come last or waits most urgently joins at the next step. Alone, a chunk gets bit for bit what `solve` gives; beside
others its sums may come in another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kimia.model.dit import Chunk, DiT, Packed
from kimia.model.flow import COMMIT_TIME, TimeGrid


class Solving:
    """One chunk on its way from noise to the mel that stays."""

    def __init__(self, chunk: Chunk, noise: Tensor, grid: TimeGrid, kept: int, commits: bool) -> None:
        """Of the noise (1, T, M) the first `kept` tokens stay; `commits`: their keys and values are written at last."""
        self.chunk = chunk
        self.x = noise
        self.grid = grid
        self.kept = kept
        self.commits = commits
        self.solved = False
        self.done = False  # solved, and committed if it is to be: `x` is the normalised mel of the tokens kept
        self._taken = 0

    @property
    def place(self) -> tuple[tuple[int, ...], int]:
        """Time indices that are embedded together, and which of them comes next."""
        return ((COMMIT_TIME,), 0) if self.solved else (self.grid.indices, self._taken)

    def take(self, velocity: Tensor) -> None:
        """One step further, by the velocity (1, T, M) at `x`; that of the commit counts for nothing."""
        if self.solved:
            self.done = True
            return
        self.x = self.x + self.grid.sizes[self._taken] * velocity
        self._taken += 1
        if self._taken == len(self.grid.sizes):
            self.settle(self.x)

    def settle(self, x: Tensor) -> None:
        """The ODE is solved, (1, T, M): only what is kept goes on."""
        self.chunk = self.chunk.head(self.kept)
        self.x = x[:, : self.chunk.frames]
        self.solved = True
        self.done = not self.commits


class FlowEngine:
    """Advances chunks together. Time embeddings of a grid are computed once."""

    def __init__(self, dit: DiT) -> None:
        self._dit = dit
        self._embedded: dict[tuple[int, ...], Tensor] = {}
        self._packed: Packed | None = None

    @torch.inference_mode()
    def advance(self, solvings: Sequence[Solving]) -> None:
        """One evaluation for each of these chunks, none of them done, together; it is over when this returns."""
        self._evaluate(solvings)
        if self._dit.device.type == "cuda":  # else the host would order steps far ahead, past whoever comes next
            torch.cuda.current_stream(self._dit.device).synchronize()

    def _evaluate(self, solvings: Sequence[Solving]) -> None:
        if len(solvings) == 1:
            [alone] = solvings
            alone.take(self._dit(alone.x, self._time(alone), alone.chunk).float())
            return
        packed = self._pack([solving.chunk for solving in solvings])
        times = [self._time(solving).expand(solving.chunk.tokens.shape[1], -1) for solving in solvings]
        x = torch.cat([solving.x for solving in solvings], 1)
        velocity = self._dit(x, torch.cat(times)[None], packed).float()
        for solving, own in zip(solvings, torch.split(velocity, packed.frames, 1), strict=True):
            solving.take(own)

    def _time(self, solving: Solving) -> Tensor:
        """(1, D)."""
        indices, at = solving.place
        if indices not in self._embedded:
            self._embedded[indices] = self._dit.embed_times(indices)
        return self._embedded[indices][at : at + 1]

    def _pack(self, chunks: list[Chunk]) -> Packed:
        """The same chunks mostly stay together for many steps."""
        held = self._packed.chunks if self._packed else ()
        if len(held) != len(chunks) or any(one is not other for one, other in zip(held, chunks, strict=True)):
            self._packed = Packed(chunks)
        assert self._packed is not None
        return self._packed
