"""`kimia generate`: what goes to stdout, to files, and what is refused before the model is loaded."""

import json

import pytest
import soundfile

from kimia.cli import main
from kimia.model import quantize as quantization
from tests.golden_data import COMMITTED

pytestmark = pytest.mark.parity

AUDIO = COMMITTED / "e2e" / "audio"
QUESTION = str(AUDIO / "clip_b2.wav")
SHORT = ["--max-new-tokens", "24", "--seed", "5", "--audio-temperature", "0.8", "--text-temperature", "0.7"]


def run(tiny, *arguments) -> int:
    return main(["generate", "--model", str(tiny), *map(str, arguments)])


def test_answers_in_text_and_speech(tiny, tmp_path, capsys) -> None:
    assert run(tiny, "--audio", QUESTION, "--out", tmp_path / "answer.wav", *SHORT) == 0
    captured = capsys.readouterr()
    assert captured.out.strip()
    assert "random weights" in captured.err
    assert "24 steps out" in captured.err
    assert "seed 5" in captured.err
    samples, rate = soundfile.read(tmp_path / "answer.wav")
    assert rate == 24000
    assert len(samples) % 1920 == 0
    assert abs(samples).max() > 0.01


def test_json_holds_the_answer_and_a_message_for_the_next_turn(tiny, tmp_path, capsys) -> None:
    assert run(tiny, "--audio", QUESTION, "--json", *SHORT) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["steps"] == 24
    assert answer["audio_seconds"] == len(answer["message"]["audio_tokens"]) * 0.08
    chat = [
        {"role": "user", "message_type": "audio", "content": "question.wav"},
        answer["message"],
        {"role": "user", "message_type": "text", "content": "And then?"},
    ]
    (tmp_path / "chat.json").write_text(json.dumps(chat))
    (tmp_path / "question.wav").write_bytes((AUDIO / "clip_b2.wav").read_bytes())
    assert run(tiny, tmp_path / "chat.json", "--output", "text", "--max-new-tokens", "5") == 0


def test_sound_that_is_not_needed_is_not_looked_for(tiny, tmp_path) -> None:
    history = {"role": "assistant", "message_type": "audio-text", "content": ["gone.wav", "Gladly."]}
    ids = {"audio_tokens": [900], "text_tokens": [7]}
    question = {"role": "user", "message_type": "text", "content": "And then?"}
    (tmp_path / "chat.json").write_text(json.dumps([{**question}, {**history, **ids}, question]))
    assert run(tiny, tmp_path / "chat.json", "--output", "text", "--max-new-tokens", "3") == 0
    (tmp_path / "chat.json").write_text(json.dumps([question, history, question]))
    assert run("no-such-model", tmp_path / "chat.json") == 1


def test_messages_keep_the_order_of_the_command_line(tiny, capsys) -> None:
    answers = []
    for arguments in (("--text", "Compare", "--audio", QUESTION), ("--audio", QUESTION, "--text", "Compare")):
        assert run(tiny, *arguments, "--json", "--output", "text", "--max-new-tokens", "12") == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert answers[0]["prompt_positions"] == answers[1]["prompt_positions"] + 1  # only a last clip says what is wanted


def test_text_output_prints_the_same_as_json_holds(tiny, capsys) -> None:
    arguments = ["--text", "Hello", "--output", "text", "--max-new-tokens", "12"]
    assert run(tiny, *arguments) == 0
    plain = capsys.readouterr().out
    assert run(tiny, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["text"] + "\n" == plain


@pytest.mark.parametrize("ending", [".svg", ".png"])
def test_draws_the_answer(tiny, tmp_path, ending) -> None:
    picture = tmp_path / f"answer{ending}"
    assert run(tiny, "--audio", QUESTION, "--plot", picture, *SHORT) == 0
    assert picture.read_bytes()[:5] in (b"<?xml", b"\x89PNG\r")
    assert picture.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((), "nothing to answer"),
        (("chat.json", "--text", "x"), "not both"),
        (("--text", "x", "--out", "nowhere/answer.wav"), "does not exist"),
        (("--text", "x", "--out", "answer.mp3"), ".wav"),
        (("--text", "x", "--plot", "answer.pdf"), ".svg or .png"),
        (("--text", "x", "--output", "text", "--out", "answer.wav"), "--output text"),
        (("--audio", QUESTION, "--out", QUESTION), "part of the conversation"),
        (("--text", "x", "--out", "/dev/null.wav/answer.wav"), "does not exist"),
        (("--text", "x", "--seed", "-1"), "seed must be"),
        (("--text", "x", "--audio-temperature", "-1"), "audio_temperature"),
        (("--audio", "missing.wav"), "missing.wav: cannot be opened"),
        (("--audio", str(COMMITTED / "README.md")), "is not audio"),
    ],
)
def test_refused_before_the_model_is_loaded(arguments, complaint, capsys) -> None:
    assert run("no-such-model", *arguments) == 1
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert "loading" not in captured.err


def test_without_a_model_it_says_how_to_name_one(monkeypatch, capsys) -> None:
    monkeypatch.delenv("KIMIA_MODEL", raising=False)
    assert main(["generate", "--text", "x"]) == 1
    assert "--model or KIMIA_MODEL" in capsys.readouterr().err


def test_a_folder_is_no_place_for_an_answer(tmp_path, capsys) -> None:
    (tmp_path / "answer.wav").mkdir()
    assert run("no-such-model", "--text", "x", "--out", tmp_path / "answer.wav") == 1
    assert "not a file" in capsys.readouterr().err


def test_a_quantised_model_answers(tiny, monkeypatch, capsys) -> None:
    schemes = []
    real = quantization.quantize
    monkeypatch.setattr(quantization, "quantize", lambda lm, scheme: schemes.append(scheme) or real(lm, scheme))
    arguments = ("--text", "Hello", "--output", "text", "--max-new-tokens", "4", "--json", "--quantize", "int8")
    assert run(tiny, *arguments) == 0
    assert json.loads(capsys.readouterr().out)["steps"] >= 1
    assert schemes == ["int8"]
