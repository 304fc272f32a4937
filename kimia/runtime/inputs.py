"""What a stage reads and writes on the wire besides plain chunks: sound from input logs, features to and from blobs.

A blob holds one stretch of a clip: a serialised Encoded with codes and features. Its name says what the stretch depends
on (tenant, weights, sound up to the end of its segment), so equal sound is encoded once, and a segment that was encoded
while the caller still spoke is found when the turn is claimed. The tokenizer's chunks name their blobs by
`feature_key`; the language model's get the features back. A blob that is missing is no error: the turn goes back to the
tokenizer (`Jobs.rewind`), which encodes every clip again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import takewhile

from kimia.clips import GOES_ON, SEGMENT_POSITIONS, Sound, contents, wanted_sounds
from kimia.errors import NotFoundError, TurnCancelledError, UnavailableError
from kimia.stage import Log
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.inbox import Feed
from kimia.streams.journal import Journal
from kimia.v1.turn_pb2 import Chunk, Encoded, StageReport, Turn

Place = tuple[str, str, str]  # of blobs: partition, tenant, checkpoint
Contents = Mapping[int, Sequence[str]]  # of each clip, by its number: what its segments depend on, in order

AT_ONCE = 64  # blobs fetched in one round trip, about a minute of sound


# ---- following a log --------------------------------------------------------------------------------------------


async def follow(feed: Feed, log: Log) -> AsyncIterator[Chunk]:
    """A log from its beginning to its final chunk. Raises TurnCancelledError when the turn ends before it."""
    async for chunk in feed.chunks(log):
        yield chunk
        if chunk.final:
            return
    raise TurnCancelledError(f"turn {feed.turn_id} ended while its log {log!r} was being read; open a new one")


async def replay(chunks: Sequence[Chunk]) -> AsyncIterator[Chunk]:
    """Chunks that are all there."""
    for chunk in chunks:
        yield chunk


def _numbered(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """The same chunks as one log: counted from 0, the last one final."""
    for index, chunk in enumerate(chunks):
        chunk.index, chunk.final = index, index == len(chunks) - 1
    return chunks


# ---- the tokenizer: sound in ------------------------------------------------------------------------------------


def sounds_to_encode(turn: Turn, rewound: bool) -> list[Sound]:
    """The clips that the tokenizer gets: those not known yet, in the order of the messages.

    After a rewind also those whose features were known; they come first, so that the end is the same as before.
    """
    sounds = wanted_sounds(turn.messages).values()
    known = [sound for sound in sounds if not sound.must_be_encoded]
    return [*(known if rewound else ()), *(sound for sound in sounds if sound.must_be_encoded)]


async def read_sound(journal: Journal, turn: Turn, sounds: Sequence[Sound]) -> Sequence[Chunk]:
    """The pieces of these clips from the input logs they lie in, with the numbers of this turn, as one log.

    Raises NotFoundError for sound that has expired.
    """
    logs: dict[str, list[Chunk]] = {}
    pieces: list[Chunk] = []
    for sound in sounds:
        source = sound.clip.source_turn or turn.id
        if source not in logs:
            logs[source] = await journal.read(source, "input")
        found = list(_pieces(logs[source], sound))
        if not found or not found[-1].input.clip_end:
            rule = "the sound is not in the journal, or not as a whole: it may have expired; send it again"
            raise NotFoundError(rule, field=f"messages[{sound.index}]")
        pieces += found
    return _numbered(pieces)


def _pieces(log: Sequence[Chunk], sound: Sound) -> Iterator[Chunk]:
    wanted = sound.clip.source_number if sound.clip.source_turn else sound.clip.number
    for chunk in log:
        if chunk.HasField("input") and chunk.input.clip == wanted:
            if wanted == sound.clip.number:  # no other clip of the turn has this number: the piece is nobody else's
                yield chunk
                continue
            piece = Chunk(input=chunk.input)
            piece.input.clip = sound.clip.number
            yield piece


# ---- the tokenizer: features out --------------------------------------------------------------------------------


def clip_contents(turn: Turn, sound: Sequence[Chunk]) -> Contents:
    """What the features of every clip depend on, segment by segment."""
    pieces: dict[int, list[bytes]] = {number: [] for number in wanted_sounds(turn.messages)}
    for chunk in sound:
        pieces[chunk.input.clip].append(chunk.input.data)
    sounds = wanted_sounds(turn.messages)
    return {number: tuple(contents(sounds[number].clip.format, pieces[number])) for number in pieces}


class _Names:
    """The names of a turn's blobs, stretch by stretch in the order of its log."""

    def __init__(self, place: Place, contents: Contents) -> None:
        self._place = place
        self._contents = contents
        self._positions: Counter[int] = Counter()  # of a clip, so far
        self._pieces: Counter[tuple[int, str]] = Counter()  # of a segment of a clip

    def at(self, content: str, piece: int) -> str:
        return keys.blob(*self._place, content, piece)

    def next(self, encoded: Encoded) -> str:
        """The name of the next stretch."""
        of_clip = self._contents[encoded.clip]
        content = of_clip[min(self._positions[encoded.clip] // SEGMENT_POSITIONS, len(of_clip) - 1)]
        self._positions[encoded.clip] += len(encoded.codes)
        self._pieces[encoded.clip, content] += 1
        return self.at(content, self._pieces[encoded.clip, content] - 1)

    def segment_ends(self, encoded: Encoded) -> bool:
        """Whether the last stretch of this clip that was named was the last one of its segment."""
        return encoded.clip_end or self._positions[encoded.clip] % SEGMENT_POSITIONS == 0


class FeatureOutlet:
    """Takes the chunks of the tokenizer stage: features go into blobs, history of a rewound turn nowhere else.

    `place` and `contents` name new blobs, `published` is what an interrupted run has published.
    """

    def __init__(
        self, blobs: Blobs, turn: Turn, place: Place, contents: Contents, published: Sequence[Chunk] = ()
    ) -> None:
        self._blobs = blobs
        self._names = _Names(place, contents)
        wanted = wanted_sounds(turn.messages).items()
        self._known = {number: sound.clip.feature_keys for number, sound in wanted if not sound.must_be_encoded}
        self._restored: Counter[int] = Counter()  # stretches of known clips
        self._written = len(published)
        self._held: list[Chunk] = []
        for chunk in published:
            if chunk.HasField("encoded"):
                self._names.next(chunk.encoded)

    async def take(self, chunk: Chunk) -> Sequence[Chunk]:
        """The chunks to publish: those of a segment together, once their blobs are stored in one round trip."""
        self._held.append(chunk)
        if chunk.HasField("encoded"):
            key = self._key(chunk.encoded)
            if chunk.encoded.feature_width:  # to ask for the features themselves is to copy them
                chunk.encoded.feature_key = key
        if not (chunk.final or self._names.segment_ends(chunk.encoded) or len(self._held) >= AT_ONCE):
            return ()
        held, self._held = self._held, []
        await self._store([chunk.encoded for chunk in held if chunk.encoded.feature_width])
        return [out for out in map(self._out, held) if out is not None]

    async def close(self, over: bool) -> None:
        """Features stay for as long as their lease: the next turn hears them again."""

    def _key(self, encoded: Encoded) -> str:
        key, known = self._names.next(encoded), self._known.get(encoded.clip, ())
        piece = self._restored[encoded.clip]
        self._restored[encoded.clip] += 1
        return known[piece] if piece < len(known) else key

    async def _store(self, stretches: Sequence[Encoded]) -> None:
        """Put features away; where no blob can be stored they stay inline."""
        try:
            await self._blobs.put_all([(encoded.feature_key, _unnamed(encoded)) for encoded in stretches])
        except UnavailableError:
            for encoded in stretches:
                encoded.feature_key = ""
            return
        for encoded in stretches:
            encoded.features = b""

    def _out(self, chunk: Chunk) -> Chunk | None:
        restored = chunk.HasField("encoded") and chunk.encoded.clip in self._known
        if restored and not chunk.final:
            return None
        if restored:
            chunk.ClearField("encoded")
        chunk.index, self._written = self._written, self._written + 1
        return chunk


def _unnamed(encoded: Encoded) -> bytes:
    """What the blob holds: all but its own name, which is put back."""
    key, encoded.feature_key = encoded.feature_key, ""
    try:
        return encoded.SerializeToString()
    finally:
        encoded.feature_key = key


# ---- the tokenizer: features that are known ---------------------------------------------------------------------


async def known_beginning(blobs: Blobs, sounds: Sequence[Sound], place: Place, contents: Contents) -> list[Chunk]:
    """The log `encoded` as far as the blob store has it from its beginning on: whole segments of clips, in order.

    The last chunk is final when nothing is left to encode. Where the store cannot be reached nothing is known.
    """
    heard = list(takewhile(lambda sound: sound.heard, sounds))  # of the others there are no blobs
    wanted = [(sound, content) for sound in heard for content in contents[sound.clip.number]]
    if not wanted:
        return []
    try:
        stretches, complete = await _known_segments(blobs, _Names(place, contents), wanted)
    except UnavailableError:
        return []
    chunks = [Chunk(index=index, encoded=encoded) for index, encoded in enumerate(stretches)]
    if complete and len(heard) == len(sounds):
        chunks[-1].final = True
        chunks[-1].report.CopyFrom(StageReport(units=len(sounds)))
    return chunks


async def _known_segments(
    blobs: Blobs, names: _Names, wanted: Sequence[tuple[Sound, str]]
) -> tuple[list[Encoded], bool]:
    """The stretches of the first segments that are there as a whole, and whether all are."""
    stretches: list[Encoded] = []
    firsts = await blobs.get([names.at(content, 0) for _, content in wanted])
    for (sound, content), first in zip(wanted, firsts, strict=True):
        found = None if first is None else await _known_segment(blobs, names, content, first)
        if found is None:
            return stretches, False
        for piece, encoded in enumerate(found):
            encoded.clip = sound.clip.number
            encoded.features, encoded.feature_key = b"", names.at(content, piece)
        stretches += found
    return stretches, True


async def _known_segment(blobs: Blobs, names: _Names, content: str, first: bytes) -> list[Encoded] | None:
    """All stretches of one segment, or of the rest of a clip, if they are there."""
    found = [Encoded.FromString(first)]
    goes_on = content.endswith(GOES_ON)

    def whole() -> bool:
        return sum(len(encoded.codes) for encoded in found) >= SEGMENT_POSITIONS if goes_on else found[-1].clip_end

    while not whole():
        batch = [names.at(content, len(found) + more) for more in range(AT_ONCE)]
        for data in await blobs.get(batch):
            if data is None:
                return None
            found.append(Encoded.FromString(data))
            if whole():
                break
    return found


# ---- the language model: features in ----------------------------------------------------------------------------


async def read_encoded(feed: Feed, blobs: Blobs, turn: Turn) -> Sequence[Chunk] | None:
    """All encoded clips of a turn as one log: first those known before, by their blobs, then the log `encoded`.

    None when features are gone. Raises TurnCancelledError.
    """
    sounds = wanted_sounds(turn.messages).values()
    history = [
        Chunk(encoded=Encoded(clip=sound.clip.number, feature_key=key))
        for sound in sounds
        if not sound.must_be_encoded
        for key in sound.clip.feature_keys
    ]
    own = [chunk async for chunk in follow(feed, "encoded")] if any(s.must_be_encoded for s in sounds) else []
    chunks = [*history, *own]
    return _numbered(chunks) if await _filled(blobs, chunks) else None


async def _filled(blobs: Blobs, chunks: Sequence[Chunk]) -> bool:
    """Put the features back in place; False when some are gone."""
    empty = [chunk.encoded for chunk in chunks if chunk.encoded.feature_key]
    for start in range(0, len(empty), AT_ONCE):
        batch = empty[start : start + AT_ONCE]
        for encoded, data in zip(batch, await blobs.get([e.feature_key for e in batch]), strict=True):
            if data is None:
                return False
            number = encoded.clip
            encoded.ParseFromString(data)
            encoded.clip = number
    return True
