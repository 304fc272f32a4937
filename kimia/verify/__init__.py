"""Golden sets against this installation: what `kimia verify` runs.

A golden set is a folder with the numbers of one stage (tokenizer, llm, detokenizer, e2e) and the tiny checkpoint that
gave them. Nothing is assumed about its sizes: they come from its configs, JSON fields, tensor shapes and key names.
Everything is computed in float32, whatever the stored type.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from kimia.errors import GoldenSetError
from kimia.verify import detokenizer, e2e, llm, tokenizer
from kimia.verify.report import Case, Outcome, run_case

__all__ = ["GoldenSet", "find_sets", "verify"]


@dataclass(frozen=True)
class _Stage:
    """How a stage's set is recognised, and its lists of cases; one that cannot be read leaves the others."""

    is_set: Callable[[Path], bool]
    listings: Callable[[Path, torch.device], Iterator[Iterator[Case]]]


STAGES = {
    tokenizer.STAGE: _Stage(lambda folder: _has(folder, "cases.json", "goldens"), tokenizer.listings),
    llm.STAGE: _Stage(
        lambda folder: _has(folder, "goldens/prompts.json") or _has(folder, "checkpoint/config.json", "goldens"),
        llm.listings,
    ),
    detokenizer.STAGE: _Stage(lambda folder: _has(folder, "goldens.json"), detokenizer.listings),
    e2e.STAGE: _Stage(lambda folder: _has(folder, "cases.json", "model"), e2e.listings),
}


@dataclass(frozen=True)
class GoldenSet:
    """One folder of golden data."""

    stage: str
    folder: Path


def find_sets(folder: Path) -> list[GoldenSet]:
    """The set that a folder is, else those directly below it, by name. Raises GoldenSetError when there is none.

    A folder below it that is called like a stage counts as its set, so that lost files are not passed over.
    """
    if not folder.is_dir():
        raise GoldenSetError(f"{folder}: no such folder")
    itself = _recognised(folder)
    if itself is not None:
        return [itself]
    found = []
    for below in sorted(path for path in folder.iterdir() if path.is_dir()):
        golden = _recognised(below)
        if golden is not None:
            found.append(golden)
        elif below.name in STAGES:
            found.append(GoldenSet(below.name, below))
    if not found:
        raise GoldenSetError(f"{folder}: is neither a golden set ({', '.join(STAGES)}) nor a folder of such")
    return found


def verify(folder: Path, device: torch.device | str = "cpu") -> Iterator[Outcome]:
    """Run every case of the sets in a folder, one after the other, each reported as it ends.

    A list of cases that cannot be read is one outcome ERROR. Raises GoldenSetError when there is no set at all.
    """
    sets = find_sets(folder)
    torch.backends.cuda.matmul.allow_tf32 = False  # ten bits of mantissa would miss every tolerance
    torch.backends.cudnn.allow_tf32 = False
    return (outcome for golden in sets for outcome in _outcomes(golden, torch.device(device)))


def _outcomes(golden: GoldenSet, device: torch.device) -> Iterator[Outcome]:
    stage = STAGES[golden.stage]
    if not stage.is_set(golden.folder):
        yield _error(golden, f"{golden.folder}: holds no golden set; are files missing?")
        return
    for listing in _readable(golden, stage.listings(golden.folder, device)):
        cases = [listing] if isinstance(listing, Outcome) else _readable(golden, listing)
        yield from (case if isinstance(case, Outcome) else run_case(case) for case in cases)


Item = TypeVar("Item")


def _readable(golden: GoldenSet, items: Iterator[Item]) -> Iterator[Item | Outcome]:
    """What can be listed, and an outcome that says why the rest cannot."""
    try:
        yield from items
    except GoldenSetError as error:
        yield _error(golden, str(error))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        yield _error(golden, f"{golden.folder}: its list of cases is malformed ({error!r})")


def _error(golden: GoldenSet, reason: str) -> Outcome:
    return Outcome("ERROR", golden.stage, golden.folder.name, reason, unreadable=True)


def _recognised(folder: Path) -> GoldenSet | None:
    stages = (stage for stage, kind in STAGES.items() if kind.is_set(folder))
    stage = next(stages, None)
    return None if stage is None else GoldenSet(stage, folder)


def _has(folder: Path, *names: str) -> bool:
    return all((folder / name).exists() for name in names)
