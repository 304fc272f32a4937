"""`kimia transcribe`: one line a file, a bad file does not stop the others."""

import json

import pytest

from kimia.cli import main
from kimia.pipeline import KimiAudio
from tests.golden_data import COMMITTED

pytestmark = pytest.mark.parity

AUDIO = COMMITTED / "e2e" / "audio"
CLIPS = [str(AUDIO / "clip_a2.wav"), str(AUDIO / "clip_b2.wav")]


def run(tiny, *arguments) -> int:
    return main(["transcribe", "--model", str(tiny), "--max-new-tokens", "8", *arguments])


def test_one_file_prints_its_text_alone(tiny, capsys) -> None:
    assert run(tiny, CLIPS[0]) == 0
    messages = [
        {"role": "user", "message_type": "text", "content": "Please transcribe the following audio:"},
        {"role": "user", "message_type": "audio", "content": CLIPS[0]},
    ]
    expected = KimiAudio(tiny).generate(messages, max_new_tokens=8, preset="low-latency")[1]
    assert capsys.readouterr().out == expected + "\n"


def test_several_files_are_named(tiny, capsys) -> None:
    assert run(tiny, *CLIPS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == CLIPS


def test_json_lines(tiny, capsys) -> None:
    assert run(tiny, "--json", *CLIPS) == 0
    assert [json.loads(line)["file"] for line in capsys.readouterr().out.splitlines()] == CLIPS


def test_a_bad_file_is_reported_and_the_others_are_done(tiny, tmp_path, capsys) -> None:
    (tmp_path / "empty.wav").touch()
    assert run(tiny, str(tmp_path / "empty.wav"), CLIPS[1]) == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(CLIPS[1])
    assert "empty.wav: is empty" in captured.err
    assert "message" not in captured.err
