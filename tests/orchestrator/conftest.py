"""A whole service for tests of the control plane."""

import pytest

from kimia.streams.wire import Wire, WireOptions
from tests.orchestrator.world import World


@pytest.fixture
async def world(valkey_url):
    """A journal without workers and orchestrators yet: world.begin() starts them."""
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=0.5))
    async with World(wire) as world:
        yield world
    await wire.aclose()
