"""The whole service on either server: a turn of each kind, a session that remembers, a deletion that leaves nothing."""

import pytest
import redis

from kimia.client import Kimia
from kimia.streams import keys
from tests.golden_data import COMMITTED
from tests.running import running

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]

SPOKEN = {"role": "user", "message_type": "audio", "content": str(COMMITTED / "e2e" / "audio" / "clip_b2.wav")}
WRITTEN = {"role": "user", "message_type": "text", "content": "And then?"}


def test_the_service_runs_on_it(journal_url: str) -> None:
    with running("--fake", "--redis", journal_url) as service, Kimia(service.address) as kimia:
        assert kimia.transcribe(SPOKEN["content"])
        first = kimia.generate([SPOKEN], session="here", max_new_tokens=30, seed=1).collect()
        second = kimia.generate([WRITTEN], session="here", max_new_tokens=30, seed=1).collect()
        assert first.pcm
        assert second.pcm
        assert second.usage.prompt_positions > first.usage.prompt_positions
        kimia.delete_session("here")
        with redis.Redis.from_url(journal_url, decode_responses=True) as store:
            assert set(store.scan_iter("*here*")) <= {keys.gone("{0}", "here")}
