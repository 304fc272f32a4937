"""The client for asyncio: turns, lost connections, refusals."""

import pytest

from kimia.client import AsyncKimia
from tests.client.cases import TurnCases
from tests.client.scripted import FAST, WHOLE, Scripted, serving
from tests.client.turns import asyncio_events, asyncio_result, question

pytestmark = pytest.mark.unit


class TestAsyncKimia(TurnCases):
    """The cases of both clients, and those of this one."""

    events = staticmethod(asyncio_events)
    result = staticmethod(asyncio_result)

    async def named(self, service, tenant) -> None:
        async with AsyncKimia(service.target, tenant=tenant, options=FAST) as kimia:
            await question(kimia).collect()

    async def test_text_and_speech_grow(self, service) -> None:
        service.generate = [WHOLE]
        async with AsyncKimia(service.target, options=FAST) as kimia:
            turn = question(kimia)
            seen = [(turn.text, len(turn.pcm)) async for _ in turn]
        assert seen == [("", 0), ("t0 ", 0), ("t0 ", 20), ("t0 t1 ", 20), ("t0 t1 ", 40), ("t0 t1 ", 40)]
        assert turn.turn_id == "session.turn"

    async def test_a_server_that_is_replaced_in_the_middle(self) -> None:
        first, second = Scripted(), Scripted()
        first.generate, second.resume = [WHOLE[:3]], [WHOLE[3:]]
        events = []
        async with serving(first) as target, AsyncKimia(target, options=FAST) as kimia:
            async for event in (turn := question(kimia)):
                events.append(event)
                if len(events) == 3:
                    break
        async with serving(second) as target, AsyncKimia(target, options=FAST) as kimia:
            events += [event async for event in kimia.resume_progress(turn.progress)]
        assert len(events) == len(WHOLE)
        assert turn.pcm == WHOLE[2].audio.data + WHOLE[4].audio.data
