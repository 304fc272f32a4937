"""Comparing answers: both loops are looked at, uniform numbers lie text first, logits come from every step."""

from dataclasses import replace

import pytest
import torch

from kimia.model.generate import GenerateOptions, generate
from kimia.model.lm import stack
from kimia.model.philox import Track
from kimia.verify import answers
from kimia.verify.answers import Speaker, compare_answer, compare_logits, injected
from kimia.verify.report import Comparison
from tests.model.tiny_lm import TOKENS, random_lm, random_row

pytestmark = pytest.mark.parity

ROW = random_row(6, seed=1)
OPTIONS = GenerateOptions("both", max_steps=6)


class Numbers:
    """In place of a text tokenizer."""

    def decode(self, ids):
        return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def speaker():
    return Speaker(random_lm(), Numbers(), TOKENS)


def streams(speaker) -> dict[str, list[int]]:
    steps = list(generate(speaker.lm, ROW, TOKENS, OPTIONS))
    return {"text_stream": [step.text_id for step in steps], "audio_stream": [step.audio_id for step in steps]}


def test_uniform_numbers_lie_text_first():
    uniforms = injected([0.0, 0.1, 0.2, 0.3])
    assert [uniforms(track, step) for step in (0, 1) for track in (Track.TEXT, Track.AUDIO)] == [0.0, 0.1, 0.2, 0.3]
    assert injected(None) is None


def test_a_right_answer_passes_and_absent_fields_are_not_missed(speaker):
    for expected in (streams(speaker), {}):
        comparison = Comparison()
        compare_answer(comparison, speaker, ROW, OPTIONS, expected)
        assert comparison.passed


@pytest.mark.parametrize("plain", [True, False])
def test_either_loop_that_goes_astray_is_found(speaker, monkeypatch, plain):
    expected = streams(speaker)

    def astray(lm, row, tokens, options):
        for step in generate(lm, row, tokens, options):
            yield replace(step, text_id=step.text_id ^ 1) if options.plain is plain and step.index == 2 else step

    monkeypatch.setattr(answers, "generate", astray)
    comparison = Comparison()
    compare_answer(comparison, speaker, ROW, OPTIONS, expected)
    assert not comparison.passed
    assert ("fast path" in comparison.what) is not plain


def test_logits_of_every_step(speaker):
    comparison = Comparison()
    result = compare_answer(comparison, speaker, ROW, OPTIONS, {})
    whole = replace(
        ROW,
        audio_ids=[*ROW.audio_ids, *result.audio_stream[:-1]],
        text_ids=[*ROW.text_ids, *result.text_stream[:-1]],
    )
    logits = speaker.lm(stack([whole], torch.device("cpu"))).audio_logits[0, len(ROW.audio_ids) - 1 :]
    compare_logits(comparison, speaker.lm, ROW, result, {"audio": logits})
    assert comparison.passed
    logits[1, 2] += 1e-3
    compare_logits(comparison, speaker.lm, ROW, result, {"audio": logits})
    assert comparison.what == "audio logits"
    assert not comparison.passed
