"""Golden conversations: the committed ones, and wrong numbers of every kind in the shortest ones."""

import copy
import json
import re
import shutil

import pytest

from kimia.verify import e2e, verify
from tests.golden_data import golden
from tests.verify.sets import SMALLEST, committed, edit_json, edit_tensor, report, unreadable

pytestmark = pytest.mark.parity

SPOKEN = SMALLEST["e2e"]
WRITTEN = "text_only_text"


def test_golden_set():
    outcomes = list(verify(golden("e2e")))
    assert {outcome.status for outcome in outcomes} == {"PASS"}
    assert any(outcome.name.startswith("audio.") for outcome in outcomes)


# ---- wrong numbers: all variants of a case in one set, so that models are loaded once ---------------------------

IDS = (
    "prompt_audio_ids", "prompt_text_ids", "is_continuous_mask", "continuous_feature_frames", "text_stream",
    "audio_stream", "returned_text_ids", "returned_audio_ids", "text_ids", "audio_codes",
)  # fmt: skip
DRAWN = {"text_temperature": 1.0, "text_top_k": 0}
WRONG_WRITTEN = {field: (lambda case, field=field: case[field].append(1)) for field in IDS} | {
    "stop": lambda case: case.update(stop="audio_eod"),
    "steps": lambda case: case.update(steps=1),
    "text": lambda case: case.update(text="?"),
    "max_new_tokens": lambda case: case.update(max_new_tokens=5),
    "sampling": lambda case: case.update(sampling=DRAWN),
    "uniforms": lambda case: case.update(sampling=DRAWN, uniforms=[0.99] * 500),
}
WRONG_SPOKEN = {
    "n_chunks": lambda case: case.update(n_chunks=2),
    "wav_samples": lambda case: case.update(wav_samples=1),
    "tokens": lambda case: case["chunks"][0].update(tokens=3),
    "samples": lambda case: case["chunks"][0].update(samples=3),
    "is_final": lambda case: case["chunks"][0].update(is_final=False),
    "wav": lambda case: case.update(file="wav.safetensors"),
    "noise": lambda case: case.update(file="chunk0.noise.safetensors"),
}


def with_variants(spec, changes) -> None:
    """The set's one case as it is and once for each change."""
    (right,) = spec["cases"]
    for name, change in changes.items():
        wrong = copy.deepcopy(right) | {"name": name}
        change(wrong)
        spec["cases"].append(wrong)
    spec["audio"] = {}


def test_every_wrong_number_of_an_answer_fails(tmp_path):
    folder = committed("e2e", tmp_path, WRITTEN)
    edit_json(folder / "cases.json", lambda spec: with_variants(spec, WRONG_WRITTEN))
    wanted = {f"cases.{name}": "FAIL" for name in WRONG_WRITTEN}
    assert report(folder) == {f"cases.{WRITTEN}": "PASS"} | wanted


def test_every_wrong_number_of_speech_fails(tmp_path):
    folder = committed("e2e", tmp_path)
    for tensor, change in (("wav", 5), ("chunk0.noise", 0.5)):
        damaged = shutil.copy(folder / f"{SPOKEN}.safetensors", folder / f"{tensor}.safetensors")
        edit_tensor(folder / damaged, tensor, lambda stored, change=change: stored.view(-1)[100:101].add_(change))
    edit_json(folder / "cases.json", lambda spec: with_variants(spec, WRONG_SPOKEN))
    assert report(folder) == {f"cases.{SPOKEN}": "PASS"} | {f"cases.{name}": "FAIL" for name in WRONG_SPOKEN}


def test_every_wrong_fact_of_a_sound_file_fails(tmp_path):
    folder = committed("e2e", tmp_path, WRITTEN)

    def damage(spec):
        spec["cases"] = []
        (path, right), *_ = spec["audio"].items()
        for field, value in (("samples_16k", 1), ("wav16k_sha256_f32le", "0" * 64), ("vq_codes", [1])):
            shutil.copy(folder / path, folder / f"{field}.wav")
            spec["audio"][f"{field}.wav"] = right | {field: value}

    edit_json(folder / "cases.json", damage)
    (right, *wrong) = report(folder).values()
    assert (right, wrong) == ("PASS", ["FAIL"] * 3)


@pytest.mark.parametrize("setting", [{"ode_steps": 12}, {"chunk_tokens": 14}])
def test_the_settings_are_the_set_s(tmp_path, setting):
    folder = committed("e2e", tmp_path)
    edit_json(folder / "cases.json", lambda spec: spec["settings"].update(setting))
    assert report(folder)[f"cases.{SPOKEN}"] == "FAIL"


# ---- what may be absent -----------------------------------------------------------------------------------------


def test_absent_fields_are_not_compared(tmp_path):
    folder = committed("e2e", tmp_path, WRITTEN)
    needed = ("messages", "output_type", "text")

    def thin_out(spec):
        spec["cases"] = [{key: case[key] for key in needed} for case in spec["cases"]]
        for key in ("settings", "audio", "model", "vq_tokenizer"):
            del spec[key]

    edit_json(folder / "cases.json", thin_out)
    assert report(folder) == {"cases.[0]": "PASS"}


@pytest.mark.parametrize("field", ["n_chunks", "wav_samples", "chunks", "file", "continuous_feature_frames"])
def test_a_spoken_case_may_lack_any_fact(tmp_path, field):
    folder = committed("e2e", tmp_path)
    edit_json(folder / "cases.json", lambda spec: spec["cases"][0].pop(field))
    assert report(folder)[f"cases.{SPOKEN}"] == "PASS"


def test_an_answer_without_codes_has_no_file(tmp_path, monkeypatch):
    class Silent:
        audio_codes = ()

    monkeypatch.setattr(e2e, "compare_answer", lambda *_: Silent)
    folder = committed("e2e", tmp_path)
    silence = {"wav_samples": 0, "chunks": [], "n_chunks": 0, "file": None}
    edit_json(folder / "cases.json", lambda spec: spec["cases"][0].update(silence))
    assert report(folder)[f"cases.{SPOKEN}"] == "PASS"


def test_a_repeated_name_keeps_both_lines(tmp_path):
    folder = committed("e2e", tmp_path, WRITTEN)
    edit_json(folder / "cases.json", lambda spec: spec["cases"].append(spec["cases"][0]))
    assert [outcome.name for outcome in verify(folder)].count(f"cases.{WRITTEN}") == 2


# ---- what cannot be read ----------------------------------------------------------------------------------------


def lose_stored_wave(folder, spec):
    spec["cases"][0]["file"] = "nowhere.safetensors"


def lose_messages(folder, spec):
    del spec["cases"][0]["messages"]


def lose_sound(folder, spec):
    spec["cases"][0]["messages"] = [{"role": "user", "message_type": "audio", "content": "audio/nowhere.wav"}]


DAMAGES = {lose_stored_wave: r"nowhere\.safetensors", lose_messages: "malformed", lose_sound: r"nowhere\.wav"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_case_leaves_the_others(tmp_path, damage):
    folder = committed("e2e", tmp_path)

    def damaged_and_right(spec):
        spec["cases"].append(copy.deepcopy(spec["cases"][0]) | {"name": "right"})
        damage(folder, spec)
        spec["cases"][1].setdefault("file", f"{SPOKEN}.safetensors")

    edit_json(folder / "cases.json", damaged_and_right)
    (name, reason), *others = unreadable(folder).items()
    assert (name, others) == (f"cases.{SPOKEN}", [])
    assert re.search(DAMAGES[damage], reason)
    assert report(folder)["cases.right"] == "PASS"


def test_a_broken_checkpoint_leaves_what_does_not_need_it(tmp_path):
    folder = committed("e2e", tmp_path, WRITTEN)
    index = json.loads((folder / "model/model.safetensors.index.json").read_text())
    (folder / "model" / next(iter(index["weight_map"].values()))).write_bytes(b"")
    assert list(unreadable(folder)) == [f"cases.{WRITTEN}"]
    assert {status for name, status in report(folder).items() if name.startswith("audio.")} == {"PASS"}


def test_sound_files_that_cannot_be_listed_leave_the_conversations(tmp_path):
    folder = committed("e2e", tmp_path, WRITTEN)
    edit_json(folder / "cases.json", lambda spec: spec.update(audio=7))
    assert report(folder) == {"e2e": "ERROR", f"cases.{WRITTEN}": "PASS"}
