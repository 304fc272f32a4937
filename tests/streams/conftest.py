"""A journal with workers around it."""

import pytest

from kimia.streams.wire import Wire
from tests.streams.turns import PATIENT, World


@pytest.fixture
async def world(journal_url):
    """A journal and workers whose leases do not end by themselves."""
    wire = await Wire.connect(journal_url, options=PATIENT)
    yield World(wire)
    await wire.aclose()
