import asyncio

import pytest

from kimia.errors import NotFoundError, UnavailableError
from kimia.streams.inbox import Inbox
from kimia.streams.journal import Journal
from kimia.streams.wire import Wire
from kimia.v1.turn_pb2 import Caller
from orchestrator import records as module
from orchestrator.copies import Copies
from orchestrator.records import Records, new_record, patiently

pytestmark = pytest.mark.unit

CALLER = Caller(tenant="t")


@pytest.fixture
async def records(valkey_url):
    wire = await Wire.connect(valkey_url)
    yield Records(wire, Journal(wire), Copies(Journal(wire), Inbox(wire, "o")))
    await wire.aclose()


async def test_a_session_begins_once(records):
    begun = await records.begin("s", CALLER)
    assert begun.new
    assert begun.record.caller.tenant == "t"
    again = await records.begin("s", CALLER)
    assert not again.new
    assert (again.record, again.version) == (begun.record, begun.version)
    unheard = await records.begin("s", CALLER, unheard=True)  # it was heard of, after all
    assert unheard == again


async def test_many_may_begin_it_at_once(records):
    begun = await asyncio.gather(*(records.begin("s", CALLER) for _ in range(5)))
    assert sorted(seen.new for seen in begun) == [False] * 4 + [True]


async def test_a_change_begins_from_what_was_seen_and_never_overwrites(records):
    seen = await records.begin("s", CALLER)
    await records.change("s", lambda record: record.turn_ids.append("s.0"), seen)
    await records.change("s", lambda record: record.turn_ids.append("s.1"), seen)  # which is old by now
    assert list((await records.load("s", "t")).turn_ids) == ["s.0", "s.1"]
    assert not seen.record.turn_ids


async def test_nobody_sees_the_session_of_another_tenant(records):
    await records.begin("s", CALLER)
    with pytest.raises(NotFoundError):
        await records.load("s", "other")
    with pytest.raises(NotFoundError):
        await records.begin("s", Caller(tenant="other"))


async def test_changes_of_many_are_all_kept(records):
    await records.begin("s", CALLER)
    await asyncio.gather(
        *(records.change("s", lambda record, at=at: record.turn_ids.append(f"s.{at}")) for at in range(8))
    )
    assert sorted((await records.load("s", "t")).turn_ids) == [f"s.{at}" for at in range(8)]


async def test_a_change_that_changes_nothing_writes_nothing(records):
    await records.begin("s", CALLER)
    assert await records.change("s", lambda record: len(record.turn_ids)) == 0
    assert (await Journal(records._wire).load_session("s"))[1] == 1


async def test_what_an_edit_raises_is_raised_and_nothing_is_written(records):
    await records.begin("s", CALLER)

    def edit(record):
        record.turn_ids.append("a")
        raise NotFoundError("no")

    with pytest.raises(NotFoundError):
        await records.change("s", edit)
    assert not (await records.load("s", "t")).turn_ids


async def test_a_session_that_is_gone_is_not_changed(records):
    with pytest.raises(NotFoundError):
        await records.change("s", lambda record: None)


async def test_a_session_lives_for_a_while(records):
    await records.begin("s", CALLER)
    assert 3_500_000 < await records.life("s") <= 3_600_000
    assert await records.life("unknown") == 0


async def test_a_journal_that_comes_back_is_waited_for(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    failures = [UnavailableError("away")] * 3

    async def call():
        if failures:
            raise failures.pop()
        return 7

    assert await patiently(call) == 7


async def test_patience_ends(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "PATIENCE", 0.01)

    async def call():
        raise UnavailableError("away")

    with pytest.raises(UnavailableError):
        await patiently(call)


def test_a_record_says_when_it_began():
    assert new_record("s", CALLER).create_time.seconds > 0
    assert new_record("s", CALLER, one_off=True).one_off
