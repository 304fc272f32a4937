"""What one turn of speech has heard, in one buffer: its keys and values are written where they will be read.

A solve writes its chunk's rows behind the committed ones, in every step anew; a commit only says that they stay. What
falls out of the window is left behind, and when the buffer's end is reached the window moves to its front: once in
several chunks, never within a solve.
"""

from __future__ import annotations

from kimia.model.dit import Prefix


class FlowCache:
    """The keys (after RoPE) and values of all layers that one turn attends to besides its own chunk."""

    def __init__(self, empty: Prefix, window: int, spare: int) -> None:
        """At most `window` frames are remembered; `spare` more fit behind them before they are moved."""
        self.frames = 0  # committed
        self._empty = empty
        self._window = window
        self._spare = spare
        self._start = 0
        self._buffer: Prefix | None = None  # made for the first chunk: a turn that waits needs none

    @property
    def held(self) -> Prefix:
        """The committed frames, as long as nothing is written."""
        return self.room(0) if self.frames else self._empty

    def room(self, frames: int) -> Prefix:
        """The committed frames and so many rows behind them that are to be written. It ends every earlier room."""
        needed = self.frames + frames
        if self._buffer is None or needed > self._buffer.frames:
            self._grow(max(needed, self._window + self._spare))
        elif self._start + needed > self._buffer.frames:
            self._to_front()
        assert self._buffer is not None
        return self._buffer.span(self._start, self._start + needed)

    def keep(self, frames: int) -> None:
        """The first `frames` rows of the room are committed."""
        self.frames += frames
        beyond = max(0, self.frames - self._window)
        self._start += beyond
        self.frames -= beyond

    def hear(self, prefix: Prefix) -> None:
        """What another has committed is committed here, too."""
        if prefix.frames:
            self.room(prefix.frames).span(self.frames, self.frames + prefix.frames).copy_(prefix)
            self.keep(prefix.frames)

    def _grow(self, capacity: int) -> None:
        held = self.held
        layers, batch, heads, _, width = self._empty.keys.shape
        keys, values = self._empty.keys.new_empty(2, layers, batch, heads, capacity, width).unbind()
        self._buffer, self._start = Prefix(keys, values), 0
        self._buffer.span(0, self.frames).copy_(held)

    def _to_front(self) -> None:
        """Layer by layer: both places may overlap."""
        assert self._buffer is not None
        begin, end = self._start, self._start + self.frames
        for rows in (*self._buffer.keys, *self._buffer.values):
            rows[..., : self.frames, :] = rows[..., begin:end, :].clone()
        self._start = 0
