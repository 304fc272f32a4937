"""KV of conversations between their turns: what the next prompt has in common with the last one is not read again.

A prompt is read in pieces that begin at the same positions always (`kimia.model.engine`), so the keys and values of a
whole piece depend on the positions up to its end and on nothing behind them: bit by bit they are those of every prompt
that begins alike. One prefix is kept per conversation, and found again by what it contains, never by its name alone.
It is only a cache: whatever is lost is read again.
"""

from __future__ import annotations

import hashlib
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor

from kimia.model.cache import GrowingCache
from kimia.model.lm import Row

PieceContent: TypeAlias = tuple[bytes, ...]


def content_of(piece: Row) -> PieceContent:
    """All that the keys and values of a piece depend on, beside the pieces before it.

    The ids of both tracks and, for each stretch with continuous features, its place and the SHA-256 of its values.
    """
    content = [array("q", ids).tobytes() for ids in (piece.audio_ids, piece.text_ids)]
    for segment, frames in zip(piece.segments, piece.features or (), strict=bool(piece.features)):
        content += [array("q", segment).tobytes(), _digest(frames[: segment[1]])]
    return tuple(content)


def _digest(frames: Tensor) -> bytes:
    values = frames.contiguous().cpu().view(torch.uint8).numpy()
    return hashlib.sha256(values.data).digest() + str(frames.dtype).encode()


@dataclass(eq=False)
class Prefix:
    """The beginning of a conversation's prompt in whole pieces, and the cache that holds it.

    Of some pieces only the layers up to the fork may be there: a turn reads no branch that it does not need.
    """

    cache: GrowingCache
    conversation: str  # "": nobody's, nothing is noted
    contents: list[PieceContent] = field(default_factory=list)
    text: int = 0  # pieces, from the beginning, of which the layers above the fork are there
    audio: int = 0  # pieces of which the audio branch is there
    ahead: Ahead | None = None
    since: float = 0.0  # when it was kept

    def note(self, content: PieceContent, *, text: bool, audio: bool) -> None:
        """The cache holds one piece more."""
        self.text += text and self.text == len(self.contents)
        self.audio += audio and self.audio == len(self.contents)
        self.contents.append(content)

    def held(self, *, text: bool, audio: bool) -> int:
        """Pieces that are there with the branches that are needed."""
        return min(
            len(self.contents), self.text if text else len(self.contents), self.audio if audio else len(self.contents)
        )

    def cut(self, pieces: int, size: int) -> None:
        """Forget what lies behind so many pieces of `size` positions."""
        del self.contents[pieces:]
        self.text, self.audio = min(self.text, pieces), min(self.audio, pieces)
        self.cache.cut(pieces * size)


@dataclass(frozen=True)
class Ahead:
    """Positions that the next prompt is expected to begin with, and the branches that it will need."""

    row: Row
    audio: bool


class Prefixes:
    """The prefixes that one process keeps, the one used last at the end."""

    def __init__(self, limit: int, life: float = 900.0, clock: Callable[[], float] = time.monotonic) -> None:
        """`limit`: bytes, together with the caches of running turns; 0: nothing is kept. `life`: seconds."""
        self.limit = limit
        self.life = life
        self._clock = clock
        self._kept: OrderedDict[str, Prefix] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def nbytes(self) -> int:
        """Memory of all caches, room included."""
        return sum(prefix.cache.nbytes for prefix in self._kept.values())

    def keep(self, prefix: Prefix) -> None:
        """Keep a prefix until its conversation goes on; it takes the place of an older one."""
        if self.limit:
            prefix.since = self._clock()
            self._kept[prefix.conversation] = prefix
            self._kept.move_to_end(prefix.conversation)

    def get(self, conversation: str) -> Prefix | None:
        """What is kept of a conversation, which stays."""
        return self._kept.get(conversation)

    def take(
        self, conversation: str, contents: Iterable[PieceContent], *, text: bool, audio: bool
    ) -> tuple[Prefix, int] | None:
        """A conversation's prefix, and how many of its pieces the prompt of these contents begins with.

        It is given away, whether much or little of it fits; None when nothing does. Contents are looked at one by one,
        no further than they are the same.
        """
        prefix = self._kept.pop(conversation, None)
        if prefix is None:
            return None
        prefix.ahead = None
        most = prefix.held(text=text, audio=audio)
        same = 0
        for mine, other in zip(prefix.contents[:most], contents, strict=False):
            if mine != other:
                break
            same += 1
        return (prefix, same) if same else None

    def drop(self, unwanted: Callable[[str], bool]) -> None:
        """Forget conversations by their names."""
        for conversation in filter(unwanted, tuple(self._kept)):
            del self._kept[conversation]

    def expire(self) -> None:
        """Forget what has been kept for too long."""
        latest = self._clock() - self.life
        for conversation in [name for name, prefix in self._kept.items() if prefix.since <= latest]:
            del self._kept[conversation]

    def shrink(self, used: int) -> None:
        """Forget the oldest ones until they fit beside caches of `used` bytes."""
        total = used + self.nbytes
        while self._kept and total > self.limit:
            total -= self._kept.popitem(last=False)[1].cache.nbytes
