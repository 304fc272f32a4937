"""Admission as the state machine tries it: a slice in every run of the tests, many examples in `make faults`."""

import pytest

from tests.faults.breaks import LEDGER, broken
from tests.faults.explore import asked, explore
from tests.faults.ground import ground_at
from tests.faults.ledger import Admission
from tests.faults.truth import Violation

SEED = 2


@pytest.mark.unit
def test_nobody_is_admitted_beyond_the_capacity(journal_url):
    with ground_at(journal_url) as ground:
        explore(Admission, ground, SEED, examples=15, shrink=False)


@pytest.mark.unit
@pytest.mark.parametrize("fault", LEDGER, ids=str)
def test_a_faulty_ledger_is_noticed(valkey_url, fault):
    with ground_at(valkey_url) as ground, broken(fault), pytest.raises(Violation):
        explore(Admission, ground, SEED, examples=50, shrink=False)


@pytest.mark.faults
@pytest.mark.timeout(0)
def test_many_examples(journal_url):
    seed, examples = asked()
    with ground_at(journal_url) as ground:
        explore(Admission, ground, seed, examples)
