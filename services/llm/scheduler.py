"""Continuous batching: which turns take a step together, and whose prompt is read in between.

A turn joins, asks for its steps one by one, and leaves. Between two steps at most one piece of one prompt is read, so
that a long prompt never stalls callers who are being spoken to. A row belongs to a step, not to a turn: each step
serves up to `rows` turns, those first that have waited longest. A turn is computed one step beyond the one that its
consumer holds and no further. One whose consumer stops asking (its audio is far enough ahead) therefore takes no row
and no time; it keeps its own KV cache, so that nothing is copied when it goes on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from kimia.compute import ComputeThread
from kimia.errors import KimiaError
from kimia.model.engine import Answer, Engine
from kimia.model.generate import GenerateOptions, Step, TrackTokens
from kimia.model.lm import Row


class Scheduler:
    """The turns of one process that the language model answers."""

    def __init__(self, engine: Engine, compute: ComputeThread) -> None:
        self._engine = engine
        self._compute = compute.turn()
        self._turns: list[Answering] = []  # those that were served last come last
        self._pump: asyncio.Task[None] | None = None

    def join(self, prompt: Row, tokens: TrackTokens, options: GenerateOptions) -> Answering:
        """A turn that wants to be answered; it must `leave`. Raises ParameterError, as `Engine.begin` does."""
        turn = Answering(self._engine.begin(prompt, tokens, options), self._start, self._turns.remove)
        self._turns.append(turn)
        return turn

    def _start(self) -> None:
        """Compute as long as somebody has something to compute."""
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            reading = next((turn for turn in self._turns if turn.reads), None)
            if reading is not None:
                await self._together([reading], self._read)
            stepping = [turn for turn in self._turns if turn.steps][: self._engine.rows]
            if stepping:
                await self._together(stepping, self._engine.step)
            if reading is None and not stepping:
                return
            await asyncio.sleep(0)  # those who wait take their steps, and may go on together

    def _read(self, answers: Sequence[Answer]) -> Sequence[None]:
        for answer in answers:
            self._engine.prefill(answer)
        return [None] * len(answers)

    async def _together(
        self,
        turns: Sequence[Answering],
        work: Callable[[Sequence[Answer]], Sequence[Step | KimiaError | None]],
    ) -> None:
        """Compute for some turns; an error of the whole is an error of each. The edge of the engine."""
        before = self._compute.seconds
        made: Sequence[Step | Exception | None]
        try:
            made = await self._compute.run(work, [turn.answer for turn in turns])
        except Exception as error:  # noqa: BLE001  # raised where the steps are awaited
            made = [error] * len(turns)
        for turn, result in zip(turns, made, strict=True):
            turn.give(result, (self._compute.seconds - before) / len(turns))
            if turn in self._turns and result is not None:
                self._turns.remove(turn)
                self._turns.append(turn)


class Answering:
    """One turn's place among the others, and its steps."""

    def __init__(self, answer: Answer, start: Callable[[], None], left: Callable[[Answering], None]) -> None:
        self.answer = answer
        self.seconds = 0.0  # of computing, its share where turns compute together
        self._start = start
        self._left = left
        self._made: Step | Exception | None = None  # what the consumer has not taken yet
        self._waiter: asyncio.Future[None] | None = None
        self._begun = False
        self._over = answer.over  # as far as has been given: the engine, in its thread, may know more

    @property
    def reads(self) -> bool:
        """Whether a piece of its prompt comes next."""
        return self._begun and self._made is None and self.answer.waits_for_prefill

    @property
    def steps(self) -> bool:
        """Whether a step comes next."""
        return self._begun and self._made is None and not self._over and not self.answer.waits_for_prefill

    async def next(self) -> Step | None:
        """The next step, None behind the last one. Raises what ended the answer."""
        self._begun = True
        if self._made is None:
            if self._over:
                return None
            self._start()
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        made, self._made = self._made, None
        if isinstance(made, Exception):
            raise made
        self._start()
        return made

    def give(self, made: Step | Exception | None, seconds: float) -> None:
        """What has been computed for this turn, and its share of the time."""
        self.seconds += seconds
        self._made = made
        self._over = self._over or isinstance(made, Exception) or (made is not None and made.stop is not None)
        if made is not None and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def leave(self) -> None:
        """Take no further step; what is being computed goes unheard."""
        self._left(self)
