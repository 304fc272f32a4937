"""A call of the blocking client."""

import pytest

from tests.client.calls import BlockingCall, CallCases

pytestmark = pytest.mark.unit


class TestCall(CallCases):
    """The cases of both clients."""

    dial = BlockingCall
