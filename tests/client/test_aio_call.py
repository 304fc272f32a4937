"""A call of the client for asyncio."""

import pytest

from tests.client.calls import AsyncioCall, CallCases

pytestmark = pytest.mark.unit


class TestAsyncCall(CallCases):
    """The cases of both clients."""

    dial = AsyncioCall
