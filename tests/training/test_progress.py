"""Progress bars of stages beside each other."""

import io

import pytest

from training.progress import LINE, bar

pytestmark = pytest.mark.unit


def drawn(**words):
    screen = io.StringIO()
    assert list(bar(range(3), desc="flow", file=screen, disable=False, **words)) == [0, 1, 2]
    return screen.getvalue()


def test_without_a_terminal_there_is_none():
    screen = io.StringIO()
    assert list(bar(range(3), file=screen)) == [0, 1, 2]
    assert screen.getvalue() == ""


def test_a_stage_alone_leaves_its_bar(monkeypatch):
    monkeypatch.delenv(LINE, raising=False)
    assert drawn().endswith("\n")


def test_a_stage_beside_another_has_a_line_of_its_own_and_clears_it(monkeypatch):
    monkeypatch.setenv(LINE, "1")
    screen = drawn()
    assert screen.startswith("\n\rflow")
    assert "\x1b[A" in screen
    assert not screen.endswith("\n")
