"""The blocking client: turns, lost connections, refusals."""

import asyncio

import pytest

from kimia.client import Kimia
from tests.client.cases import TurnCases
from tests.client.scripted import FAST, WHOLE
from tests.client.turns import blocking_events, blocking_result, question

pytestmark = pytest.mark.unit


class TestKimia(TurnCases):
    """The cases of both clients, and those of this one."""

    events = staticmethod(blocking_events)
    result = staticmethod(blocking_result)

    async def named(self, service, tenant) -> None:
        def ask() -> None:
            with Kimia(service.target, tenant=tenant, options=FAST) as kimia:
                question(kimia).collect()

        await asyncio.to_thread(ask)

    async def test_text_and_speech_grow(self, service) -> None:
        service.generate = [WHOLE]

        def ask() -> tuple[str, list]:
            with Kimia(service.target, options=FAST) as kimia:
                turn = question(kimia)
                seen = [(turn.text, len(turn.pcm)) for _ in turn]
                return turn.turn_id, seen

        turn_id, seen = await asyncio.to_thread(ask)
        assert turn_id == "session.turn"
        assert seen[-1] == ("t0 t1 ", 40)
