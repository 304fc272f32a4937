"""Fixtures that many tests share."""

import shutil
from pathlib import Path

import pytest
import structlog
import torch

from kimia.model.random_weights import new_checkpoint
from tests.runtime.workers import house  # noqa: F401
from tests.servers import journal_url, redis7_server, valkey_server, valkey_url  # noqa: F401  (fixtures for all)
from tests.stores import stores  # noqa: F401

torch.set_num_threads(1)  # tiny matrices: threads would only wait for each other

# Tracebacks as the processes write them: with the values of all variables, structlog's default, one takes a second.
_PLAIN = structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback)
structlog.configure(processors=[*structlog.get_config()["processors"][:-1], _PLAIN])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny checkpoint with random weights; read only."""
    return new_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", "tiny", progress=False)


@pytest.fixture
def tiny_copy(tiny, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(tiny, tmp_path / "tiny"))
