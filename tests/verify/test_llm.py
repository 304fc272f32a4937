"""Golden sets of the language model, here from the plain formulation: what passes, and that wrong numbers are found."""

import pytest

from kimia.errors import CheckpointError
from kimia.verify import verify
from tests.golden_data import golden
from tests.verify.sets import edit_json, edit_tensor, report

pytestmark = pytest.mark.parity


def test_public_set():
    outcomes = list(verify(golden("llm")))
    assert [str(outcome) for outcome in outcomes if outcome.status == "FAIL"] == []
    assert {outcome.name for outcome in outcomes if outcome.status == "SKIP"} == {
        outcome.name for outcome in outcomes if outcome.name.startswith("finetune.")
    }


def test_cases_and_skips(llm_set):
    assert report(llm_set) == {
        "prompts.text_tokens": "PASS",
        "prompts.special_tokens": "PASS",
        "prompts.history": "PASS",
        "prompts.rejected.audio_tokens_given": "PASS",
        "prompts.rejected.system_role": "PASS",
        "prefill.history": "PASS",
        "decode.history_both": "PASS",
        "decode.generate_api.short": "PASS",
        "decode.text_id_zero_step": "PASS",
        "sampler.penalty": "PASS",
        "finetune.sample0": "SKIP",
    }


def bump(tensor):
    tensor.view(-1)[0] += 0.001


@pytest.mark.parametrize(
    ("file", "tensor", "case"),
    [
        ("prefill", "history.inputs_embeds", "prefill.history"),
        ("prefill", "history.fork_hidden", "prefill.history"),
        ("prefill", "history.text_logits", "prefill.history"),
        ("prefill", "history.audio_hidden", "prefill.history"),
        ("prefill", "history.kv.5.k", "prefill.history"),
        ("prefill", "history.kv.5.v", "prefill.history"),
        ("decode_logits", "history_both.audio_logits", "decode.history_both"),
        ("decode_logits", "text_id_zero_step.fixed.text_logits", "decode.text_id_zero_step"),
        ("sampler", "case0.penalised_logits", "sampler.penalty"),
        ("sampler", "case0.logprobs", "sampler.penalty"),
        ("sampler", "case0.probs", "sampler.penalty"),
    ],
)
def test_one_wrong_number_fails_its_case_alone(llm_set, file, tensor, case):
    edit_tensor(llm_set / "goldens" / f"{file}.safetensors", tensor, bump)
    assert [name for name, status in report(llm_set).items() if status == "FAIL"] == [case]


@pytest.mark.parametrize(
    ("field", "case"),
    [("text_token_ids", "prompts.history"), ("is_continuous_mask", "prompts.history"),
     ("text_loss_mask", "prompts.history"), ("audio_loss_mask", "prompts.history")],
)  # fmt: skip
def test_one_wrong_position_of_a_prompt_fails(llm_set, field, case):
    edit_json(llm_set / "goldens/prompts.json", lambda prompts: prompts["cases"][0][field].__setitem__(1, 1))
    assert report(llm_set)[case] == "FAIL"


def test_what_must_be_refused_must_not_pass_and_the_other_way_round(llm_set):
    def swap(prompts):
        first, second = prompts["rejected"]
        first["messages"], second["messages"] = second["messages"], first["messages"]

    edit_json(llm_set / "goldens/prompts.json", swap)
    outcome = report(llm_set)
    assert outcome["prompts.rejected.audio_tokens_given"] == outcome["prompts.rejected.system_role"] == "FAIL"


def test_wrong_special_token_fails(llm_set):
    edit_json(llm_set / "goldens/prompts.json", lambda prompts: prompts.update(pad_id=3))
    assert report(llm_set)["prompts.special_tokens"] == "FAIL"


def test_only_what_is_there_is_compared(llm_set):
    (llm_set / "goldens/decode.json").unlink()
    (llm_set / "goldens/sampler.json").unlink()
    (llm_set / "goldens/finetune.json").unlink()
    assert set(report(llm_set).values()) == {"PASS"}


def test_broken_checkpoint_ends_the_report(llm_set):
    (llm_set / "checkpoint/model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        report(llm_set)
