"""Connections and scripts."""

import asyncio

import pytest
import redis

from kimia.errors import SettingsError, UnavailableError
from kimia.streams.wire import PARTITIONS, Wire, WireOptions, script_names, script_text

pytestmark = pytest.mark.unit


async def test_a_wire_reaches_both_kinds_of_server(journal_url):
    wire = await Wire.connect(journal_url)
    assert await wire.journal.ping()
    assert wire.blobs is wire.journal
    await wire.aclose()


async def test_connecting_loads_every_script(journal_url):
    wire = await Wire.connect(journal_url)
    digests = [script_text(name)[1] for name in script_names()]
    assert await wire.journal.script_exists(*digests) == [True] * len(digests)
    await wire.aclose()


async def test_a_script_that_the_server_has_lost_is_sent_again(journal_url):
    wire = await Wire.connect(journal_url)
    await wire.journal.script_flush()
    assert await wire.call("depth", ["{0}:jobs:llm:batch"], []) == [0, 0]
    await wire.journal.script_flush()
    assert await wire.call_many("depth", [(["{0}:jobs:llm:batch"], [])] * 3) == [[0, 0]] * 3
    await wire.aclose()


async def test_partitions_are_named(valkey_url):
    wire = await Wire.connect(valkey_url, options=WireOptions(partitions=3))
    assert wire.partitions == ("{0}", "{1}", "{2}")
    await wire.aclose()


async def test_whoever_comes_first_says_how_many_partitions_there_are(journal_url):
    first, same, other = [await Wire.connect(journal_url, options=WireOptions(partitions=n)) for n in (3, 3, 4)]
    await other.check_partitions()  # asking says nothing
    await first.agree()
    await same.agree()
    await same.check_partitions()
    for refused in (other.check_partitions, other.agree):
        with pytest.raises(SettingsError, match=r"3 partitions, not with 4: say 3 .* delete \{ledger\}:partitions"):
            await refused()
    await first.journal.delete(PARTITIONS)
    await other.agree()
    for wire in (first, same, other):
        await wire.aclose()


async def test_whoever_starts_agrees_though_the_memory_is_full(journal_url):
    wire = await Wire.connect(journal_url)
    await wire.journal.config_set("maxmemory", 1)
    try:
        await wire.agree()
    finally:
        await wire.journal.config_set("maxmemory", 0)
    assert await wire.journal.get(PARTITIONS) == b"1"
    await wire.aclose()


async def test_blobs_may_lie_elsewhere(valkey_url):
    wire = await Wire.connect(valkey_url, valkey_url.removesuffix("/0") + "/1")
    await wire.blobs.set("a", b"b")
    assert await wire.journal.get("a") is None
    await wire.aclose()


async def test_a_server_that_is_not_there_is_named():
    with pytest.raises(UnavailableError, match=r"the journal .* check its URL, and that it runs"):
        await Wire.connect("redis://127.0.0.1:1/0")


async def test_a_url_that_names_no_server_is_a_wrong_setting():
    with pytest.raises(SettingsError, match="URL"):
        await Wire.connect("http://example.org")


async def test_callers_wait_for_a_free_connection(valkey_url, monkeypatch):
    monkeypatch.setattr("kimia.streams.connections.CONNECTIONS", 3)
    wire = await Wire.connect(valkey_url)
    assert sorted(await asyncio.gather(*(wire.journal.incr("n") for _ in range(50)))) == list(range(1, 51))
    with redis.Redis.from_url(valkey_url) as other:
        assert other.info("clients")["connected_clients"] <= 4
    await wire.aclose()


async def test_no_connection_is_lost_to_callers_that_give_up(valkey_url, monkeypatch):
    monkeypatch.setattr("kimia.streams.connections.CONNECTIONS", 2)
    wire = await Wire.connect(valkey_url)
    for _ in range(20):
        calls = [asyncio.create_task(wire.journal.incr("n")) for _ in range(8)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
    async with asyncio.timeout(5):
        await asyncio.gather(*(wire.journal.ping() for _ in range(8)))
    await wire.aclose()


async def test_a_connection_that_cannot_be_made_takes_no_place(monkeypatch):
    monkeypatch.setattr("kimia.streams.connections.CONNECTIONS", 1)
    for _ in range(3):
        with pytest.raises(UnavailableError):
            await Wire.connect("redis://127.0.0.1:1/0")


async def test_who_reads_blocked_hears_of_a_lost_connection(valkey_url):
    wire = await Wire.connect(valkey_url)
    client = wire.blocking()
    reading = asyncio.create_task(client.xread({"nothing": "0"}, block=60_000))
    while not any(c["cmd"] == "xread" for c in await wire.journal.client_list()):
        pass
    await wire.journal.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    with pytest.raises(redis.ConnectionError):
        await reading
    await wire.aclose()


async def test_a_call_survives_a_connection_that_was_dropped(valkey_url):
    wire = await Wire.connect(valkey_url)
    await wire.journal.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "no")
    assert await wire.call("depth", ["{0}:jobs:llm:batch"], []) == [0, 0]
    await wire.aclose()


def test_scripts_are_small_and_say_what_they_take():
    from importlib import resources

    for file in (resources.files("kimia.streams") / "lua").iterdir():
        text = file.read_text(encoding="utf-8")
        assert text.startswith("-- "), file.name
        assert text.count("\n") <= 150, file.name
        if file.name != "prelude.lua":
            assert all(word in text for word in ("-- KEYS", "-- ARGV", "-- answer")), file.name
            assert script_text(file.name.removesuffix(".lua"))[0].count(text) == 1
