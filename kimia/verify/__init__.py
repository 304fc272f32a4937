"""Golden sets against this installation: what `kimia verify` runs.

A golden set is a folder with the numbers of one stage (tokenizer, llm, detokenizer, e2e) and the tiny checkpoint that
gave them. Nothing is assumed about its sizes: they come from its configs, JSON fields, tensor shapes and key names.
Everything is computed in float32, whatever the stored type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kimia.errors import GoldenSetError
from kimia.verify import detokenizer, e2e, llm, tokenizer
from kimia.verify.report import Case, Outcome, run_cases

__all__ = ["GoldenSet", "find_sets", "verify"]


@dataclass(frozen=True)
class _Stage:
    """How a stage's set is recognised, and what its cases are."""

    is_set: Callable[[Path], bool]
    cases: Callable[[Path, torch.device], Iterator[Case]]


STAGES = {
    tokenizer.STAGE: _Stage(lambda folder: _has(folder, "cases.json", "goldens"), tokenizer.cases),
    llm.STAGE: _Stage(
        lambda folder: _has(folder, "goldens/prompts.json") or _has(folder, "checkpoint/config.json", "goldens"),
        llm.cases,
    ),
    detokenizer.STAGE: _Stage(lambda folder: _has(folder, "goldens.json"), detokenizer.cases),
    e2e.STAGE: _Stage(lambda folder: _has(folder, "cases.json", "model"), e2e.cases),
}


@dataclass(frozen=True)
class GoldenSet:
    """One folder of golden data."""

    stage: str
    folder: Path


def find_sets(folder: Path) -> list[GoldenSet]:
    """The set that a folder is, else those directly below it, by name.

    Raises GoldenSetError when there is none, or when a folder that is called like a stage holds no set.
    """
    if not folder.is_dir():
        raise GoldenSetError(f"{folder}: no such folder")
    itself = _recognised(folder)
    if itself is not None:
        return [itself]
    found = []
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        golden = _recognised(below)
        if golden is None and below.name in STAGES:
            raise GoldenSetError(f"{below}: holds no golden set; are files missing?")
        if golden is not None:
            found.append(golden)
    if not found:
        raise GoldenSetError(f"{folder}: is neither a golden set ({', '.join(STAGES)}) nor a folder of such")
    return found


def verify(folder: Path, device: torch.device | str = "cpu") -> Iterator[Outcome]:
    """Run every case of the sets in a folder, one after the other, each reported as it ends.

    Raises GoldenSetError or CheckpointError for data that cannot be read.
    """
    sets = find_sets(folder)
    torch.backends.cuda.matmul.allow_tf32 = False  # ten bits of mantissa would miss every tolerance
    torch.backends.cudnn.allow_tf32 = False
    return (outcome for golden in sets for outcome in run_cases(_listed(golden, torch.device(device))))


def _listed(golden: GoldenSet, device: torch.device) -> Iterator[Case]:
    """The cases of a set; a listing without the fields that every set has is unreadable data."""
    try:
        yield from STAGES[golden.stage].cases(golden.folder, device)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise GoldenSetError(f"{golden.folder}: its list of cases is malformed ({error!r})") from error


def _recognised(folder: Path) -> GoldenSet | None:
    stages = (stage for stage, kind in STAGES.items() if kind.is_set(folder))
    stage = next(stages, None)
    return None if stage is None else GoldenSet(stage, folder)


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).exists() for name in names)
