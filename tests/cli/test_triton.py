"""`kimia triton export`."""

import pytest

from kimia.cli import main

pytestmark = pytest.mark.unit


def test_a_repository_is_written(tiny, tmp_path, capsys) -> None:
    folder = tmp_path / "repository"
    assert main(["triton", "export", str(folder), "--model", str(tiny), "--device", "cpu", "--rows", "3"]) == 0
    made = capsys.readouterr().out.split()
    assert made == sorted(made, key=made.index)
    assert {str(path) for path in folder.iterdir()} == set(made)
    assert "max_batch_size: 3" in (folder / "kimia_vocoder" / "config.pbtxt").read_text()
    assert main(["triton", "export", str(folder), "--model", str(tiny), "--device", "cpu"]) == 1
    assert "there already" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (["--model", "/nowhere/at/all"], "neither a folder nor a hub id"),
        (["--model", "x", "--rows", "0"], "at least one row"),
    ],
)
def test_mistakes_are_one_line(given, complaint, tmp_path, capsys) -> None:
    assert main(["triton", "export", str(tmp_path), "--device", "cpu", *given]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert complaint in line


def test_help_teaches(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["triton", "--help"])
    assert "KIMIA_ENGINE=triton://localhost:8001" in capsys.readouterr().out
