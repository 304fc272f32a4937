"""One turn as its client sees it: the logs `tokens` and `audio` as events with indices of their own.

Events are derived from the beginning of both logs, whatever the client has received before: so whoever resumes a turn,
in whichever process, finds the same events under the same indices and leaves out what is known.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeVar

from kimia.errors import RequestError
from kimia.stage import DETOKENIZER, LLM, StageKind, route_of
from kimia.streams.inbox import Feed
from kimia.v1.kimi_audio_pb2 import TextDelta, TurnEvent, TurnStarted
from kimia.v1.turn_pb2 import Chunk, StageReport, StopReason, Turn
from orchestrator import records
from orchestrator.sound import OutputSound, output_format

T = TypeVar("T")


@dataclass(frozen=True)
class Position:
    """What the client has of a turn: events before these indices."""

    next_text: int = 0
    next_audio: int = 0

    @property
    def at_start(self) -> bool:
        """Nothing is known to have arrived."""
        return not self.next_text and not self.next_audio


class Following:
    """Reads a submitted turn to its end. Use it as a context manager."""

    def __init__(self, feed: Feed, turn: Turn, position: Position = Position()) -> None:
        self.turn = turn
        self.feed = feed
        self.position = position
        self.form = output_format(turn.options.output_format)
        self.sound = OutputSound(self.form)
        self.tokens: list[Chunk] = []
        self.reports: dict[str, StageReport] = {}
        self.sent_samples = 0  # of speech given to the client, from the beginning of the turn
        self.waited = 0.0  # seconds that a caller waited for speech after it had begun
        self._texts = 0  # events so far
        self._audios = 0
        self._played_until = 0.0  # the loop's clock

    def __enter__(self) -> Following:
        self.feed.patience = self._patience
        return self

    def __exit__(self, *_: object) -> None:
        self.feed.close()

    def _patience(self) -> float:
        """Seconds that a client waits for a journal that is away: up to the deadline of its turn."""
        return max(self.turn.deadline.ToMicroseconds() / 1e6 - time.time(), records.PATIENCE)

    @property
    def sent_ms(self) -> int:
        """Milliseconds of speech given to the client."""
        return self.sent_samples * 1000 // self.form.sample_rate

    @property
    def whole(self) -> bool:
        """Whether the log `tokens` was read to its end."""
        return bool(self.tokens) and self.tokens[-1].final

    @property
    def text(self) -> str:
        """All characters so far."""
        return "".join(chunk.step.text for chunk in self.tokens)

    @property
    def codes(self) -> int:
        """Semantic tokens so far."""
        return sum(chunk.step.HasField("code") for chunk in self.tokens)

    @property
    def stop(self) -> StopReason.ValueType:
        """Why the answer ended."""
        return self.tokens[-1].step.stop if self.tokens else StopReason.STOP_REASON_UNSPECIFIED

    def check_position(self) -> None:
        """Raise RequestError for a client that has more of a finished turn than there is."""
        for name, given, known in (
            ("last_text_index", self.position.next_text, self._texts),
            ("last_audio_index", self.position.next_audio, self._audios),
        ):
            if given > known:
                rule = f"the turn has {known} of these, 0 to {known - 1}" if known else "the turn has none of these"
                raise RequestError(f"{rule}; give the last index that came, or leave it out", field=name)

    async def events(self) -> AsyncGenerator[TurnEvent]:
        """All events that the client lacks, but for the last one. Raises NotFoundError when the turn is gone."""
        if self.position.at_start:
            started = TurnStarted(seed=self.turn.seed, session_id=self.turn.session_id, output_format=self.form)
            yield TurnEvent(turn_id=self.turn.id, started=started)
        async with aclosing(merged(*self._sources())) as chunks:
            async for kind, chunk in chunks:
                if chunk.HasField("report"):
                    self.reports[kind.name] = chunk.report
                event = self._text(chunk) if kind is LLM else self._audio(chunk)
                if event is not None:
                    yield event

    def _sources(self) -> list[AsyncIterator[tuple[StageKind, Chunk]]]:
        kinds = [kind for kind in (LLM, DETOKENIZER) if kind in route_of(self.turn)]
        return [_named(kind, self.feed.chunks(kind.writes)) for kind in kinds]

    def _text(self, chunk: Chunk) -> TurnEvent | None:
        self.tokens.append(chunk)
        if not chunk.step.text:
            return None
        index, self._texts = self._texts, self._texts + 1
        if index < self.position.next_text:
            return None
        return TurnEvent(turn_id=self.turn.id, text=TextDelta(index=index, text=chunk.step.text))

    def _audio(self, chunk: Chunk) -> TurnEvent | None:
        data = self.sound.feed(chunk.speech, chunk.final)
        if not data:
            return None
        index, self._audios = self._audios, self._audios + 1
        self._count_playback()
        if index < self.position.next_audio:
            return None
        event = TurnEvent(turn_id=self.turn.id)
        event.audio.index, event.audio.data = index, data  # in place: a message given to another one is copied
        return event

    def _count_playback(self) -> None:
        """A caller who plays without pause has waited whenever a piece comes after the last one was played."""
        now = asyncio.get_running_loop().time()
        if self.sent_samples:
            self.waited += max(now - self._played_until, 0.0)
        seconds = (self.sound.samples - self.sent_samples) / self.form.sample_rate
        self._played_until = max(now, self._played_until) + seconds
        self.sent_samples = self.sound.samples


async def _named(kind: StageKind, chunks: AsyncIterator[Chunk]) -> AsyncIterator[tuple[StageKind, Chunk]]:
    async for chunk in chunks:
        yield kind, chunk


async def merged(*sources: AsyncIterator[T]) -> AsyncGenerator[T]:
    """The items of all sources as they come, each source in its order; none is read ahead of by more than one item."""
    waiting: dict[asyncio.Future[T], AsyncIterator[T]] = {}
    try:
        for source in sources:
            waiting[asyncio.ensure_future(anext(source))] = source
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                source = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(source))] = source
                yield item
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
