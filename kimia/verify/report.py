"""What a golden case yields: the largest deviation, each quantity against its own tolerance."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from kimia.errors import CheckpointError, GoldenSetError, KimiaError


@dataclass
class Comparison:
    """The worst deviation so far of one case, as a multiple of its tolerance."""

    error: float = 0.0
    tolerance: float = 0.0
    what: str = ""
    _excess: float = field(default=-1.0, repr=False)

    def close(self, what: str, actual: Any, expected: Any, tolerance: float) -> None:
        """Compare numbers; shapes must agree, infinities must be equal, a NaN is a miss."""
        left, right = _array(actual), _array(expected)
        if left.shape != right.shape:
            self._note(f"{what}: shape {left.shape} instead of {right.shape}", math.inf, tolerance)
            return
        with np.errstate(invalid="ignore"):  # inf - inf
            difference = np.where(left == right, 0.0, np.abs(left - right))
        worst = float(difference.max(initial=0.0)) if not np.isnan(difference).any() else math.inf
        self._note(what, worst, tolerance)

    def same(self, what: str, actual: Any, expected: Any) -> None:
        """Compare exactly; the error is the number of places that differ."""
        left, right = _plain(actual), _plain(expected)
        if left == right:
            self._note(what, 0.0, 0.0)
        elif isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
            places = [place for place, pair in enumerate(zip(left, right, strict=True)) if pair[0] != pair[1]]
            self._note(f"{what}: differs first at {places[0]}", float(len(places)), 0.0)
        else:
            self._note(f"{what}: {_short(left)} instead of {_short(right)}", math.inf, 0.0)

    def same_fields(self, actual: Mapping[str, Any], stored: Mapping[str, Any], where: str = "") -> None:
        """Compare exactly what is stored of some facts; fields that are absent are not compared."""
        for name in (name for name in actual if name in stored):
            self.same(f"{name}{where}", actual[name], stored[name])

    def fail(self, what: str) -> None:
        """A miss without a number."""
        self._note(what, math.inf, 0.0)

    def _note(self, what: str, error: float, tolerance: float) -> None:
        excess = error / tolerance if tolerance else (math.inf if error else 0.0)
        if excess > self._excess:
            self.error, self.tolerance, self.what, self._excess = error, tolerance, what, excess

    @property
    def passed(self) -> bool:
        """True when something was compared and nothing lies beyond its tolerance."""
        return 0.0 <= self._excess <= 1.0


@dataclass(frozen=True)
class Case:
    """One golden case: `run` fills a comparison, or `skip` says why it is not compared."""

    stage: str
    name: str  # <file>.<name>
    run: Callable[[Comparison], None] | None = None
    skip: str = ""


@dataclass(frozen=True)
class Outcome:
    """The line of one case, or the complaint about cases that cannot be listed."""

    status: str  # PASS | FAIL | SKIP | ERROR
    stage: str
    name: str
    detail: str
    unreadable: bool = False  # the fault lies in the stored data

    def __str__(self) -> str:
        return f"{self.status} {self.stage} {self.name} {self.detail}"


def run_case(case: Case) -> Outcome:
    """Run a case. Whatever is wrong inside it, its data included, is a miss of this case, not the end of the report."""
    if case.run is None:
        return Outcome("SKIP", case.stage, case.name, f"0<=0 {case.skip}")
    comparison = Comparison()
    try:
        case.run(comparison)
    except (GoldenSetError, CheckpointError) as error:
        return _unreadable(case, _first_line(error))
    except (KeyError, TypeError, AttributeError, StopIteration) as error:  # a field is missing or of another type
        return _unreadable(case, f"the stored case is malformed ({error!r})")
    except (KimiaError, RuntimeError, IndexError, ValueError, ArithmeticError) as error:
        comparison.fail(f"{type(error).__name__}: {_first_line(error)}")
    detail = f"{comparison.error:.2g}<={comparison.tolerance:g}"
    if comparison.passed:
        return Outcome("PASS", case.stage, case.name, detail)
    return Outcome("FAIL", case.stage, case.name, f"{detail} {comparison.what or 'nothing was compared'}")


def _unreadable(case: Case, reason: str) -> Outcome:
    return Outcome("FAIL", case.stage, case.name, f"inf<=0 {reason}", unreadable=True)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _array(value: Any) -> npt.NDArray[np.float64]:
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return np.asarray(value, dtype=np.float64)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor | np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


def _short(value: Any, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
