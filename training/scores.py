"""Letters, error rates and their confidence: how recognition is trained and judged."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kimia.errors import ParameterError

LETTERS = " abcdefghijklmnopqrstuvwxyz'"
BLANK = 0  # of the letters' ids; letter i is i + 1
CLASSES = len(LETTERS) + 1
RESAMPLES = 1000  # of the bootstrap


def letter_ids(text: str) -> list[int]:
    """Ids of a text's letters. Raises ParameterError for a character that no text of the domain has."""
    strange = sorted(set(text) - set(LETTERS))
    if strange:
        raise ParameterError(f"text {text!r} holds {strange}: only a-z, the apostrophe and spaces can be learned")
    return [LETTERS.index(letter) + 1 for letter in text]


def greedy(logits: Tensor) -> str:
    """Connectionist decoding of (T, CLASSES): the best class of every frame, runs and blanks dropped."""
    best = torch.unique_consecutive(logits.argmax(-1)).tolist()
    return "".join(LETTERS[index - 1] for index in best if index != BLANK).strip()


def distance(first: Sequence[object], second: Sequence[object]) -> int:
    """Least number of insertions, deletions and substitutions from one sequence to the other."""
    row = list(range(len(second) + 1))
    for index, left in enumerate(first, 1):
        above, row[0] = row[0], index
        for column, right in enumerate(second, 1):
            above, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, above + (left != right))
    return row[-1]


class Row(NamedTuple):
    """One measure of a model card: its cells by group of voices."""

    measure: str
    cells: tuple[str, ...]


@dataclass(frozen=True)
class ErrorRate:
    """Errors per unit of the references, with the 95 % interval of a bootstrap over the items."""

    rate: float
    low: float
    high: float
    items: int

    def __str__(self) -> str:
        return f"{100 * self.rate:.1f} % ({100 * self.low:.1f}..{100 * self.high:.1f}, n = {self.items})"


def error_rate(references: Sequence[str], heard: Sequence[str], *, words: bool) -> ErrorRate:
    """Word or character errors over all items. Raises ParameterError when the lists do not match or are empty."""
    if len(references) != len(heard) or not references:
        raise ParameterError(f"{len(references)} references and {len(heard)} transcripts: one of each per item")
    pairs = [
        (left.split(), right.split()) if words else (list(left), list(right))
        for left, right in zip(references, heard, strict=True)
    ]
    errors = np.array([distance(left, right) for left, right in pairs], float)
    lengths = np.array([len(left) for left, _ in pairs], float)
    rng = random.Random(0)
    drawn = [rng.choices(range(len(pairs)), k=len(pairs)) for _ in range(RESAMPLES)]
    rates = [errors[index].sum() / max(1.0, lengths[index].sum()) for index in drawn]
    low, high = np.percentile(rates, [2.5, 97.5])
    return ErrorRate(float(errors.sum() / max(1.0, lengths.sum())), float(low), float(high), len(pairs))
