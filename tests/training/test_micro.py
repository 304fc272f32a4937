"""The whole order of stages: slices go on where they ended, finished stages stay, failures are told."""

import importlib
import math
import sys
from argparse import ArgumentParser

import pytest

from training.micro import RESERVE, rebuild, stages
from training.options import UNFINISHED

pytestmark = pytest.mark.unit


class Machine:
    """Runs stages in no time; each of `long` needs a second call."""

    def __init__(self, long=(), code=UNFINISHED):
        self.long, self.code, self.ran, self.left = set(long), code, [], []

    def __call__(self, name, arguments):
        self.ran.append(name)
        self.left.append(arguments[-1])
        if name in self.long:
            self.long.remove(name)
            return self.code
        return 0


@pytest.fixture
def folder(tmp_path):
    for stage in stages(tmp_path):
        stage.finished.parent.mkdir(parents=True, exist_ok=True)
    return tmp_path


def test_slices_go_on_until_all_is_done(folder, capsys):
    machine = Machine(long=("states", "vocoder"))
    codes = [rebuild(folder, 480.0, machine) for _ in range(4)]
    assert codes == [0, 0, 0, 0]
    assert machine.ran == [
        "corpus", "states", "states", "study", "encoders", "vq", "vocoder", "vocoder", "flow", "language_model",
    ]  # fmt: skip
    assert all(0 < left <= 480 - RESERVE for left in machine.left)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition(";")[0] for line in said[:2]] == [
        "The slice is over in stage states", "The slice is over in stage vocoder",
    ]  # fmt: skip
    assert said[2:] == said[3:] * 2
    assert "python -m training.evaluate" in said[3]


def test_without_a_slice_the_figures_follow(folder):
    machine = Machine()
    assert rebuild(folder, math.inf, machine) == 0
    assert machine.ran[-1] == "evaluate"
    assert set(machine.left[:-1]) == {math.inf}


def test_a_slice_too_short_for_anything_starts_nothing(folder, capsys):
    machine = Machine()
    assert rebuild(folder, RESERVE, machine) == 0
    assert machine.ran == []
    assert "corpus" in capsys.readouterr().out


def test_a_stage_that_fails_ends_all_and_is_run_again(folder, capsys):
    machine = Machine(long=("vq",), code=3)
    assert rebuild(folder, 480.0, machine) == 3
    assert machine.ran[-1] == "vq"
    assert "vq failed" in capsys.readouterr().out
    rebuild(folder, 480.0, machine)
    assert machine.ran.count("vq") == 2
    assert machine.ran.count("encoders") == 1


class Read(Exception):
    """A stage has read its words."""


def test_every_stage_knows_the_words_it_is_called_with(tmp_path, monkeypatch):
    read = ArgumentParser.parse_args

    def parse(parser):
        raise Read(read(parser).seconds)

    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    for stage in stages(tmp_path):
        monkeypatch.setattr(sys, "argv", [stage.name, *map(str, stage.arguments), "--seconds", "10.5"])
        with pytest.raises(Read, match=r"10\.5"):
            importlib.import_module(f"training.{stage.name}").main()
