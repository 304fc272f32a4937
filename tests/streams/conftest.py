"""A journal with workers around it."""

import pytest

from kimia.streams.wire import Wire
from tests.streams.turns import World


@pytest.fixture
async def wire(journal_url):
    """A wire to either server."""
    wire = await Wire.connect(journal_url)
    yield wire
    await wire.aclose()


@pytest.fixture
async def world(wire):
    """A journal and workers with the usual times."""
    return World(wire)
