"""The comparison of a golden case: what counts as a miss, and the line it prints."""

import math

import pytest
import torch

from kimia.errors import AudioError, ConfigError, GoldenSetError, WeightsError
from kimia.verify.report import Case, Comparison, run_case

pytestmark = pytest.mark.unit


def line(run) -> str:
    return str(run_case(Case("llm", "decode.x", run)))


def test_pass_prints_error_and_tolerance() -> None:
    assert line(lambda c: c.close("a", torch.tensor([1.0, 2.0]), [1.0, 2.00001], 5e-5)) == (
        "PASS llm decode.x 1e-05<=5e-05"
    )


def test_miss_names_the_quantity() -> None:
    assert line(lambda c: c.close("logits", [1.0], [1.1], 5e-5)) == "FAIL llm decode.x 0.1<=5e-05 logits"


def test_exact_miss_counts_the_places() -> None:
    assert line(lambda c: c.same("ids", [1, 2, 3], (1, 5, 6))) == "FAIL llm decode.x 2<=0 ids: differs first at 1"


def test_exact_miss_of_another_length() -> None:
    assert line(lambda c: c.same("ids", [1], [1, 2])) == "FAIL llm decode.x inf<=0 ids: [1] instead of [1, 2]"


def test_worst_is_relative_to_its_tolerance() -> None:
    comparison = Comparison()
    comparison.close("coarse", [1.0], [1.05], 0.1)
    comparison.close("fine", [1.0], [1.009], 0.01)
    assert comparison.what == "fine"
    assert comparison.passed


def test_equal_infinities_agree_and_unequal_do_not() -> None:
    infinite = [-math.inf, 0.0]
    assert line(lambda c: c.close("a", infinite, infinite, 1e-6)).startswith("PASS")
    assert line(lambda c: c.close("a", infinite, [math.inf, 0.0], 1e-6)).startswith("FAIL")


def test_nan_is_a_miss() -> None:
    assert line(lambda c: c.close("a", [math.nan], [math.nan], 1.0)).startswith("FAIL")


def test_other_shape_is_a_miss() -> None:
    assert "shape (2,) instead of (1,)" in line(lambda c: c.close("a", [1.0, 1.0], [1.0], 1.0))


def test_nothing_compared_is_a_miss() -> None:
    assert line(lambda c: None) == "FAIL llm decode.x 0<=0 nothing was compared"


def test_absent_fields_are_not_compared() -> None:
    actual = {"steps": 3, "stop": "text_eos"}
    assert line(lambda c: c.same_fields(actual, {"steps": 3, "note": 1})).startswith("PASS")
    assert line(lambda c: c.same_fields(actual, {"steps": 4}, " of b")).endswith("inf<=0 steps of b: 3 instead of 4")
    assert "nothing" in line(lambda c: c.same_fields(actual, {}))


def test_error_inside_a_case_is_a_miss() -> None:
    def run(comparison: Comparison) -> None:
        raise AudioError("empty")

    assert line(run) == "FAIL llm decode.x inf<=0 AudioError: empty"


def test_skip_says_why() -> None:
    assert str(run_case(Case("llm", "finetune.a", skip="its own issue"))) == "SKIP llm finetune.a 0<=0 its own issue"


def outcome_of(error: Exception):
    def run(comparison: Comparison) -> None:
        comparison.same("ids", [1], [2])  # the reason is told all the same
        raise error

    return run_case(Case("llm", "decode.x", run))


@pytest.mark.parametrize("kind", [GoldenSetError, WeightsError, ConfigError])
def test_unreadable_data_are_told_from_a_miss(kind) -> None:
    outcome = outcome_of(kind("no such file\nat all"))
    assert str(outcome) == "FAIL llm decode.x inf<=0 no such file"
    assert outcome.unreadable


@pytest.mark.parametrize("error", [KeyError("messages"), TypeError("null"), AttributeError("items"), StopIteration()])
def test_a_malformed_case_says_so(error) -> None:
    outcome = outcome_of(error)
    assert str(outcome) == f"FAIL llm decode.x inf<=0 the stored case is malformed ({error!r})"
    assert outcome.unreadable


@pytest.mark.parametrize("error", [AudioError("empty"), RuntimeError("shape"), IndexError("5"), OverflowError("big")])
def test_other_errors_are_misses(error) -> None:
    assert not outcome_of(error).unreadable
