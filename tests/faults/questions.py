"""What the callers of a disturbed service ask, and what must hold of the answers whatever happened meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from kimia.client import AsyncKimia, AudioChunk, ClientOptions, TextDelta
from kimia.runtime.fake import read_pcm
from tests.faults.truth import demand

LONGEST = 300.0  # seconds of a turn: what takes longer hangs, however busy the machine
PATIENT = ClientOptions(attempts=500, longest_delay=0.5, patience=LONGEST, timeout=LONGEST)
RATE = 16000  # Hz


@dataclass(frozen=True)
class Question:
    """One turn of a caller. Callers are sessions; each asks one question after another."""

    caller: int
    number: int

    @property
    def session(self) -> str:
        """The caller's session."""
        return f"caller-{self.caller}"

    def chat(self) -> list[dict[str, Any]]:
        """Every other caller speaks, the rest write."""
        if self.caller % 2:
            return [{"role": "user", "message_type": "text", "content": f"question {self.number} of {self.caller}"}]
        pieces = 4 + self.caller
        data = bytes((self.caller * 31 + self.number * 7 + at // 320 + at) % 253 for at in range(pieces * 3200))
        return [{"role": "user", "message_type": "audio", "content": (data, RATE)}]


@dataclass(frozen=True)
class Heard:
    """An answer as a caller got it."""

    text: str
    texts: tuple[str, ...]  # delta by delta
    pieces: tuple[bytes, ...]  # of speech, chunk by chunk
    stop: str
    steps: int
    turn_id: str

    def same(self) -> tuple[Any, ...]:
        """What does not depend on who computed it and when."""
        return self.text, self.texts, self.pieces, self.stop, self.steps


async def ask(kimia: AsyncKimia, question: Question) -> Heard:
    """One turn, its events looked at one by one: no index is missing, none comes twice, one end comes last."""
    turn = kimia.generate(question.chat(), session=question.session, seed=question.caller * 100 + question.number)
    texts: list[str] = []
    pieces: list[bytes] = []
    async for event in turn:
        if isinstance(event, TextDelta):
            demand(event.index == len(texts), question, "got text", event.index, "after", len(texts))
            texts.append(event.text)
        elif isinstance(event, AudioChunk):
            demand(event.index == len(pieces), question, "got sound", event.index, "after", len(pieces))
            pieces.append(event.data)
    answer = turn.progress.answer()
    return Heard(answer.text, tuple(texts), tuple(pieces), answer.stop, answer.usage.steps, answer.turn_id)


def in_order(heard: Heard) -> None:
    """Every sample of a fake detokenizer says where it belongs."""
    found = [position for position, _ in read_pcm(b"".join(heard.pieces))]
    demand(found == list(range(len(found))), heard.turn_id, "has speech out of order")


async def ask_all(kimia: AsyncKimia, callers: int, turns: int) -> dict[Question, Heard]:
    """What every caller heard. Callers ask side by side."""
    found: dict[Question, Heard] = {}

    async def call(caller: int) -> None:
        for number in range(turns):
            question = Question(caller, number)
            found[question] = await ask(kimia, question)

    async with asyncio.TaskGroup() as group:
        for caller in range(callers):
            group.create_task(call(caller))
    return found


def compare(found: dict[Question, Heard], undisturbed: dict[Question, Heard]) -> None:
    """Every turn has ended, with the answer of the undisturbed run."""
    demand(found.keys() == undisturbed.keys(), "turns are missing")
    for question, heard in found.items():
        in_order(heard)
        demand(heard.same() == undisturbed[question].same(), question, "has another answer")
