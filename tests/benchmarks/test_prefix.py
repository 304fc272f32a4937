"""The benchmark of kept conversations runs, and both of its second turns do the same work."""

import dataclasses

import pytest

from benchmarks.prefix import Conversation, report
from tests.model.tiny_lm import CONFIG, random_lm

pytestmark = pytest.mark.unit

LM = random_lm(dataclasses.replace(CONFIG, max_positions=1024, intermediate_size=64))


def test_every_number_is_there() -> None:
    found = report(LM, 400, repeats=2)
    assert (found["positions"], found["reused"]) == (460, 384)
    assert all(number > 0 for number in found["first_text_ms"].values())
    assert found["idle_ms"] > 0
    assert found["kept_megabytes"] > 0


def test_both_turns_answer_the_same() -> None:
    conversation = Conversation(LM, 300)
    conversation.between()
    kept, alone = (conversation.begin(conversation.second, name) for name in ("call", ""))
    assert (kept.reused, alone.reused) == (256, 0)
    assert (kept.tracks.text, kept.tracks.audio) == (alone.tracks.text, alone.tracks.audio)
