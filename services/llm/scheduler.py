"""Continuous batching: which turns take a step together, and whose prompt is read in between.

A turn joins, asks for its steps one by one, and leaves. Between two steps at most one piece of one prompt is read, so
that a long prompt never stalls callers who are being spoken to. A row belongs to a step, not to a turn: each step
serves up to `rows` turns, those first that have waited longest. A turn is computed one step beyond the one that its
consumer holds and no further. One whose consumer stops asking (its audio is far enough ahead) therefore takes no row
and no time; it keeps its own KV cache, so that nothing is copied when it goes on.

What a turn of a conversation has read is kept for the next one (`kimia.model.prefix`). When nobody has asked for
anything for a moment, what the next prompt is expected to begin with is read ahead, a piece at a time; a turn that asks
meanwhile waits for one piece at most, as it may for another turn's prompt.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from kimia.compute import ComputeThread
from kimia.errors import KimiaError
from kimia.model.engine import Answer, Engine
from kimia.model.generate import GenerateOptions, Step, TrackTokens
from kimia.model.lm import Row
from kimia.runtime.logs import get_logger
from kimia.runtime.metrics import PREFIX_BYTES

QUIET = 0.01  # seconds without a request after which turns that are there have what they need for now

log = get_logger()


class Scheduler:
    """The turns of one process that the language model answers."""

    def __init__(self, engine: Engine, compute: ComputeThread) -> None:
        self._engine = engine
        self._compute = compute.turn()
        self._turns: list[Answering] = []  # those that were served last come last
        self._pump: asyncio.Task[None] | None = None
        self._asked = asyncio.Event()
        self._chores: deque[Callable[[], None]] = deque()  # what is to be done about prefixes, before all else
        self._ahead: deque[str] = deque()  # conversations of which something is to be read ahead

    def join(self, prompt: Row, tokens: TrackTokens, options: GenerateOptions, conversation: str = "") -> Answering:
        """A turn that wants to be answered; it must `leave`. Raises ParameterError, as `Engine.begin` does."""
        turn = Answering(self._engine.begin(prompt, tokens, options, conversation), self._start, self._left)
        self._turns.append(turn)
        return turn

    def forget(self, unwanted: Callable[[str], bool]) -> None:
        """Keep nothing of these conversations any more."""
        self._do(partial(self._engine.prefixes.drop, unwanted))

    def _left(self, turn: Answering, after: Row | None) -> None:
        self._turns.remove(turn)
        conversation = turn.answer.prefix.conversation
        if not conversation or turn.failed:
            return
        if after is not None:
            self._ahead.append(conversation)
        self._do(partial(self._engine.keep, turn.answer, after))
        prefixes = self._engine.prefixes
        asyncio.get_running_loop().call_later(prefixes.life + 1, self._do, prefixes.expire)

    def _do(self, chore: Callable[[], None]) -> None:
        self._chores.append(chore)
        self._start()

    def _start(self) -> None:
        """Compute as long as somebody has something to compute."""
        self._asked.set()
        if self._pump is None or self._pump.done():
            self._pump = asyncio.create_task(self._work())

    async def _work(self) -> None:
        while True:
            if self._chores:
                await self._compute.run(self._tidy)
            reading = next((turn for turn in self._turns if turn.reads), None)
            if reading is not None:
                await self._together([reading], self._read)
            stepping = [turn for turn in self._turns if turn.steps][: self._engine.rows]
            if stepping:
                await self._together(stepping, self._step)
            if reading is None and not stepping and not self._chores and not await self._spared():
                return
            await asyncio.sleep(0)  # those who wait take their steps, and may go on together

    # ---- for later turns ----

    async def _spared(self) -> bool:
        """Use a quiet moment to read one piece ahead; False when there is nothing to be read."""
        if not self._ahead:
            return False
        if self._turns and await self._asked_within(QUIET):
            return True
        conversation = self._ahead[0]
        try:
            more = await self._compute.run(self._read_ahead, conversation)
        except Exception:  # the edge of what nobody waits for
            log.exception("reading ahead failed")
            self.forget(conversation.__eq__)
            more = False
        if not more:
            self._ahead.remove(conversation)
        return True

    async def _asked_within(self, seconds: float) -> bool:
        self._asked.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._asked.wait()
        return self._asked.is_set()

    # ---- in the engine's thread ----

    def _tidy(self) -> None:
        """Do the chores, in their order."""
        while self._chores:
            self._chores.popleft()()
        self._make_room()

    def _read(self, answers: Sequence[Answer]) -> Sequence[None]:
        for answer in answers:
            self._engine.prefill(answer)
        self._make_room()
        return [None] * len(answers)

    def _step(self, answers: Sequence[Answer]) -> Sequence[Step | KimiaError]:
        made = self._engine.step(answers)
        self._make_room()
        return made

    def _read_ahead(self, conversation: str) -> bool:
        more = self._engine.read_ahead(conversation)
        self._make_room()
        return more

    def _make_room(self) -> None:
        """Let what is kept make way for the caches of turns."""
        prefixes = self._engine.prefixes
        if len(prefixes):
            prefixes.shrink(sum(turn.answer.cache.nbytes for turn in tuple(self._turns)))
        PREFIX_BYTES.set(prefixes.nbytes)

    # ---- for those who wait ----

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

    def __init__(
        self, answer: Answer, start: Callable[[], None], left: Callable[[Answering, Row | None], None]
    ) -> None:
        self.answer = answer
        self.failed = False
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
        self.failed = isinstance(made, Exception)
        self._over = self._over or self.failed or (made is not None and made.stop is not None)  # type: ignore[union-attr]
        if made is not None and self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def leave(self, after: Row | None = None) -> None:
        """Take no further step; what is being computed goes unheard.

        `after` is what the conversation's history then has behind the prompt: it is read ahead for the next turn.
        """
        self._left(self, after)
