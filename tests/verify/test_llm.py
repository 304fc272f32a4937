"""Golden sets of the language model, here from the plain formulation: what passes, and that wrong numbers are found."""

import pytest

from kimia.model.sampler import Sampling, TrackSampling
from kimia.verify import answers, llm, verify
from tests.golden_data import golden
from tests.verify.sets import edit_json, edit_tensor, report, unreadable

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


# ---- what may be absent -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", ["temperature", "top_k", "repetition_penalty", "window", "recent", "candidates", "key"]
)
def test_a_sampler_case_may_lack_any_field(llm_set, field):
    """Then the release's default holds, which gives other numbers here or changes nothing."""

    def thin_out(sampler):
        (case,) = sampler["cases"]
        sampler["cases"] = [{name: case[name] for name in case if name != field} | {"name": "case0"}, case]

    edit_json(llm_set / "goldens/sampler.json", thin_out)
    assert unreadable(llm_set) == {}
    outcome = report(llm_set)
    assert outcome["sampler.penalty"] == "PASS"
    assert outcome["sampler.case0"] == ("PASS" if field in ("candidates", "key") else "FAIL")


def test_defaults_of_the_sampler_are_the_release_s_of_the_head():
    assert (llm._sampling({}), llm._sampling({"head": "text"})) == (Sampling().text,) * 2
    assert llm._sampling({"head": "audio"}) == Sampling().audio
    assert (Sampling().text.repetition_window, Sampling().audio.repetition_window) == (16, 64)
    given = {"temperature": 0.5, "top_k": 2, "repetition_penalty": 2.0, "window": 0}
    assert llm._sampling(given) == TrackSampling(0.5, 2, 2.0, 0)
    assert llm._sampling(dict.fromkeys(given)) == Sampling().text


def test_a_run_without_budget_has_the_release_s(llm_set, monkeypatch):
    monkeypatch.setattr(answers, "steps_allowed", lambda *arguments: 5)
    edit_json(llm_set / "goldens/decode.json", lambda decode: decode["runs"][0].pop("max_new_tokens"))
    assert report(llm_set)["decode.history_both"] == "PASS"


# ---- what cannot be read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["prompts", "prefill", "decode", "sampler", "finetune"])
def test_an_unreadable_file_leaves_the_others(llm_set, file):
    whole = report(llm_set)
    (llm_set / f"goldens/{file}.json").write_text("[" * 200_000)
    assert f"{file}.json" in unreadable(llm_set)["llm"]
    others = set(report(llm_set))
    assert {name for name in whole if not name.startswith(file)} <= others
    assert not {name for name in whole if name.startswith(file)} & others


def test_a_damaged_case_leaves_the_others(llm_set):
    whole = report(llm_set)
    edit_json(llm_set / "goldens/decode.json", lambda decode: decode["runs"][0].pop("output_type"))
    assert "malformed (KeyError('output_type'))" in unreadable(llm_set)["decode.history_both"]
    assert report(llm_set) == whole | {"decode.history_both": "FAIL"}


def test_a_broken_checkpoint_fails_the_cases_that_need_it(llm_set):
    whole = report(llm_set)
    (llm_set / "checkpoint/model.safetensors").write_bytes(b"")
    broken = unreadable(llm_set)
    assert {name.partition(".")[0] for name in broken} == {"prefill", "decode"}
    assert all("model.safetensors" in reason for reason in broken.values())
    assert report(llm_set) == whole | dict.fromkeys(broken, "FAIL")
