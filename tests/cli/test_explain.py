"""`kimia explain`: the prompt as a table, equal to the prompt that the model reads."""

import json

import pytest

from kimia.cli import main
from tests.golden_data import golden, golden_json

pytestmark = pytest.mark.parity

CASES = [case for case in golden_json("e2e", "cases.json")["cases"] if case["messages"]]


def explain(*arguments) -> int:
    return main(["explain", "--model", str(golden("e2e") / "model"), *map(str, arguments)])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_positions_are_those_of_the_reference(case, tmp_path, capsys) -> None:
    chat = golden("e2e") / "audio" / ".."  # audio paths of the set are relative to its folder
    (tmp_path / "audio").symlink_to((chat / "audio").resolve())
    (tmp_path / "chat.json").write_text(json.dumps(case["messages"]))
    assert explain(tmp_path / "chat.json", "--output", case["output_type"], "--json") == 0
    table = json.loads(capsys.readouterr().out)
    assert [line["audio_id"] for line in table["positions"]] == case["prompt_audio_ids"]
    assert [line["text_id"] for line in table["positions"]] == case["prompt_text_ids"]
    assert [int(line["feature"]) for line in table["positions"]] == case["is_continuous_mask"]
    assert table["totals"]["prompt_positions"] == len(case["prompt_audio_ids"])


@pytest.fixture
def clip(tmp_path):
    import numpy as np
    import soundfile

    soundfile.write(tmp_path / "tone.wav", np.sin(np.arange(16000 * 2) / 20), 16000)
    return tmp_path / "tone.wav"


def test_long_runs_are_shortened_unless_all_is_asked_for(clip, capsys) -> None:
    assert explain("--text", "Please transcribe:", "--audio", clip, "--output", "text") == 0
    short = capsys.readouterr().out
    assert explain("--text", "Please transcribe:", "--audio", clip, "--output", "text", "--all") == 0
    whole = capsys.readouterr().out
    assert short.count("+feature") == 6
    assert short.count("\n  ...\n") == 1
    assert whole.count("+feature") == 25
    assert "25 codes (2.00 s) from position" in short


def test_specials_are_named_and_text_is_quoted(clip, capsys) -> None:
    assert explain("--text", "hi", "--audio", clip) == 0
    shown = capsys.readouterr().out
    assert "<|im_kimia_speech_ctd_id|>" in shown
    assert "'h'" in shown


def test_an_illegal_chat_names_the_message(tmp_path, capsys) -> None:
    (tmp_path / "chat.json").write_text('[{"role": "system", "message_type": "text", "content": "x"}]')
    assert explain(tmp_path / "chat.json") == 1
    assert "message 0: there is no system role" in capsys.readouterr().err
