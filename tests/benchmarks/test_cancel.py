"""Barge-ins as they are measured."""

import json
import random

import pytest

from benchmarks.cancel import BargeIn, caller, read_leaving, summary
from kimia.client import AsyncKimia
from kimia.streams.wire import Wire, WireOptions
from tests.orchestrator.world import ENDLESS, World

pytestmark = pytest.mark.unit


async def test_every_turn_of_a_caller_is_interrupted(valkey_url, monkeypatch):
    monkeypatch.setattr("benchmarks.cancel.LATEST", 0.05)
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=0.5))
    async with World(wire) as world:
        host = await world.begin(ENDLESS)
        async with AsyncKimia(host.target) as kimia:
            found = await caller(kimia, 3, random.Random(1))
        heads = [await world.journal.head(barge_in.turn_id) for barge_in in found]
    await wire.aclose()
    assert len({barge_in.turn_id for barge_in in found}) == 3
    for barge_in, head in zip(found, heads, strict=True):
        assert head.state == "cancelled"
        assert barge_in.asked < head.ended / 1e6 < barge_in.acknowledged
        assert bool(barge_in.stale_bytes) == (barge_in.asked <= barge_in.last_stale <= barge_in.acknowledged)


def test_rows_are_free_when_the_logs_say_so(tmp_path):
    entry = {"event": "turn left", "turn": "s.1", "outcome": "cancelled", "timestamp": "1970-01-01T00:01:40.250000Z"}
    logs = {stage: tmp_path / stage for stage in ("llm", "detokenizer")}
    for log in logs.values():
        log.write_text(f"not of ours\n{json.dumps(entry)}\n{json.dumps({'event': 'listening'})}\n", encoding="utf-8")
    stale = BargeIn("s.1", asked=100.0, last_stale=100.125, stale_bytes=2, acknowledged=100.5, marked=100.0)
    read_leaving([stale], logs)
    found = summary([stale])
    assert {name: row["p95"] for name, row in found.items()} == {
        "last stale byte": 125.0,
        "acknowledged": 500.0,
        "marked": 0.0,
        "row free, llm": 250.0,
        "row free, detokenizer": 250.0,
    }
    with pytest.raises(RuntimeError, match="does not say"):
        read_leaving([BargeIn("s.2")], logs)
