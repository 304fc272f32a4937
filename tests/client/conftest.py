"""A scripted service for each test."""

import pytest_asyncio

from tests.client.scripted import Scripted, serving


@pytest_asyncio.fixture
async def service():
    """The service; its `target` is where it listens."""
    scripted = Scripted()
    async with serving(scripted) as scripted.target:
        yield scripted
