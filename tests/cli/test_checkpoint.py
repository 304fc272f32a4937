"""`kimia checkpoint`: what is printed, and the exit code of every kind of trouble."""

import json

import pytest

from kimia.cli import main

pytestmark = pytest.mark.unit


def test_new_then_inspect_then_convert(tmp_path, capsys):
    folder = tmp_path / "model"
    assert main(["checkpoint", "new", "--preset", "tiny", "--seed", "5", str(folder)]) == 0
    assert "preset tiny, seed 5" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(folder)]) == 0
    told = capsys.readouterr().out
    for part in ("language model", "vocoder", "registration with Zhipu AI", "cold start", "msg_end 464", "no problems"):
        assert part in told
    assert main(["checkpoint", "convert", str(folder), "--dtype", "bf16"]) == 0
    assert "of disk are saved" in capsys.readouterr().out
    assert (folder / "audio_detokenizer/model.safetensors").exists()
    assert main(["checkpoint", "inspect", "--no-load", str(folder)]) == 0
    assert "bfloat16 1.24 MB" in capsys.readouterr().out


def test_inspect_as_json(tiny, capsys):
    assert main(["checkpoint", "inspect", "--json", str(tiny)]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parts"][0]["name"] == "language model"
    assert told["bytes"] > 1e6
    assert told["problems"] == []
    assert all(part["load_seconds"] > 0 for part in told["parts"])


def test_inspect_shows_problems_and_fails(tiny_copy, capsys):
    (tiny_copy / "model-3-of-9.safetensors").unlink()
    assert main(["checkpoint", "inspect", "--no-load", str(tiny_copy)]) == 1
    assert "PROBLEM: " in (told := capsys.readouterr().out)
    assert "lacks model-3-of-9.safetensors" in told
    assert "download is incomplete" in told


def fails(capsys, *arguments):
    """The one line that a failing command prints."""
    assert main(["checkpoint", *map(str, arguments)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


def test_new_never_overwrites(tiny, capsys):
    assert "not empty" in fails(capsys, "new", "--preset", "tiny", tiny)


def test_new_with_an_illegal_seed(tmp_path, capsys):
    assert "seed" in fails(capsys, "new", "--preset", "tiny", "--seed", "-1", tmp_path / "x")


def test_a_folder_that_is_not_there(tmp_path, capsys):
    assert "neither a folder nor a hub id" in fails(capsys, "inspect", tmp_path / "absent")


def test_a_folder_without_the_vq_tokenizer(tmp_path, capsys):
    assert "glm-4-voice-tokenizer" in fails(capsys, "inspect", tmp_path)


def test_nothing_to_convert(tiny_copy, capsys):
    for name in ("audio_detokenizer", "vocoder"):
        (tiny_copy / name / "model.pt").unlink()
    assert "to convert" in fails(capsys, "convert", tiny_copy)


@pytest.mark.parametrize(
    "arguments", [[], ["new"], ["new", "--preset", "huge", "x"], ["inspect"], ["convert", "x", "--dtype", "int8"]]
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", *arguments])
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


@pytest.mark.parametrize("action", [[], ["new"], ["inspect"], ["convert"]])
def test_help_teaches(action, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["checkpoint", *action, "--help"])
    assert stopped.value.code == 0
    told = capsys.readouterr().out
    assert "usage: kimia checkpoint" in told
    if not action:
        assert "kimia checkpoint new --preset tiny model" in told
