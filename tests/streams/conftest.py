"""A journal with workers around it."""

import pytest

from kimia.streams.wire import Wire
from tests.streams.turns import HASTY, PATIENT, World


@pytest.fixture
async def world(journal_url):
    """A journal and workers whose claims never end by themselves."""
    wire = await Wire.connect(journal_url, options=PATIENT)
    yield World(wire)
    await wire.aclose()


@pytest.fixture
async def hasty(journal_url):
    """A journal and workers whose claims end at once."""
    wire = await Wire.connect(journal_url, options=HASTY)
    yield World(wire)
    await wire.aclose()
