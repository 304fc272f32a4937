"""The page of guarantees names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.faults.scenes import SCENES

pytestmark = pytest.mark.unit

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "guarantees.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/]+\.py::\w+)`", PAGE))))
def test_it_exists(name):
    file, test = name.split("::")
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


def test_scenes_that_are_named_are_played():
    named = {word for line in PAGE.splitlines() if "scene" in line for word in re.findall(r"`(\w+_\w+_\w+)`", line)}
    assert named <= {scene.__name__ for scene in SCENES}
    assert len(named) > 12
