"""The protocol as the state machine tries it: a slice in every run of the tests, many examples in `make faults`."""

import pytest

from tests.faults.explore import asked, explore
from tests.faults.ground import ground_at
from tests.faults.protocol import Protocol

SEED = 1


@pytest.mark.unit
def test_promises_are_kept_whatever_comes(journal_url):
    with ground_at(journal_url) as ground:
        explore(Protocol, ground, SEED, examples=25, shrink=False)


@pytest.mark.faults
@pytest.mark.timeout(0)
def test_many_examples(journal_url):
    seed, examples = asked()
    with ground_at(journal_url) as ground:
        explore(Protocol, ground, seed, examples)
