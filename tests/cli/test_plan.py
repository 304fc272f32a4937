"""`kimia plan`."""

import json

import pytest

from kimia.cli import main
from tests.model.test_capacity import PROFILE

pytestmark = pytest.mark.unit


def test_the_page_shows_its_arithmetic(capsys) -> None:
    assert main(["plan", "--calls", "200", "--gpu", "h200"]) == 0
    page = capsys.readouterr().out
    assert page.startswith("times: floors of the cost model at h200's data-sheet rates, times 1.5; nothing measured")
    for words in ("200 calls on h200", "12.5 steps/s x", "keys and values", "kimia up --replicas tokenizer=1 llm="):
        assert words in page


def test_a_measured_profile_takes_the_place_of_floors(tmp_path, capsys) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps(PROFILE))
    assert main(["plan", "--calls", "200", "--gpu", "h200", "--measured", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["times"] == f"measured: {path} (some GPU)"
    assert [stage["stage"] for stage in found["stages"]] == ["tokenizer", "llm", "detokenizer"]


def test_a_model_of_ones_own(tiny, capsys) -> None:
    assert main(["plan", "--calls", "5", "--gpu", "4090", "--model", str(tiny)]) == 0
    assert "3 GPUs" in capsys.readouterr().out


def test_quantised_weights_are_planned_with_and_named(capsys) -> None:
    assert main(["plan", "--calls", "200", "--gpu", "h200", "--quantize", "int8"]) == 0
    page = capsys.readouterr().out
    assert "kimia up --quantize int8 --replicas tokenizer=1 llm=" in page


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--gpu", "tpu"], "gpu must be one of"),
        (["--gpu", "h200", "--speech-share", "2"], "speech share"),
        (["--gpu", "h200", "--over-floor", "0.5"], "no program is faster"),
        (["--gpu", "h200", "--over-floor", "nan"], "no program is faster"),
        (["--gpu", "h200", "--over-floor", "inf"], "no program is faster"),
        (["--gpu", "h200", "--measured", "/nowhere.json"], "cannot be read"),
        (["--gpu", "l4", "--prompt", "8000"], "language model"),
    ],
)
def test_mistakes_are_one_line(given, complaint, capsys) -> None:
    assert main(["plan", "--calls", "2", *given]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line
