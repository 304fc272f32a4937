"""The KV cache of one turn among others: what a turn keeps of its own, while its row in the batch changes.

All layers lie in one tensor, so that one call gives a step's views of every layer. A turn that waits keeps its cache
and needs nothing else: rows belong to steps, not to turns. Slot i holds layer i, as in `kimia.model.cache`.
"""

from __future__ import annotations

from torch import Tensor

SMALLEST_ROOM = 256  # positions


class TurnCache:
    """Keys and values of one turn, (slots, 2, 1, kv_heads, room, head_dim), and its number of positions.

    Room doubles, so a step neither allocates nor copies the past. What lies beyond the positions is not initialised:
    nobody reads it, since every turn attends over its own positions only.
    """

    def __init__(self, slots: int, kv_heads: int, head_dim: int, like: Tensor) -> None:
        """Type and device are those of `like`."""
        self._store = like.new_empty(slots, 2, 1, kv_heads, 0, head_dim)
        self.length = 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions per row: one row."""
        return (self.length,)

    @property
    def nbytes(self) -> int:
        """What the cache holds, room included."""
        return self._store.nbytes

    def reserve(self, positions: int) -> None:
        """Room for so many positions altogether."""
        room = self._store.shape[-2]
        if positions <= room:
            return
        larger = self._store.new_empty(
            *self._store.shape[:-2], max(positions, 2 * room, SMALLEST_ROOM), self._store.shape[-1]
        )
        larger[..., : self.length, :] = self._store[..., : self.length, :]
        self._store = larger

    def append(
        self,
        slot: int,
        k: Tensor,
        v: Tensor,
        positions: Tensor,  # noqa: ARG002  # they follow from the length
        counts: tuple[int, ...],  # noqa: ARG002
    ) -> tuple[Tensor, Tensor]:
        """Store T new positions of one slot; its keys and values so far, two (1, kv_heads, S, D).

        k, v (1, kv_heads, T, D). The turn moves on by `advance`, once all its slots have them.
        """
        end = self.length + k.shape[2]
        self._store[slot, 0, :, :, self.length : end] = k
        self._store[slot, 1, :, :, self.length : end] = v
        return self._store[slot, 0, :, :, :end], self._store[slot, 1, :, :, :end]

    def advance(self, positions: int) -> None:
        """So many positions have been written."""
        self.length += positions

    def cut(self, positions: int) -> None:
        """Forget what lies behind so many positions; the room stays."""
        self.length = min(self.length, positions)

    def next_position(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Where each slot's next key and value belong, and what its query then sees.

        slots x (2, 1, kv_heads, D); 2 x slots of (1, kv_heads, S, D), S = length + 1: keys of slot i at 2 i, values
        behind them.
        """
        place = self._store[..., self.length, :].unbind(0)
        return place, self._store[..., : self.length + 1, :].flatten(0, 1).unbind(0)
