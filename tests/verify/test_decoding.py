"""Greedy runs, whole calls and single steps of the language model: one wrong id, fact or number is found."""

import copy

import pytest

from kimia.verify import decoding
from tests.verify.sets import edit_json, edit_tensor, report

pytestmark = pytest.mark.parity


IDS = (
    "prompt_audio_ids", "raw_text", "raw_audio", "text_stream", "audio_stream", "returned_text", "returned_audio",
    "filtered_text_ids", "filtered_audio_codes",
)  # fmt: skip
WRONG = {field: (lambda run, field=field: run[field].append(0)) for field in IDS} | {
    "stop": lambda run: run.update(stop="text_eos"),
    "steps": lambda run: run.update(steps=4),
    "text": lambda run: run.update(text="?"),
}


def test_every_wrong_fact_of_a_run_fails(llm_set):
    def with_variants(decode):
        (right,) = decode["runs"]
        for name, change in WRONG.items():
            wrong = copy.deepcopy(right) | {"name": name}
            change(wrong)
            decode["runs"].append(wrong)

    edit_json(llm_set / "goldens/decode.json", with_variants)
    outcome = report(llm_set)
    assert outcome["decode.history_both"] == "PASS"
    assert {name: outcome[f"decode.{name}"] for name in WRONG} == dict.fromkeys(WRONG, "FAIL")


def test_whole_calls_have_the_release_s_budget(llm_set, monkeypatch):
    def budget(positions, output_type, max_new_tokens, config, rule):
        assert (output_type, max_new_tokens, rule) == ("text", 2, "upstream")
        return 1

    monkeypatch.setattr(decoding, "steps_allowed", budget)
    assert report(llm_set)["decode.generate_api.short"] == "FAIL"  # it has two steps


def test_the_release_s_step_with_text_id_zero_is_not_compared(llm_set):
    path = llm_set / "goldens/decode_logits.safetensors"
    edit_tensor(path, "text_id_zero_step.upstream.text_logits", lambda logits: logits.add_(1))
    assert report(llm_set)["decode.text_id_zero_step"] == "PASS"
    edit_tensor(path, "text_id_zero_step.fixed.audio_logits", lambda logits: logits.add_(1e-4))
    assert report(llm_set)["decode.text_id_zero_step"] == "FAIL"


@pytest.mark.parametrize(
    ("codes", "calls", "plan"),
    [
        (range(3), [3], [([0, 1, 2], True)]),
        (range(5), [2, 2, 1], [([0, 1], False), ([2, 3], False), ([4], True)]),
        (range(4), [2, 2], [([0, 1], False), ([2, 3], True)]),
        ((), [0], [([], True)]),
    ],
)
def test_codes_are_cut_in_pushes_as_long_as_the_first(codes, calls, plan):
    assert decoding._plan(list(codes), [{"tokens": [0] * size} for size in calls]) == plan
