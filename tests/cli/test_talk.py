"""`kimia talk`: the answer on stdout, the waterfall on stderr, files where they were asked for."""

import json
import wave

import pytest

from kimia.cli import main
from kimia.errors import CapacityError, InternalError
from kimia.v1.conversation_pb2 import OUTPUT_TYPE_TEXT
from tests.client.scripted import WHOLE, audio, started

pytestmark = pytest.mark.unit


@pytest.fixture
def sound(tmp_path):
    """A file to send; the scripted service does not look into it."""
    path = tmp_path / "question.wav"
    path.write_bytes(b"RIFF")
    return path


def talk(scripted, *arguments) -> int:
    return main(["talk", "--server", scripted.target, *map(str, arguments)])


def test_the_answer_and_its_times(scripted, sound, tmp_path, capsys) -> None:
    scripted.generate = [WHOLE]
    out = tmp_path / "answer.wav"
    assert talk(scripted, sound, "--text", "Listen:", "--out", out, "--session", "monday", "--seed", "7") == 0
    shown = capsys.readouterr()
    assert shown.out == "t0 t1 \n"
    assert "33 positions in, 20 steps out, 0.40 s of speech, stopped by audio_eod; seed 7" in shown.err
    assert "the caller got: first text" in shown.err
    with wave.open(str(out)) as file:
        assert file.getnframes() == 20
    request = scripted.requests[0]
    assert [message.WhichOneof("content") for message in request.messages] == ["text", "audio"]
    assert (request.session_id, request.options.seed, request.options.preset) == ("monday", 7, "")


def test_json(scripted, sound, capsys) -> None:
    scripted.generate = [WHOLE]
    assert talk(scripted, sound, "--json", "--output", "text") == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["text"], report["turn"], report["session"]) == ("t0 t1 ", "session.turn", "session")
    assert report["usage"]["steps"] == 20
    assert report["seconds"]["total"] > 0
    assert scripted.requests[0].options.output_type == OUTPUT_TYPE_TEXT


def test_say(scripted) -> None:
    scripted.generate = [WHOLE]
    assert talk(scripted, "--say", "On its way.", "--preset", "upstream") == 0
    assert scripted.requests[0].say == "On its way."
    assert scripted.requests[0].options.preset == "upstream"


def test_the_picture(scripted, sound, tmp_path) -> None:
    scripted.generate = [WHOLE]
    assert talk(scripted, sound, "--waterfall", tmp_path / "turn.svg") == 0
    assert (tmp_path / "turn.svg").read_text().startswith("<?xml")


def test_a_refusal_is_one_line(scripted, sound, capsys) -> None:
    scripted.generate = [[CapacityError("all rows are taken", retry_after=2.0)]]
    assert talk(scripted, sound) == 1
    assert capsys.readouterr().err.startswith("error: all rows are taken")


def test_speech_of_a_turn_that_breaks_off_is_kept(scripted, sound, tmp_path, capsys) -> None:
    scripted.generate = [[started(), audio(0), InternalError("the model gave no numbers")]]
    out = tmp_path / "answer.wav"
    assert talk(scripted, sound, "--out", out) == 1
    with wave.open(str(out)) as file:
        assert file.getnframes() == 10
    error = capsys.readouterr().err
    assert f"the turn broke off: 0.00 s of speech are in {out}" in error
    assert "error: the model gave no numbers" in error


def test_a_turn_that_breaks_off_before_any_speech_leaves_no_file(scripted, sound, tmp_path) -> None:
    scripted.generate = [[started(), InternalError("the model gave no numbers")]]
    assert talk(scripted, sound, "--out", tmp_path / "answer.wav") == 1
    assert not (tmp_path / "answer.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "nothing to answer"),
        (["missing.wav"], "missing.wav: does not exist"),
        (["--text", "x", "--out", "a.mp3"], "written as .wav"),
        (["--text", "x", "--out", "no/a.wav"], "does not exist"),
        (["--text", "x", "--out", "a.wav", "--output", "text"], "needs speech"),
        (["--text", "x", "--waterfall", "a.pdf"], "written as .svg or .png"),
        (["question.wav", "--out", "question.wav"], "part of the question"),
        (["--say", ""], "nothing to say"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(
    scripted, sound, arguments, complaint, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(sound.parent)
    assert talk(scripted, *arguments) == 1
    shown = capsys.readouterr()
    assert complaint in shown.err
    assert shown.err.count("\n") == 1
    assert scripted.requests == []
