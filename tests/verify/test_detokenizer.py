"""Golden sets of the detokenizer: what passes, what is skipped, and that one wrong number of any kind is found."""

import shutil
from pathlib import Path

import pytest

from kimia.verify import verify
from tests.golden_data import golden
from tests.verify.sets import edit_json, edit_tensor, report, unreadable, write_detokenizer

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return write_detokenizer(tmp_path_factory.mktemp("written"))


@pytest.fixture
def small(written, tmp_path):
    return Path(shutil.copytree(written, tmp_path / "detokenizer"))


def test_public_set():
    outcomes = list(verify(golden("detokenizer")))
    assert [str(outcome) for outcome in outcomes if outcome.status == "FAIL"] == []
    assert any(outcome.status == "PASS" for outcome in outcomes)


def test_cases_and_skips(small):
    assert report(small) == {
        "goldens.voice": "PASS",
        "goldens.short": "PASS",
        "goldens.defect": "SKIP",
        "goldens.x_upstream": "SKIP",
        "goldens.x_fixed": "PASS",
        "unit.dit.a": "PASS",
        "unit.dit.b": "PASS",
        "unit.dit.c": "PASS",
        "unit.hamming": "PASS",
        "unit.mel7": "PASS",
        "unit.naive2": "PASS",
        "unit.novelty": "SKIP",
        "unit.ode5": "PASS",
        "unit.snake": "PASS",
        "unit.time": "PASS",
        "unit.vocoder": "PASS",
        "time_grid.3": "PASS",
    }


def bump(tensor):
    tensor.view(-1)[-1] += 0.01 if tensor.is_floating_point() else 40


@pytest.mark.parametrize(
    ("file", "tensor", "case"),
    [
        ("voice_stream.safetensors", "chunk1.mel", "goldens.voice"),
        ("voice_stream.safetensors", "chunk2.wav", "goldens.voice"),
        ("voice_stream.safetensors", "chunk0.noise", "goldens.voice"),
        ("unit.safetensors", "dit.b.velocity", "unit.dit.b"),
        ("unit.safetensors", "dit.a.layer1_k", "unit.dit.a"),
        ("unit.safetensors", "time.sinusoid", "unit.time"),
        ("unit.safetensors", "time.emb", "unit.time"),
        ("unit.safetensors", "ode5.mel", "unit.ode5"),
        ("unit.safetensors", "naive2.mel", "unit.naive2"),
        ("unit.safetensors", "vocoder.wav", "unit.vocoder"),
        ("unit.safetensors", "snake.y", "unit.snake"),
        ("unit.safetensors", "snake.filter_up", "unit.snake"),
        ("unit.safetensors", "hamming.10_first3", "unit.hamming"),
        ("unit.safetensors", "mel7.mel", "unit.mel7"),
    ],
)
def test_one_wrong_number_fails_its_case_alone(small, file, tensor, case):
    edit_tensor(small / file, tensor, bump)
    assert [name for name, status in report(small).items() if status == "FAIL"] == [case]


@pytest.mark.parametrize("field", ["total_samples", "expected_samples"])
def test_one_wrong_total_fails(small, field):
    edit_json(small / "goldens.json", lambda spec: spec["cases"]["voice"].update({field: 1}))
    assert report(small)["goldens.voice"] == "FAIL"


def test_one_wrong_counter_fails(small):
    edit_json(small / "goldens.json", lambda spec: spec["cases"]["voice"]["per_chunk"][1].update(kv_tokens_after=1))
    assert report(small)["goldens.voice"] == "FAIL"


@pytest.mark.parametrize(
    ("field", "value"), [("max_kv_cache_tokens", 5), ("max_pos_size", 400), ("solver", "neural_ode_euler")]
)
def test_the_limits_are_the_case_s(small, field, value):
    edit_json(small / "goldens.json", lambda spec: spec["cases"]["voice"].update({field: value}))
    assert report(small)["goldens.voice"] == "FAIL"


def test_one_wrong_time_fails(small):
    edit_json(small / "time_grid.json", lambda grids: grids["3"]["neural_ode_euler"].update(t_index=[0, 499]))
    assert report(small)["time_grid.3"] == "FAIL"


@pytest.mark.parametrize("wav", ["voice.safetensors", "voice.safetensors:pcm[3]", "nowhere.safetensors:pcm"])
def test_a_prompt_that_cannot_be_read(small, wav):
    edit_json(small / "goldens.json", lambda spec: spec["cases"]["voice"]["prefill"].update(wav=wav))
    assert list(unreadable(small)) == ["goldens.voice"]


@pytest.mark.parametrize("field", ["chunks", "prefill", "per_chunk", "total_samples", "expected_samples", "file"])
def test_a_missing_field_concerns_its_case_alone(small, field):
    whole = report(small)
    edit_json(small / "goldens.json", lambda spec: spec["cases"]["voice"].pop(field))
    compared = field in ("per_chunk", "total_samples", "expected_samples")
    assert report(small) == whole | {"goldens.voice": "PASS" if compared else "FAIL"}
    assert list(unreadable(small)) == (["goldens.voice"] if field in ("chunks", "file") else [])


def test_tolerances_may_be_absent(small):
    edit_json(small / "goldens.json", lambda spec: spec.pop("tolerances_float32"))
    assert "FAIL" not in report(small).values()
    edit_tensor(small / "unit.safetensors", "vocoder.wav", bump)
    assert report(small)["unit.vocoder"] == "FAIL"


@pytest.mark.parametrize(("file", "kind"), [("unit.safetensors", "unit"), ("time_grid.json", "time_grid")])
def test_an_unreadable_file_leaves_the_others(small, file, kind):
    whole = report(small)
    (small / file).write_bytes(b"{")
    assert file in unreadable(small)["detokenizer"]
    left = {name: status for name, status in report(small).items() if name != "detokenizer"}
    assert left == {name: status for name, status in whole.items() if not name.startswith(kind)}
