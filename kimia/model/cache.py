"""The KV cache of a batch of turns: a state object apart from the weights.

Slot i holds layer i: the trunk first, then the audio branch (`layers + j`). Keys are stored after the rotary
embedding. Room grows geometrically, so a step never copies the past; a slot that is never written (the audio branch
in text mode) takes no memory.

Each slot knows how many positions of each row it holds. Savings leave slots behind: after the end of the text the
layers above the fork stop. A slot that has fallen behind has a hole and may not be used again in its turn; `append`
refuses it instead of reading zeros.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

SMALLEST_ROOM = 256  # positions


class Cache(Protocol):
    """What a forward pass asks of a cache; there is one of a batch, and two of a turn (`kimia.model.turn_cache`,
    `kimia.model.paged`)."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions per row."""

    def append(
        self, slot: int, k: Tensor, v: Tensor, positions: Tensor, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Store new positions of a slot; its keys and values so far."""


class GrowingCache(Cache, Protocol):
    """The cache of one turn, which is read in pieces and then grows step by step."""

    length: int

    @property
    def nbytes(self) -> int:
        """What the cache holds, room included."""

    def reserve(self, positions: int) -> None:
        """Room for so many positions altogether."""

    def advance(self, positions: int) -> None:
        """So many positions have been written to all slots."""

    def cut(self, positions: int) -> None:
        """Forget what lies behind so many positions."""


class KVCache:
    """Keys and values per slot, (rows, kv_heads, room, head_dim), and the positions each row holds in it."""

    def __init__(self, rows: int, slots: int) -> None:
        self.rows = rows
        self.keys: list[Tensor | None] = [None] * slots
        self.values: list[Tensor | None] = [None] * slots
        self.filled: list[tuple[int, ...]] = [(0,) * rows for _ in range(slots)]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions per row; the first layer is never skipped."""
        return self.filled[0]

    def append(
        self, slot: int, k: Tensor, v: Tensor, positions: Tensor, counts: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Store T new positions behind each row's past and return the slot's keys and values so far.

        k, v (rows, kv_heads, T, D) of `positions` (rows, T); of a row's T positions the first `counts[row]` are real,
        the others are padding that the next append overwrites -> two (rows, kv_heads, S, D), S = longest past + T.
        """
        starts = self.filled[slot]
        self._check_no_hole(slot, starts, counts)
        end = max(starts) + k.shape[2]
        keys = self.keys[slot] = _with_room(self.keys[slot], k, end)
        values = self.values[slot] = _with_room(self.values[slot], v, end)
        if min(starts) == max(starts):
            keys[:, :, end - k.shape[2] : end] = k
            values[:, :, end - k.shape[2] : end] = v
        else:
            rows = torch.arange(self.rows, device=k.device)[:, None]  # (rows, 1)
            keys[rows, :, positions] = k.transpose(1, 2)  # (rows, T, kv_heads, D)
            values[rows, :, positions] = v.transpose(1, 2)
        self.filled[slot] = tuple(start + count for start, count in zip(starts, counts, strict=True))
        return keys[:, :, :end], values[:, :, :end]

    def _check_no_hole(self, slot: int, starts: tuple[int, ...], counts: tuple[int, ...]) -> None:
        expected = starts if slot == 0 else tuple(a - b for a, b in zip(self.lengths, counts, strict=True))
        if starts != expected:
            raise RuntimeError(
                f"cache slot {slot} holds {starts} positions where the turn stands at {expected}: "
                "its layer was skipped earlier in this turn and cannot be used again"
            )


def _with_room(store: Tensor | None, new: Tensor, end: int) -> Tensor:
    """The store itself if it has `end` positions, else a larger zeroed one with its content.

    Zeros, not uninitialised memory: masked keys have weight 0, and 0 x NaN would be NaN.
    """
    if store is not None and end <= store.shape[2]:
        return store
    past = 0 if store is None else store.shape[2]
    rows, heads, _, width = new.shape
    larger = new.new_zeros(rows, heads, max(end, 2 * past, SMALLEST_ROOM), width)
    if store is not None:
        larger[:, :, :past] = store
    return larger
