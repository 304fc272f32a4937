"""`kimia transcribe`: one line a file, a bad file does not stop the others."""

import json
import sys
from pathlib import Path

import pytest

from kimia.cli import main
from kimia.errors import AudioError, CapacityError, ConversationError, RequestError
from kimia.pipeline import KimiAudio
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT
from kimia.v1.turn_pb2 import JOB_CLASS_BATCH
from tests.client.scripted import done, started, text
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


# ---- by a running service ---------------------------------------------------------------------------------------


def ask(scripted, *arguments) -> int:
    return main(["transcribe", "--server", scripted.target, *arguments])


def heard(words: str) -> list:
    return [started(), text(0, words), done(words)]


def test_a_limit_that_no_transcript_has_is_refused_before_the_model_is_loaded(capsys) -> None:
    assert main(["transcribe", "--model", "no-such-model", "--max-new-tokens", "0", CLIPS[0]]) == 1
    captured = capsys.readouterr()
    assert "max_new_tokens must be a positive integer" in captured.err
    assert "loading" not in captured.err


def test_a_service_transcribes(scripted, capsys) -> None:
    scripted.generate = [heard("one"), heard("two")]
    assert ask(scripted, "--max-new-tokens", "8", *CLIPS) == 0
    assert capsys.readouterr().out == f"{CLIPS[0]}\tone\n{CLIPS[1]}\ttwo\n"
    request = scripted.requests[0]
    assert request.messages[0].text.text == "Please transcribe the following audio:"
    assert request.messages[1].audio.data == Path(CLIPS[0]).read_bytes()
    assert (request.options.output_type, request.options.max_new_tokens) == (OUTPUT_TYPE_TEXT, 8)
    assert request.job_class == JOB_CLASS_BATCH


def test_a_file_that_the_service_refuses_is_reported(scripted, tmp_path, capsys) -> None:
    refused = RequestError("is no sound file", field="messages[1].audio.data")
    damaged = AudioError("holds no samples", 1)
    scripted.generate = [[refused], [ConversationError("too long", 1)], [damaged], heard("two")]
    assert ask(scripted, "--json", CLIPS[0], CLIPS[0], CLIPS[0], str(tmp_path / "missing.wav"), CLIPS[1]) == 1
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"file": CLIPS[1], "text": "two"}
    assert "clip_a2.wav: messages[1].audio.data: is no sound file" in shown.err
    assert "clip_a2.wav: too long" in shown.err
    assert "clip_a2.wav: holds no samples" in shown.err
    assert "missing.wav: does not exist" in shown.err


def test_a_busy_service_is_waited_for(scripted, capsys) -> None:
    scripted.generate = [[CapacityError("all rows are taken", retry_after=0.01)], heard("one")]
    assert ask(scripted, CLIPS[0]) == 0
    assert capsys.readouterr().out == "one\n"


def test_the_device_is_the_services_own_matter(scripted, capsys) -> None:
    assert ask(scripted, "--device", "cpu", CLIPS[0]) == 1
    assert "--device, --dtype and --quantize" in capsys.readouterr().err


def test_without_the_library_for_bars(scripted, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    scripted.generate = [heard("one"), heard("two")]
    assert ask(scripted, *CLIPS) == 0
    assert capsys.readouterr().out.count("\n") == 2
