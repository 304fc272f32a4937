"""What a whole checkpoint makes of held-out calls: every task of the domain, from the caller's sound to spoken words.

A call is played as it would go: the model hears the caller, says its own answer, and answers again behind that. Which
answers are right follows from the texts; what was spoken is judged by ear (`training.listening`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from kimia.model.conversation import OutputType
from kimia.model.presets import PRESETS, Preset
from kimia.pipeline import KimiAudio, TurnDone
from training.ahead import made
from training.augment import mu_law_8k, resampled
from training.classroom import resampled_speech
from training.listening import transcript
from training.progress import bar
from training.scores import ErrorRate, Row, error_rate
from training.sounds import sound
from training.tasks import Example, Part, call, caption, name_sound, question, say, style, transcribe
from training.texts import comparable, intent_of, sample_dialogue, sample_exchange
from training.voices import CALLERS, HEARING_RATE, SPEAKER, STRANGERS, Cache, Voice

Line = Callable[[np.ndarray], np.ndarray]  # what happens to a wave (S,) at HEARING_RATE on its way
Task = Callable[..., Example]
T = TypeVar("T")
Section = Callable[[], Iterator[Row]]  # what is measured together

VOICES: Mapping[str, Sequence[Voice]] = {"speaker": (SPEAKER,), "callers": CALLERS, "strangers": STRANGERS}
OPTIONS: Mapping[str, Any] = {"text_temperature": 0.0, "audio_temperature": 0.0, "seed": 1, "max_new_tokens": 150}


def direct(wave: np.ndarray) -> np.ndarray:
    """No line at all."""
    return wave


LINES: Mapping[str, Line] = {"": direct, ", 8 kHz mu-law": mu_law_8k}


def one_call(rng: random.Random, *, held_out: bool) -> Example:
    """A single question on the phone."""
    return call((sample_exchange(rng, held_out=held_out),))


def recall(rng: random.Random, *, held_out: bool) -> Example:
    """A call in which the caller asks for what he has told before."""
    while True:
        dialogue = sample_dialogue(rng, held_out=held_out)
        if dialogue.exchanges[-1].intent == "recall":
            return call(dialogue.exchanges)


@dataclass(frozen=True)
class Shop:
    """A checkpoint that answers calls."""

    silent: KimiAudio  # without its detokenizer: only what is listened to is synthesised
    speaking: KimiAudio
    cache: Cache  # of the callers' sound

    @classmethod
    def load(cls, checkpoint: Path, corpus: Path) -> Shop:
        """A whole checkpoint, and the corpus whose sound its callers have. Raises CheckpointError."""
        return cls(KimiAudio(checkpoint, False, device="cpu"), KimiAudio(checkpoint, device="cpu"), Cache(corpus))

    def answer(self, example: Example, voice: Voice, line: Line, noise: np.random.Generator) -> TurnDone:
        """The last answer of a call; the answers before it are the model's own."""
        chat: list[dict[str, Any]] = []
        for part in example.parts:
            if part.role == "assistant":
                chat.append(self._turn(chat, "both").message())
            elif part.kind == "text":
                chat.append({"role": "user", "message_type": "text", "content": part.text})
            else:
                wave = np.ascontiguousarray(line(self._wave(part, voice, noise)), np.float32)
                chat.append({"role": "user", "message_type": "audio", "content": (wave, HEARING_RATE)})
        return self._turn(chat, "both" if example.spoken else "text")

    def said(self, text: str, preset: Preset) -> np.ndarray:
        """A given text as sound, (S,) at the speaking rate."""
        return self.speaking.say(text, preset=preset.name, **OPTIONS)[0].numpy()

    def speech(self, codes: Sequence[int], preset: Preset) -> np.ndarray:
        """Codes as sound, (S,) at the speaking rate."""
        assert self.speaking.detokenizer is not None
        return self.speaking.detokenizer.synthesize(list(codes), preset, OPTIONS["seed"]).numpy()

    def _turn(self, chat: Sequence[Mapping[str, Any]], output: OutputType) -> TurnDone:
        *_, done = self.silent.stream(chat, output, **OPTIONS)
        assert isinstance(done, TurnDone)
        return done

    def _wave(self, part: Part, voice: Voice, noise: np.random.Generator) -> np.ndarray:
        if part.kind == "sound":
            return sound(part.text, noise)
        wave = resampled_speech(self.cache.speech(voice, part.text))
        return wave if part.pace == 1.0 else resampled(wave, part.pace)


@dataclass(frozen=True)
class Told:
    """What was answered to an example."""

    wanted: str
    text: str
    codes: tuple[int, ...]  # of the spoken answer


@dataclass(frozen=True)
class Exam:
    """Questions to a shop: `items` of each task and group of voices, `listen` of which a judge listens to.

    With `workers`, so many processes ask them.
    """

    shop: Shop
    items: int
    listen: int
    workers: int = 0
    _calls_told: dict[Line, list[list[Told]]] = field(default_factory=dict, init=False)

    def sections(self) -> dict[str, Section]:
        """All measures, by what is measured together."""
        found: dict[str, Section] = {}
        for name, line in LINES.items():
            found |= {
                f"transcription{name}": self._each(f"transcription{name}: words wrong", words_wrong, transcribe, line),
                f"calls{name}": partial(self._calls, name, line),
                f"memory{name}": self._each(f"memory over turns{name}: answers wrong", answers_wrong, recall, line),
                f"sounds{name}": partial(self._sounds, name, line),
            }
        for preset in PRESETS.values():
            found[f"calls, {preset.name}"] = partial(self._heard_calls, preset)
            found[f"say, {preset.name}"] = partial(self._say, preset)
        for task, what in ((question, "what a caller wants"), (caption, "captions"), (style, "style of speaking")):
            found[what] = self._each(f"{what}: answers wrong", answers_wrong, task, direct)
        return found

    def _each(self, measure: str, wrong: Callable[[Sequence[Told]], ErrorRate], task: Task, line: Line) -> Section:
        """A task in the voices of every group."""

        def section() -> Iterator[Row]:
            yield Row(measure, tuple(str(wrong(self._told(task, voices, line))) for voices in VOICES.values()))

        return section

    def _sounds(self, name: str, line: Line) -> Iterator[Row]:
        wrong = answers_wrong(self._told(name_sound, (SPEAKER,), line))
        yield Row(f"sound events{name}: answers wrong", (str(wrong), "", ""))

    def _calls(self, name: str, line: Line) -> Iterator[Row]:
        """Answers to single questions, as text."""
        groups = self._answered(line)
        yield Row(f"calls{name}: intents wrong, as written", tuple(str(intents_wrong(told)) for told in groups))
        yield Row(f"calls{name}: answers wrong, as written", tuple(str(answers_wrong(told)) for told in groups))

    def _heard_calls(self, preset: Preset) -> Iterator[Row]:
        """The same answers, as they sound."""
        groups = [told[: self.listen] for told in self._answered(direct)]
        heard = [self._heard(told, preset) for told in groups]
        own = [[one.text for one in told] for told in groups]
        wanted = [[one.wanted for one in told] for told in groups]
        yield Row(
            f"calls, {preset.name}: words heard that are not in the answer's text",
            tuple(str(errors(*pair, words=True)) for pair in zip(own, heard, strict=True)),
        )
        yield Row(
            f"calls, {preset.name}: intents wrong, as heard",
            tuple(str(errors(*map(intents, pair))) for pair in zip(wanted, heard, strict=True)),
        )

    def _answered(self, line: Line) -> list[list[Told]]:
        """Answers to single questions by group of voices; asked once."""
        if line not in self._calls_told:
            self._calls_told[line] = [self._told(one_call, voices, line) for voices in VOICES.values()]
        return self._calls_told[line]

    def _say(self, preset: Preset) -> Iterator[Row]:
        """Texts that are to be spoken."""
        rng = random.Random("say")
        texts = [say(rng, held_out=True).answer for _ in range(self.listen)]
        heard = self._said(texts, preset)
        yield Row(f"say, {preset.name}: words heard wrongly", (str(errors(texts, heard, words=True)), "", ""))

    def _heard(self, told: Sequence[Told], preset: Preset) -> list[str]:
        def heard(index: int) -> str:
            codes = told[index].codes
            return transcript(self.shop.speech(codes, preset)) if codes else ""

        return self._made(preset.name, len(told), heard)

    def _said(self, texts: Sequence[str], preset: Preset) -> list[str]:
        return self._made("say", len(texts), lambda index: transcript(self.shop.said(texts[index], preset)))

    def _told(self, task: Task, voices: Sequence[Voice], line: Line) -> list[Told]:
        """Held-out examples in these voices with their answers; the same examples for every checkpoint and line."""
        rng = random.Random(task.__name__)
        examples = [(task(rng, held_out=True), rng.choice(voices)) for _ in range(self.items)]

        def told(index: int) -> Told:
            example, voice = examples[index]
            done = self.shop.answer(example, voice, line, np.random.default_rng((self.items, index)))
            return Told(example.answer, done.text, tuple(done.result.audio_codes))

        return self._made(task.__name__, self.items, told)

    def _made(self, what: str, count: int, make: Callable[[int], T]) -> list[T]:
        return [*bar(made(make, range(count), self.workers), desc=what, total=count, leave=False)]


# ---- measures ---------------------------------------------------------------------------------------------------


def errors(wanted: Sequence[str], told: Sequence[str], *, words: bool = False) -> ErrorRate:
    """Words wrong, or whole answers; as judges compare them."""
    pairs = [[comparable(text) for text in texts] for texts in (wanted, told)]
    if words:
        return error_rate(*pairs, words=True)
    return error_rate(*([text.replace(" ", "_") or "-" for text in texts] for texts in pairs), words=True)


def words_wrong(told: Sequence[Told]) -> ErrorRate:
    """Of written answers."""
    return errors([one.wanted for one in told], [one.text for one in told], words=True)


def answers_wrong(told: Sequence[Told]) -> ErrorRate:
    """Of written answers; one word wrong is all wrong."""
    return errors([one.wanted for one in told], [one.text for one in told])


def intents(answers: Sequence[str]) -> list[str]:
    """What each answer is about."""
    return [intent_of(answer) for answer in answers]


def intents_wrong(told: Sequence[Told]) -> ErrorRate:
    """Of written answers."""
    return errors(intents([one.wanted for one in told]), intents([one.text for one in told]))
