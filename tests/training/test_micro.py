"""The whole order of stages: slices go on where they ended, finished stages stay, failures are told."""

import importlib
import math
import sys
import threading
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from training import micro
from training.micro import RESERVE, rebuild, stages
from training.options import UNFINISHED
from training.progress import LINE

pytestmark = pytest.mark.unit


class Machine:
    """Runs stages in no time; each of `long` needs a second call. `slow` ends only when `until` has begun."""

    def __init__(self, long=(), code=UNFINISHED, slow=None, until=None):
        self.long, self.code, self.ran, self.left = set(long), code, [], []
        self.slow, self.until, self.begun, self.lanes = slow, until, threading.Event(), []

    def __call__(self, name, arguments, lane):
        self.ran.append(name)
        self.left.append(arguments[-1])
        self.lanes.append(lane)
        if name == self.until:
            self.begun.set()
        if name == self.slow:
            assert self.begun.wait(10)
        if name in self.long:
            self.long.remove(name)
            return self.code
        return 0


@pytest.fixture
def folder(tmp_path):
    for stage in stages(tmp_path):
        if stage.finished:
            stage.finished.parent.mkdir(parents=True, exist_ok=True)
    return tmp_path


def order(machine):
    """Each stage began after those that it learns from."""
    after = {stage.name: stage.after for stage in stages(Path())}
    return all(machine.ran.index(before) < machine.ran.index(name) for name in after for before in after[name])


def test_slices_go_on_until_all_is_done(folder, capsys):
    machine = Machine(long=("states", "vocoder", "flow"))
    codes = [rebuild(folder, 480.0, machine) for _ in range(4)]
    assert codes == [0, 0, 0, 0]  # the last has nothing left to do
    assert order(machine)
    again = ["states", "vocoder", "flow", "evaluate"]  # the last one knows itself that nothing is left
    assert Counter(machine.ran) == Counter([stage.name for stage in stages(folder)] + again)
    assert all(0 < left <= 480 - RESERVE for left in machine.left)
    said = capsys.readouterr().out.splitlines()
    assert {line.partition(";")[0] for line in said[:2]} == {
        "The slice is over in stage states", "The slice is over in stage vocoder",
    }  # fmt: skip
    assert said[2].startswith("The slice is over in stage flow")
    assert all("All is trained and measured" in line for line in said[3:])


def test_without_a_slice_stages_have_all_the_time_and_the_figures_come_last(folder):
    machine = Machine()
    assert rebuild(folder, math.inf, machine) == 0
    assert machine.ran[-1] == "evaluate"
    assert set(machine.left) == {math.inf}


def test_the_vocoder_trains_beside_all_that_the_flow_model_waits_for(folder):
    machine = Machine(slow="vocoder", until="flow")
    assert rebuild(folder, 480.0, machine) == 0
    assert machine.begun.is_set()
    assert order(machine)
    assert set(machine.lanes) == {0, 1}


def test_the_longest_way_begins_first(folder):
    """The language model has lessons before it and takes longest: behind the flow model a core would wait for it."""
    machine = Machine(slow="vocoder", until="language_model")
    assert rebuild(folder, 480.0, machine) == 0
    assert machine.ran.index("language_model") < machine.ran.index("flow")


def test_new_weights_are_measured_anew(folder):
    assert rebuild(folder, 480.0, Machine()) == 0
    (folder / "flow" / "finished").unlink()
    machine = Machine()
    assert rebuild(folder, 480.0, machine) == 0
    assert machine.ran == ["flow", "evaluate"]


def test_a_stage_that_could_not_be_started_is_told(folder):
    def no_room(name, arguments, lane):
        raise OSError("no room for another process")

    with pytest.raises(OSError, match="no room"):
        rebuild(folder, 480.0, no_room)


def test_a_stage_draws_its_progress_on_a_line_of_its_own(monkeypatch):
    seen = {}
    monkeypatch.setattr("subprocess.run", lambda command, env, **_: seen.update(env) or SimpleNamespace(returncode=7))
    assert micro._run("flow", ("--steps", 3), 1) == 7
    assert seen[LINE] == "1"


def test_a_slice_too_short_for_anything_starts_nothing(folder, capsys):
    machine = Machine()
    assert rebuild(folder, RESERVE, machine) == 0
    assert machine.ran == []
    assert "corpus" in capsys.readouterr().out


def test_a_stage_that_fails_holds_up_what_learns_from_it_and_is_run_again(folder, capsys):
    machine = Machine(long=("vq",), code=3)
    assert rebuild(folder, 480.0, machine) == 3
    assert {"flow", "language_model", "evaluate"}.isdisjoint(machine.ran)
    assert {"vocoder", "vq"} < set(machine.ran)
    assert "vq failed" in capsys.readouterr().out
    assert rebuild(folder, 480.0, machine) == 0
    assert Counter(machine.ran) == Counter([stage.name for stage in stages(folder)] + ["vq"])


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
