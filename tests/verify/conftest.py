"""Fixtures of the tests of verification."""

import shutil
from pathlib import Path

import pytest

from tests.verify.sets import write_llm


@pytest.fixture(scope="session")
def written_llm(tmp_path_factory):
    """A small set of the language model; read only."""
    return write_llm(tmp_path_factory.mktemp("written"))


@pytest.fixture
def llm_set(written_llm, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(written_llm, tmp_path / "llm"))
