"""Letters, error rates and intervals."""

import pytest
import torch

from kimia.errors import ParameterError
from training.scores import CLASSES, LETTERS, distance, error_rate, greedy, letter_ids

pytestmark = pytest.mark.unit


def test_letters_and_ids_are_inverse():
    text = "hello what's that"
    logits = torch.zeros(2 * len(text), CLASSES)
    for place, letter in enumerate(letter_ids(text)):
        logits[2 * place, letter] = 1.0  # a blank follows each letter, so that "ll" stays two
        logits[2 * place + 1, 0] = 1.0
    assert greedy(logits) == text
    assert max(letter_ids(LETTERS)) == CLASSES - 1


def test_a_strange_character_is_named():
    with pytest.raises(ParameterError, match="7"):
        letter_ids("order 7")


@pytest.mark.parametrize(
    ("first", "second", "errors"), [("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("same", "same", 0)]
)
def test_distance_counts_the_least_changes(first, second, errors):
    assert distance(first, second) == errors


def test_rates_are_over_all_units_of_the_references():
    found = error_rate(["a b c", "d"], ["a x c", "d"], words=True)
    assert found.rate == pytest.approx(1 / 4)
    assert found.low <= found.rate <= found.high
    assert found.items == 2
    assert "25.0 %" in str(found)


def test_without_errors_the_interval_is_a_point():
    found = error_rate(["abc"] * 5, ["abc"] * 5, words=False)
    assert (found.rate, found.low, found.high) == (0, 0, 0)


@pytest.mark.parametrize(("references", "heard"), [([], []), (["a"], [])])
def test_lists_that_do_not_match_are_refused(references, heard):
    with pytest.raises(ParameterError, match="one of each"):
        error_rate(references, heard, words=True)
