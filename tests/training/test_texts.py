"""Texts: enough words, answers by rule, a split that holds, and one form to compare in."""

import random

import pytest

from kimia.errors import ParameterError
from training.scores import LETTERS
from training.texts import (
    BY_NAME,
    INTENTS,
    comparable,
    intent_of,
    is_held_out,
    is_said_by_shop,
    sample_dialogue,
    sample_exchange,
    sample_text,
    shop_sentences,
    vocabulary,
)

pytestmark = pytest.mark.unit


def exchange(intent, seed=0):
    return sample_exchange(random.Random(seed), held_out=False, intent=intent)


def test_the_domain_has_at_least_140_words():
    assert len(vocabulary()) >= 140


def test_every_text_is_of_known_words_and_letters():
    rng = random.Random(3)
    words = vocabulary()
    for _ in range(500):
        text = sample_text(rng, held_out=False)
        assert set(text) <= set(LETTERS)
        assert set(text.split()) <= words


def test_the_same_seed_gives_the_same_exchanges():
    assert exchange(None, 7) == exchange(None, 7)
    assert exchange("status", 1) != exchange("status", 2)


@pytest.mark.parametrize("held_out", [True, False])
def test_texts_come_from_the_wanted_side_of_the_split(held_out):
    rng = random.Random(5)
    assert all(is_held_out(sample_text(rng, held_out=held_out)) == held_out for _ in range(100))


def test_held_out_texts_are_questions_answers_and_numbers():
    rng = random.Random(6)
    texts = [sample_text(rng, held_out=True) for _ in range(300)]
    answers = sum(map(is_said_by_shop, texts))
    assert 50 < answers < 150
    assert any("do you deliver" in text for text in texts)


def test_common_ground_is_never_held_out():
    few = [question for intent in INTENTS if not intent.carriers for question in intent.questions]
    assert {"on monday we are open from nine to six", "your name is anna"} <= shop_sentences()
    assert "of course your name is anna" in shop_sentences()
    assert not any(map(is_held_out, (*shop_sentences(), *few)))
    assert not any("order" in text.split() for text in shop_sentences())


def test_the_shop_s_sentences_are_told_from_others():
    rng = random.Random(8)
    for _ in range(200):
        found = sample_exchange(rng, held_out=False)
        assert is_said_by_shop(found.answer)
        assert is_said_by_shop("of course " + found.answer)
    assert is_said_by_shop("your order number is four seven two")
    assert not is_said_by_shop("where is my order four seven two")


def test_held_out_questions_of_an_intent_without_any_are_refused():
    with pytest.raises(ParameterError, match="no held-out questions"):
        sample_exchange(random.Random(0), held_out=True, intent="yes")


def test_every_intent_answers():
    for intent in INTENTS:
        answer = exchange(intent.name).answer
        assert answer
        assert "{" not in answer


@pytest.mark.parametrize(
    ("day", "answer"), [("sunday", "closed"), ("saturday", "ten to four"), ("monday", "nine to six")]
)
def test_opening_hours_follow_the_day(day, answer):
    assert answer in BY_NAME["hours"].answer({"day": day})


@pytest.mark.parametrize(
    ("last", "state"), [("two", "on its way"), ("five", "delivered"), ("seven", "packed"), ("nine", "collection")]
)
def test_the_state_of_an_order_follows_its_last_digit(last, state):
    answer = BY_NAME["status"].answer({"digits": f"four six {last}"})
    assert answer.startswith(f"order four six {last} ")
    assert state in answer


def test_an_answer_speaks_of_the_item_that_was_asked_about():
    for seed in range(20):
        found = exchange("returns", seed)
        item = found.answer.split()[4]
        assert item in found.question.split()


def test_a_call_asks_back_what_was_told():
    for seed in range(50):
        first, *_, last = sample_dialogue(random.Random(seed), held_out=False).exchanges
        told = {"recall": last.answer.split("is ")[-1], "repeat": first.answer}[last.intent]
        assert told in (first.question if last.intent == "recall" else last.answer)


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        (" My order number is 472.", "my order number is four seven two"),
        ("4.72", "four seven two"),
        ("We are at 12 Market Street!", "we are at twelve market street"),
        ("within 30 days", "within thirty days"),
        ("Four, oh two", "four zero two"),
        ("OK, ten to four", "ok 10 to 4"),
        ("Where is my order for 72", "where is my order four seven two"),
    ],
)
def test_what_recognisers_write_compares_equal_to_what_was_said(written, spoken):
    assert comparable(written) == comparable(spoken)


def test_different_numbers_do_not_compare_equal():
    assert comparable("order 472") != comparable("order four seven three")


def test_an_answer_tells_its_intent():
    rng = random.Random(5)
    for _ in range(300):
        found = sample_exchange(rng, held_out=False)
        assert intent_of(found.answer) == found.intent
    assert intent_of("order number seven delivered yesterday") == "status"
    assert intent_of("on friday open nine to six") == "hours"
    assert intent_of("") in BY_NAME
