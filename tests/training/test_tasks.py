"""Tasks: every kind occurs, with the right answer."""

import random

import pytest

from training.sounds import SOUNDS
from training.tasks import PACES, TASKS, WANTS, sample_example, style, talk
from training.texts import is_held_out

pytestmark = pytest.mark.unit


def examples(count, held_out=False):
    rng = random.Random(1)
    return [sample_example(rng, held_out=held_out) for _ in range(count)]


def test_every_kind_of_task_occurs():
    assert {example.task for example in examples(300)} == {
        "transcribe", "question", "caption", "sound", "style", "say", "talk"}  # fmt: skip
    assert len(TASKS) == 7


def test_answers_are_right():
    for example in examples(300):
        last = example.parts[-1] if example.parts else None
        if example.task == "transcribe":
            assert example.answer == last.text
        elif example.task == "sound":
            assert example.answer == last.text
            assert last.text in SOUNDS
        elif example.task == "question":
            assert example.answer in WANTS.values()
        elif example.task == "style":
            assert PACES[example.answer] == last.pace


def test_only_calls_and_texts_to_say_are_spoken():
    for example in examples(300):
        assert example.spoken == (example.task in ("say", "talk"))
        assert example.task == "say" or example.parts[-1].role == "user"


def test_a_call_has_both_sides_in_turn():
    calls = [talk(random.Random(seed), held_out=False) for seed in range(40)]
    assert max(len(call.parts) for call in calls) >= 3
    for call in calls:
        roles = [part.role for part in call.parts]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]


def test_held_out_examples_speak_held_out_texts():
    for seed in range(20):
        assert is_held_out(style(random.Random(seed), held_out=True).parts[-1].text)
