"""Chunks of many turns in one evaluation of the flow: what `solve` and `commit` do for one chunk, step by step.

A step may advance any chunks together, whatever their lengths, prefixes and places on their time grids, so who has
come last or waits most urgently joins at the next step. Alone, a chunk gets bit for bit what `solve` gives; beside
others its sums may come in another order.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from kimia.model.dit import Chunk, DiT, Packed
from kimia.model.flow import COMMIT_TIME, TimeGrid
from kimia.model.fused_flow import MODULATED_ROWS, FusedDiT


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
        self._ahead: tuple[int, Tensor] | None = None  # place of the first modulation that is made, and these

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
        self._ahead = None

    def modulation(self, fused: FusedDiT, times: Tensor) -> Tensor:
        """(n, 6 L + 2, D) of the step that comes next; `times` (N, D) are the embeddings of `place`."""
        _, at = self.place
        if self._ahead is None or not 0 <= at - self._ahead[0] < len(self._ahead[1]):
            steps = max(1, MODULATED_ROWS // self.chunk.tokens.shape[1])
            self._ahead = at, fused.modulate(times[at : at + steps, None], self.chunk.tokens[0])
        first, made = self._ahead
        return made[at - first]


class FlowEngine:
    """Advances chunks together. Time embeddings of a grid are computed once."""

    def __init__(self, dit: DiT) -> None:
        self._dit = dit
        self._fused = FusedDiT(dit)
        self._embedded: dict[tuple[int, ...], Tensor] = {}
        self._packed: Packed | None = None

    def solve(self, solving: Solving) -> None:
        """One chunk from its beginning to its end."""
        while not solving.done:
            self.advance([solving])

    def commit(self, mel: Tensor, chunk: Chunk) -> None:
        """Write the keys and values of a finished normalised mel (T, M) at the end of `chunk.cache`."""
        self._fused(mel, self._fused.modulate(self._times((COMMIT_TIME,))[:, None], chunk.tokens[0])[0], chunk)

    @torch.inference_mode()
    def advance(self, solvings: Sequence[Solving]) -> None:
        """One evaluation for each of these chunks, none of them done, together; it is over when this returns."""
        self._evaluate(solvings)
        if self._dit.device.type == "cuda":  # else the host would order steps far ahead, past whoever comes next
            torch.cuda.current_stream(self._dit.device).synchronize()

    def _evaluate(self, solvings: Sequence[Solving]) -> None:
        if len(solvings) == 1:
            [alone] = solvings
            modulation = alone.modulation(self._fused, self._times(alone.place[0]))
            alone.take(self._fused(alone.x[0], modulation, alone.chunk).float()[None])
            return
        packed = self._pack([solving.chunk for solving in solvings])
        times = [self._time(solving).expand(solving.chunk.tokens.shape[1], -1) for solving in solvings]
        modulation = self._fused.modulate(torch.cat(times)[None], packed.tokens[0])[0]
        velocity = self._fused(torch.cat([solving.x[0] for solving in solvings]), modulation, packed).float()
        for solving, own in zip(solvings, torch.split(velocity, packed.frames), strict=True):
            solving.take(own[None])

    def _time(self, solving: Solving) -> Tensor:
        """(1, D)."""
        indices, at = solving.place
        return self._times(indices)[at : at + 1]

    def _times(self, indices: tuple[int, ...]) -> Tensor:
        """(N, D)."""
        if indices not in self._embedded:
            self._embedded[indices] = self._dit.embed_times(indices)
        return self._embedded[indices]

    def _pack(self, chunks: list[Chunk]) -> Packed:
        """The same chunks mostly stay together for many steps."""
        held = self._packed
        if held is None or len(held.chunks) != len(chunks) or any(map(operator.is_not, held.chunks, chunks)):
            held = self._packed = Packed(chunks)
        return held
