"""Where the golden data lie: reference numbers of tiny random checkpoints in the released layout.

A self-contained subset is committed under tests/golden (end-to-end conversations and the audio-input stage).
KIMIA_GOLDEN names a folder with the whole set (tokenizer, llm, detokenizer, e2e), which then takes its place.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest

COMMITTED = Path(__file__).parent / "golden"


def golden(stage: str) -> Path:
    """The folder of a stage's golden set; skips the calling test (or module) where the clone has none."""
    for root in (os.environ.get("KIMIA_GOLDEN"), COMMITTED):
        if root and (Path(root) / stage).is_dir():
            return Path(root) / stage
    pytest.skip(f"no {stage} golden set in the clone; name a full one by KIMIA_GOLDEN", allow_module_level=True)


def golden_json(stage: str, name: str) -> Any:
    """A parsed JSON file of a stage's golden set."""
    return json.loads((golden(stage) / name).read_text(encoding="utf-8"))
