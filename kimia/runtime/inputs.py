"""What a stage reads and writes on the wire besides plain chunks: sound from input logs, features to and from blobs.

A blob holds one stretch of a clip: a serialised Encoded with codes and features. The tokenizer's chunks name their
blobs by `feature_key`; the language model's get the features back. A blob that is missing is no error: the turn goes
back to the tokenizer (`Jobs.rewind`), which encodes every clip again.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence

from kimia.clips import Sound, wanted_sounds
from kimia.errors import NotFoundError, TurnCancelledError, UnavailableError
from kimia.stage import Log
from kimia.streams import keys
from kimia.streams.blobs import Blobs
from kimia.streams.inbox import Feed
from kimia.streams.journal import Journal
from kimia.v1.turn_pb2 import Chunk, Encoded, Turn

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
            piece = Chunk(input=chunk.input)
            piece.input.clip = sound.clip.number
            yield piece


# ---- the tokenizer: features out --------------------------------------------------------------------------------


class FeatureOutlet:
    """Takes the chunks of the tokenizer stage: features go into blobs, history of a rewound turn nowhere else.

    `place` is (partition, tenant, checkpoint) of new blobs, `sound` the stage's inbox as `read_sound` gives it,
    `published` what an interrupted run has published.
    """

    def __init__(
        self, blobs: Blobs, turn: Turn, place: tuple[str, str, str], sound: Sequence[Chunk], published: Sequence[Chunk]
    ) -> None:
        self._blobs = blobs
        self._place = place
        self._contents = _contents(turn, sound)
        wanted = wanted_sounds(turn.messages).items()
        self._known = {number: sound.clip.feature_keys for number, sound in wanted if not sound.must_be_encoded}
        self._written = len(published)
        self._pieces = Counter(chunk.encoded.clip for chunk in published)

    async def take(self, chunk: Chunk) -> Chunk | None:
        """The chunk to publish, if any."""
        restored = chunk.HasField("encoded") and chunk.encoded.clip in self._known
        if chunk.HasField("encoded"):
            await self._store(chunk.encoded)
        if restored and not chunk.final:
            return None
        out = Chunk(final=chunk.final, index=self._written)
        if chunk.HasField("encoded") and not restored:
            out.encoded.CopyFrom(chunk.encoded)
        if chunk.HasField("report"):
            out.report.CopyFrom(chunk.report)
        self._written += 1
        return out

    async def close(self, over: bool) -> None:
        """Features stay for as long as their lease: the next turn hears them again."""

    async def _store(self, encoded: Encoded) -> None:
        """Put the features away and name their blob instead; where no blob can be stored they stay inline."""
        piece = self._pieces[encoded.clip]
        self._pieces[encoded.clip] += 1
        if not encoded.features:
            return
        key = self._key(encoded.clip, piece)
        try:
            await self._blobs.put(key, encoded.SerializeToString())
        except UnavailableError:
            return
        encoded.features, encoded.feature_key = b"", key

    def _key(self, clip: int, piece: int) -> str:
        known = self._known.get(clip, ())
        return known[piece] if piece < len(known) else keys.blob(*self._place, self._contents[clip], piece)


def _contents(turn: Turn, pieces: Sequence[Chunk]) -> dict[int, str]:
    """SHA-256 of every clip's format and bytes, by its number."""
    sounds = wanted_sounds(turn.messages)
    hashes = {number: hashlib.sha256(sound.clip.format.SerializeToString()) for number, sound in sounds.items()}
    for piece in pieces:
        hashes[piece.input.clip].update(piece.input.data)
    return {number: digest.hexdigest() for number, digest in hashes.items()}


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
            encoded.CopyFrom(Encoded.FromString(data))
            encoded.clip = number
    return True
