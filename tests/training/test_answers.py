"""Questions to a whole checkpoint: calls are played in order, and right and wrong answers are told apart."""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from kimia.pipeline import KimiAudio
from training import answers
from training.answers import OPTIONS, Exam, Shop, Told, answers_wrong, direct, errors, intents_wrong, words_wrong
from training.tasks import Example, Part
from training.voices import SPEAKER, SPEECH_RATE

pytestmark = pytest.mark.unit


class Tones:
    """Sound of half a second a word."""

    def speech(self, voice, text):
        return np.sin(np.arange(len(text.split()) * SPEECH_RATE // 2) / 30).astype(np.float32)


@pytest.fixture(scope="module")
def shop(tiny):
    model = KimiAudio(tiny, device="cpu")
    return Shop(model, model, Tones())


def test_a_call_is_answered_behind_the_model_s_own_words(shop, monkeypatch):
    monkeypatch.setitem(OPTIONS, "max_new_tokens", 12)
    asked = []
    stream = shop.silent.stream
    monkeypatch.setattr(
        shop.silent, "stream", lambda chat, *rest, **options: (asked.append([*chat]), stream(chat, *rest, **options))[1]
    )
    parts = (
        Part("user", "speech", "my name is anna"),
        Part("assistant", "speech", "hello anna"),
        Part("user", "text", "what is my name"),
    )
    noise = np.random.default_rng(0)
    told = shop.answer(Example("talk", parts, "your name is anna", spoken=True), SPEAKER, direct, noise)
    assert [len(chat) for chat in asked] == [1, 3]
    own = asked[1][1]
    assert own["role"] == "assistant"
    assert "text_tokens" in own  # by its ids, not by the right words
    assert own.get("content") != "hello anna"
    again = shop.answer(Example("talk", parts, "", spoken=True), SPEAKER, direct, noise)
    assert again.result == told.result


def test_speech_has_the_length_of_its_codes(shop):
    preset = next(iter(answers.PRESETS.values()))
    assert len(shop.speech([1, 2, 3], preset)) == 3 * SPEECH_RATE * 2 // 25


class Oracle:
    """Answers every example rightly, or with one word too few."""

    def __init__(self, words_left_out=0):
        self.left_out = words_left_out

    def answer(self, example, voice, line, noise):
        words = example.answer.split()
        text = " ".join(words[: len(words) - self.left_out])
        return SimpleNamespace(text=text, result=SimpleNamespace(audio_codes=(text,)))

    def speech(self, codes, preset):
        return codes[0]

    def said(self, text, preset):
        return text


def rows(exam):
    return [row for section in exam.sections().values() for row in section()]


@pytest.fixture
def rates(monkeypatch):
    """The first figure of every cell of an exam."""
    monkeypatch.setattr(answers, "transcript", answers.comparable)
    return lambda oracle: {
        measure: [float(cell.split()[0]) for cell in cells if cell] for measure, cells in rows(Exam(oracle, 6, 3))
    }


def test_right_answers_are_all_right(rates):
    found = rates(Oracle())
    assert {rate for cell in found.values() for rate in cell} == {0.0}
    assert len(found) == 19
    assert len(found["transcription: words wrong"]) == 3
    assert len(found["say, low-latency: words heard wrongly"]) == 1


def test_a_word_too_few_makes_answers_wrong_but_not_their_intents(rates):
    found = rates(Oracle(words_left_out=1))
    assert found["calls: answers wrong, as written"] == [100.0] * 3
    assert max(found["calls, upstream: intents wrong, as heard"]) < 50
    assert found["calls, upstream: words heard that are not in the answer's text"] == [0.0] * 3
    assert found["memory over turns: answers wrong"] == [100.0] * 3
    assert found["memory over turns, 8 kHz mu-law: answers wrong"] == [100.0] * 3
    assert found["sound events, 8 kHz mu-law: answers wrong"] == [100.0]


def test_processes_find_what_one_finds(monkeypatch):
    monkeypatch.setattr(answers, "transcript", answers.comparable)
    alone, helped = (rows(Exam(Oracle(words_left_out=1), 6, 3, workers)) for workers in (0, 2))
    assert helped == alone


def test_errors_by_words_and_by_answers():
    wanted, told = ["order four two", "yes", "no"], ["order 42", "yes please", ""]
    assert errors(wanted, told).rate == pytest.approx(2 / 3)
    assert errors(wanted, told, words=True).rate == pytest.approx(2 / 5)
    pairs = [Told(one, two, ()) for one, two in zip(wanted, told, strict=True)]
    assert answers_wrong(pairs).rate == errors(wanted, told).rate
    assert words_wrong(pairs).rate == errors(wanted, told, words=True).rate
    assert intents_wrong([Told("we are closed on sunday", "closed on sunday", ())]).rate == 0


def test_a_recall_asks_for_what_was_told():
    example = answers.recall(random.Random(0), held_out=True)
    assert example.parts[-1].text.startswith(("what is my", "which order", "do you remember"))
    assert example.spoken
