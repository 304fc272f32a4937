"""The cases of the audio-input golden set (stage `tokenizer`): waveforms and expected numbers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from kimia.model.audio import load_audio
from tests.golden_data import golden, golden_json

RATE = 16000  # Hz, of the set's sample ranges


def listed(stage: str, key: str) -> list[Any]:
    """A list of a set's cases.json; empty (pytest then skips the test) where the clone has no such set."""
    try:
        return list(golden_json(stage, "cases.json").get(key, []))
    except pytest.skip.Exception:
        return []


CASES = {case["name"]: case for case in listed("tokenizer", "cases")}
BATCHES = listed("tokenizer", "batches")


def vq_folder(name: str) -> Path:
    """The folder of a case's VQ tokenizer."""
    return golden("tokenizer") / CASES[name].get("tokenizer", "glm-4-voice-tokenizer")


def waveform(name: str) -> np.ndarray:
    """The waveform (S,) of a case: a file, or pieces of files."""
    audio = CASES[name]["audio"]
    root = golden("tokenizer")
    if "file" in audio:
        return load_audio(root / audio["file"], RATE)
    return (np.concatenate([_piece(root, piece) for piece in audio["pieces"]]) / 2**15).astype(np.float32)


def _piece(root: Path, piece: dict) -> np.ndarray:
    if "zeros" in piece:
        return np.zeros(piece["zeros"], np.int16)
    samples, _ = soundfile.read(root / piece["file"], dtype="int16")
    return samples[piece["start"] : piece["stop"]] >> piece.get("shift_right", 0)


def expected(name: str) -> tuple[dict, dict[str, np.ndarray]]:
    """A case's JSON and arrays."""
    folder = golden("tokenizer") / "goldens"
    arrays = folder / f"{name}.npz"
    values = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    if not arrays.exists():
        return values, {}
    with np.load(arrays) as stored:
        return values, dict(stored)
