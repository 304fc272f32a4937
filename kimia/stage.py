"""The one protocol of the pipeline: a stage takes chunks and gives chunks; it knows neither gRPC nor Redis.

    turn     what is wanted: conversation, options, seed (`kimia.v1.turn_pb2.Turn`)
    chunk    one entry of a turn's log, and one message between stages (`kimia.v1.turn_pb2.Chunk`)
    stage    an async generator: chunks of the log it reads in, chunks of the log it writes out

Adapters carry chunks: Redis (`kimia.runtime.worker`), gRPC (`kimia.runtime.direct`), in one process
(`kimia.runtime.local`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from kimia.v1.turn_pb2 import (
    STAGE_NAME_DETOKENIZER,
    STAGE_NAME_LLM,
    STAGE_NAME_TOKENIZER,
    Chunk,
    StageName,
    Turn,
)

CODE_SECONDS = 0.08  # of speech in one semantic token: 12.5 Hz, kimia.model.prompt.TOKEN_RATE (which needs torch)

Log: TypeAlias = Literal["input", "encoded", "tokens", "audio"]


@dataclass(frozen=True)
class StageKind:
    """What a stage is called, and the logs on either side of it."""

    name: str
    number: StageName.ValueType
    reads: Log
    writes: Log


TOKENIZER = StageKind("tokenizer", STAGE_NAME_TOKENIZER, "input", "encoded")
LLM = StageKind("llm", STAGE_NAME_LLM, "encoded", "tokens")
DETOKENIZER = StageKind("detokenizer", STAGE_NAME_DETOKENIZER, "tokens", "audio")

STAGES = {kind.name: kind for kind in (TOKENIZER, LLM, DETOKENIZER)}
_BY_NUMBER = {kind.number: kind for kind in STAGES.values()}


def route_of(turn: Turn) -> tuple[StageKind, ...]:
    """The stages that a turn passes, in order."""
    return tuple(_BY_NUMBER[number] for number in turn.route)


class Stage(Protocol):
    """One stage with its weights. It may run many turns at once; what belongs to a turn lives in its generator."""

    @property
    def kind(self) -> StageKind:
        """Which stage this is."""

    async def warm_up(self) -> None:
        """Compute something small, so that the first turn does not pay for what happens only once."""

    def run(self, turn: Turn, inbox: AsyncIterator[Chunk], published: Sequence[Chunk] = ()) -> AsyncIterator[Chunk]:
        """Yield this turn's chunks, the last one marked `final` and carrying a StageReport.

        `inbox` gives the log that the stage reads, from its beginning; it ends after the final chunk. `published` is
        what an interrupted run of this turn has already given out: the first chunk yielded has index
        `len(published)`. Closing the generator ends the turn within one step or chunk. Raises KimiaError.
        """


@runtime_checkable
class Remembers(Protocol):
    """A stage that keeps something of a conversation for its next turn. It may lose it at any time."""

    def forget(self, session_id: str) -> None:
        """The session was deleted: nothing of it is kept."""
