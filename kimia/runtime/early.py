"""Segments that are complete are encoded while their caller still speaks, so that the end of speech waits for the last.

What is made lies in the blob store under names that say what it depends on, and is found there when the turn is claimed
(`kimia.runtime.inputs.known_beginning`), by whichever worker. Nothing is published and nobody waits: what fails here is
made later.
"""

from __future__ import annotations

from collections.abc import Sequence

from kimia.clips import SEGMENT_POSITIONS, Sound, early_segments, wanted_sounds
from kimia.errors import KimiaError, NotFoundError
from kimia.runtime.attempt import Bench
from kimia.runtime.inputs import FeatureOutlet, clip_contents, known_beginning, replay
from kimia.runtime.local import close
from kimia.runtime.logs import bound_turn, get_logger
from kimia.runtime.metrics import ENCODED
from kimia.runtime.pacing import sound_seconds
from kimia.v1.turn_pb2 import Chunk, Turn

log = get_logger()


async def encode_early(bench: Bench, turn: Turn) -> None:
    """Encode the finished segments of the one clip that `turn` names, as far as the blob store lacks them."""
    with bound_turn(turn.id):
        try:
            await _encode_early(bench, turn)
        except KimiaError as error:  # the turn itself will tell its caller
            log.info("not encoded early", error=str(error))


async def _encode_early(bench: Bench, turn: Turn) -> None:
    [sound] = wanted_sounds(turn.messages).values()
    pieces = await _pieces(bench, turn, sound)
    segments = early_segments(sound.clip.format, sum(len(piece.input.data) for piece in pieces))
    if not segments:
        return
    whole = clip_contents(turn, pieces)[sound.clip.number]
    contents = {sound.clip.number: whole[:segments]}
    known = await known_beginning(bench.blobs, [sound], bench.place(turn), contents)
    missing = segments * SEGMENT_POSITIONS - sum(len(chunk.encoded.codes) for chunk in known)
    if missing <= 0:
        return
    outlet = FeatureOutlet(bench.blobs, turn, bench.place(turn), contents, known)
    chunks = bench.stage.run(turn, replay(pieces), known)
    try:
        async for chunk in chunks:
            missing -= len(chunk.encoded.codes)
            ENCODED.labels("early").inc(sound_seconds(chunk))
            await _note(bench, turn, await outlet.take(chunk))
            if missing <= 0:
                return
    finally:
        await close(chunks)


async def _pieces(bench: Bench, turn: Turn, sound: Sound) -> list[Chunk]:
    """What has come of the clip, as a log that goes on. Nothing of a turn that waits for no more sound."""
    if (await bench.inbox.journal.head(turn.id)).state != "open":
        return []
    log_ = await bench.inbox.journal.read(turn.id, "input")
    pieces = [chunk for chunk in log_ if chunk.HasField("input") and chunk.input.clip == sound.clip.number]
    for piece in pieces:
        piece.final = False
    return pieces


async def _note(bench: Bench, turn: Turn, stored: Sequence[Chunk]) -> None:
    """Let the deletion of the session find the blobs; it was deleted already where the turn is gone."""
    names = [chunk.encoded.feature_key for chunk in stored if chunk.encoded.feature_key]
    if names and not await bench.inbox.journal.note_blobs(turn.id, names):
        await bench.blobs.drop(names)
        raise NotFoundError("the turn was deleted while its sound was being encoded")
