"""A preset file, and a process that forgets what it has learned."""

import json
from pathlib import Path

import pytest

from kimia.model.preset_file import ADOPTED
from kimia.model.schedule import SCHEDULES

VALUES = {
    "name": "calm",
    "commits": [6, 12],
    "look_ahead": 4,
    "hold": 8,
    "context": 16,
    "kv_window": 900,
    "times": [0, 0.2, 0.6, 1],
}


def written(folder: Path, **changes) -> Path:
    """A file of these values; None leaves one out."""
    values = {name: value for name, value in {**VALUES, **changes}.items() if value is not None}
    path = folder / "preset.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.fixture
def forgetful():
    """What is adopted in a test is gone behind it."""
    known = dict(SCHEDULES)
    yield
    SCHEDULES.clear()
    SCHEDULES.update(known)
    ADOPTED.clear()
