"""Blobs live on a lease."""

import pytest

from kimia.errors import UnavailableError
from kimia.streams.blobs import Blobs
from kimia.streams.wire import Wire, WireOptions

pytestmark = pytest.mark.unit


@pytest.fixture
async def wire(journal_url):
    wire = await Wire.connect(journal_url, options=WireOptions(blob_ttl=60))
    yield wire
    await wire.aclose()


async def test_blobs_come_back_in_order_and_missing_ones_as_none(wire):
    blobs = Blobs(wire)
    await blobs.put("a", b"\x00\xff")
    await blobs.put("b", b"")
    assert await blobs.get(["b", "none", "a"]) == [b"", None, b"\x00\xff"]
    assert await blobs.get([]) == []


async def test_many_are_stored_at_once_on_the_same_lease(wire):
    blobs = Blobs(wire)
    await blobs.put_all([("a", b"1"), ("b", b"2")])
    await blobs.put_all([])
    assert await blobs.get(["a", "b"]) == [b"1", b"2"]
    assert 0 < await wire.blobs.pttl("b") <= 60_000


async def test_what_is_dropped_is_gone(wire):
    blobs = Blobs(wire)
    for key in "abc":
        await blobs.put(key, b"x")
    await blobs.drop(["a", "c", "none"])
    assert await blobs.get(["a", "b", "c"]) == [None, b"x", None]


async def test_every_use_begins_a_new_lease(wire):
    blobs = Blobs(wire)
    for key in "ab":
        await blobs.put(key, b"x")
        assert 0 < await wire.blobs.pttl(key) <= 60_000
        await wire.blobs.pexpire(key, 5000)
    await blobs.get(["a"])
    assert await blobs.renew(["b", "none"]) == ["none"]
    assert await wire.blobs.pttl("a") > 5000
    assert await wire.blobs.pttl("b") > 5000


async def test_a_store_that_is_gone_is_named(valkey_url):
    wire = await Wire.connect(valkey_url)
    wire.blobs = type(wire.blobs).from_url("redis://127.0.0.1:1/0")
    with pytest.raises(UnavailableError, match="blob store"):
        await Blobs(wire).put("a", b"x")
    with pytest.raises(UnavailableError, match="blob store"):
        await Blobs(wire).put_all([("a", b"x")])
    await wire.blobs.aclose()
    wire.blobs = wire.journal
    await wire.aclose()
