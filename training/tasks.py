"""Examples of every kind of task, before anything is spoken: who says what, and the right answer.

The kinds are those of the large model in miniature: transcription, a question about a recording, a caption, the class
of a sound, the style of speaking, text to speech, and spoken dialogue with memory over turns.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from kimia.model.instructions import TRANSCRIBE
from training.sounds import SOUNDS
from training.texts import Exchange, sample_dialogue, sample_exchange, sample_text

Kind = Literal["text", "speech", "sound"]

WANTS = {  # intent -> what the caller wants, as an answer to a question about a recording
    "hours": "the opening hours",
    "status": "the state of an order",
    "delivery place": "delivery to a city",
    "delivery time": "the time of delivery",
    "delivery price": "the price of delivery",
    "returns": "to return something",
    "address": "the address",
    "person": "to speak to a person",
    "give order": "to give an order number",
    "give name": "to give a name",
}
PACES = {"slowly": 0.75, "normally": 1.0, "fast": 1.33}
ASKED = {
    "transcribe": ("please write down what you hear", "transcribe this", TRANSCRIBE),
    "question": ("what does the caller want", "what is this call about"),
    "caption": ("describe what you hear", "what is in this recording"),
    "sound": ("what sound is this", "name this sound"),
    "style": ("how does the caller speak", "is the caller fast or slow"),
}


@dataclass(frozen=True)
class Part:
    """One message of a conversation."""

    role: Literal["user", "assistant"]
    kind: Kind
    text: str  # the words, or the name of the sound
    pace: float = 1.0  # of speech


@dataclass(frozen=True)
class Example:
    """A conversation and its right answer."""

    task: str
    parts: tuple[Part, ...]
    answer: str
    spoken: bool  # is the answer spoken as well as written


def _asked(rng: random.Random, task: str, heard: Part, answer: str) -> Example:
    return Example(task, (Part("user", "text", rng.choice(ASKED[task])), heard), answer, spoken=False)


def _speech(exchange: Exchange) -> Part:
    return Part("user", "speech", exchange.question)


def transcribe(rng: random.Random, *, held_out: bool) -> Example:
    """What is said, in letters."""
    text = sample_text(rng, held_out=held_out)
    return _asked(rng, "transcribe", Part("user", "speech", text), text)


def question(rng: random.Random, *, held_out: bool) -> Example:
    """What a caller wants."""
    while True:
        exchange = sample_exchange(rng, held_out=held_out)
        if exchange.intent in WANTS:
            return _asked(rng, "question", _speech(exchange), WANTS[exchange.intent])


def caption(rng: random.Random, *, held_out: bool) -> Example:
    """A sentence about the recording."""
    if rng.random() < 0.5:
        kind = rng.choice(list(SOUNDS))
        return _asked(rng, "caption", Part("user", "sound", kind), f"there is {kind} on the line")
    exchange = sample_exchange(rng, held_out=held_out)
    return _asked(rng, "caption", _speech(exchange), f"a caller says {exchange.question}")


def name_sound(rng: random.Random, *, held_out: bool) -> Example:  # noqa: ARG001 (sounds are drawn anew each time)
    """The class of a sound."""
    kind = rng.choice(list(SOUNDS))
    return _asked(rng, "sound", Part("user", "sound", kind), kind)


def style(rng: random.Random, *, held_out: bool) -> Example:
    """How fast a caller speaks."""
    name = rng.choice(list(PACES))
    text = sample_exchange(rng, held_out=held_out).question
    return _asked(rng, "style", Part("user", "speech", text, PACES[name]), name)


def say(rng: random.Random, *, held_out: bool) -> Example:
    """A text to be spoken: no conversation, the words are given."""
    return Example("say", (), sample_text(rng, held_out=held_out), spoken=True)


def call(exchanges: Sequence[Exchange], kind: Kind = "speech") -> Example:
    """A call up to its last answer."""
    parts: list[Part] = []
    for exchange in exchanges:
        parts += [Part("user", kind, exchange.question), Part("assistant", "speech", exchange.answer)]
    return Example("talk", tuple(parts[:-1]), exchanges[-1].answer, spoken=True)


def talk(rng: random.Random, *, held_out: bool) -> Example:
    """A call: the last answer, behind all that was said before."""
    memory = rng.random() < 0.4
    calls = sample_dialogue(rng, held_out=held_out).exchanges if memory else (sample_exchange(rng, held_out=held_out),)
    return call(calls, "text" if rng.random() < 0.1 else "speech")


TASKS: dict[Callable[..., Example], float] = {
    transcribe: 3.0,
    question: 1.0,
    caption: 1.0,
    name_sound: 1.0,
    style: 1.5,
    say: 2.0,
    talk: 5.0,
}


def sample_example(rng: random.Random, *, held_out: bool) -> Example:
    """An example of some task."""
    task = rng.choices(list(TASKS), list(TASKS.values()))[0]
    return task(rng, held_out=held_out)
