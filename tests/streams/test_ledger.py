"""Admission: all stages of a route or none, never more sessions than live rows."""

import asyncio

import pytest
import redis

from kimia.errors import CapacityError, SettingsError
from kimia.stage import DETOKENIZER, LLM, STAGES, TOKENIZER
from kimia.streams import keys
from kimia.streams.ledger import NO_WORKER_RETRY, RELEASE_WINDOW, SHORTEST_RETRY, Ledger, StageUsage, WorkerRows
from kimia.streams.wire import PARTITIONS, Wire, WireOptions

pytestmark = pytest.mark.unit

ROUTE = (TOKENIZER, LLM, DETOKENIZER)
LONG = 60.0  # seconds: longer than any test


@pytest.fixture
async def ledger(journal_url):
    wire = await Wire.connect(journal_url, options=WireOptions(lease=LONG))
    yield Ledger(wire)
    await wire.aclose()


@pytest.fixture
async def brief(journal_url):
    """A ledger whose announcements end after 30 ms."""
    wire = await Wire.connect(journal_url, options=WireOptions(lease=0.01))
    yield Ledger(wire)
    await wire.aclose()


async def offer(ledger, rows=2, route=ROUTE):
    for kind in route:
        await ledger.announce(kind, f"{kind.name}-1", rows, 0)


async def reserved(ledger):
    return [usage.reserved for usage in (await ledger.usage()).values()]


async def until(condition):
    """Wait for the server's clock."""
    async with asyncio.timeout(5):
        while not await condition():
            await asyncio.sleep(0.005)


async def test_workers_with_unlike_marks_are_not_counted_together(ledger):
    await ledger.announce(LLM, "llm+int8-a-1", 4, 0)
    for worker in ("llm-b-1", "llm+fp8-b-1"):
        with pytest.raises(SettingsError, match=r"beside llm\+int8-a-1"):
            await ledger.announce(LLM, worker, 2, 0)
    await ledger.announce(LLM, "llm+int8-b-1", 2, 0)
    assert (await ledger.usage())["llm"].capacity == 6
    for worker in ("llm+int8-a-1", "llm+int8-b-1"):
        await ledger.withdraw(LLM, worker)
    await ledger.announce(LLM, "llm-b-1", 2, 0)


async def test_one_of_two_that_come_at_once_is_refused(ledger):
    found = await asyncio.gather(
        *(ledger.announce(LLM, worker, 2, 0) for worker in ("llm-a-1", "llm+int8-b-1")), return_exceptions=True
    )
    assert [type(outcome) for outcome in found].count(SettingsError) == 1


async def test_a_dead_worker_keeps_nobody_away(brief):
    await brief.announce(LLM, "llm-a-1", 2, 0)

    async def joined():
        try:
            await brief.announce(LLM, "llm+int8-b-1", 2, 0)
        except SettingsError:
            return False
        return True

    await until(joined)


async def test_workers_are_counted_until_they_withdraw(ledger):
    await ledger.announce(LLM, "a", 4, 1)
    await ledger.announce(LLM, "b", 2, 2)
    await ledger.announce(LLM, "a", 8, 3)
    usage = await ledger.usage()
    assert list(usage) == list(STAGES)
    assert usage["llm"] == StageUsage({"a": WorkerRows(8, 3), "b": WorkerRows(2, 2)}, 10, 0)
    await ledger.withdraw(LLM, "a")
    assert (await ledger.usage())["llm"].capacity == 2


async def test_a_silent_worker_is_counted_no_more(ledger, brief):
    await offer(ledger, rows=1)
    await brief.announce(LLM, "silent", 5, 0)

    async def forgotten():
        return (await ledger.usage())["llm"].capacity == 1

    await until(forgotten)
    await ledger.reserve("a", "t", ROUTE, LONG)
    with pytest.raises(CapacityError, match="all 1 rows"):
        await ledger.reserve("b", "t", ROUTE, LONG)


async def test_the_names_of_silent_workers_do_not_pile_up(ledger, brief):
    await brief.announce(LLM, "silent", 5, 0)

    async def ended():
        return not (await ledger.usage())["llm"].workers

    await until(ended)
    await ledger.announce(LLM, "a", 1, 0)
    assert await ledger._wire.journal.hkeys("{ledger}:workers:llm") == [b"a"]


async def test_workers_say_again_how_many_partitions_a_journal_had_that_has_lost_all(ledger):
    await ledger._wire.agree()
    await ledger._wire.journal.flushall()
    await ledger.announce(LLM, "a", 1, 0)
    assert int(await ledger._wire.journal.get(PARTITIONS)) == ledger._wire.options.partitions


async def test_sessions_are_admitted_up_to_the_rows_of_every_stage(ledger):
    await offer(ledger, rows=2)
    await ledger.announce(LLM, "other", 1, 0)
    await ledger.reserve("a", "t", ROUTE, LONG)
    await ledger.reserve("b", "t", ROUTE, LONG)
    with pytest.raises(CapacityError, match="all 2 rows of the tokenizer") as refused:
        await ledger.reserve("c", "t", ROUTE, LONG)
    assert refused.value.reason == "AT_CAPACITY"
    assert await reserved(ledger) == [2, 2, 2]
    await ledger.reserve("c", "t", [LLM], LONG)
    assert await reserved(ledger) == [2, 3, 2]


async def test_a_refusal_changes_nothing(ledger):
    await offer(ledger, route=(TOKENIZER, LLM))
    with pytest.raises(CapacityError, match="no detokenizer worker is running") as refused:
        await ledger.reserve("a", "t", ROUTE, LONG)
    assert refused.value.retry_after == NO_WORKER_RETRY
    assert await reserved(ledger) == [0, 0, 0]
    assert not await ledger.renew("a", LONG)


async def test_fifty_at_once_never_exceed_the_rows(ledger):
    await offer(ledger, rows=7)
    await ledger.announce(DETOKENIZER, "more", 50, 0)

    async def attempt(number):
        try:
            await ledger.reserve(f"s{number}", "t", ROUTE, LONG)
        except CapacityError:
            return False
        return True

    admitted = await asyncio.gather(*(attempt(number) for number in range(50)))
    assert sum(admitted) == 7
    assert await reserved(ledger) == [7, 7, 7]


async def test_release_frees_every_stage_and_may_be_said_twice(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", ROUTE, LONG)
    await ledger.release("a")
    await ledger.release("a")
    assert await reserved(ledger) == [0, 0, 0]
    await ledger.reserve("b", "t", ROUTE, LONG)


async def test_reservations_end_unless_they_are_renewed(ledger):
    await offer(ledger, rows=2)
    await ledger.reserve("kept", "t", ROUTE, 0.05)
    await ledger.reserve("lost", "t", ROUTE, 0.05)
    assert await ledger.renew("kept", LONG)

    async def ended():
        return await reserved(ledger) == [1, 1, 1]

    await until(ended)
    assert not await ledger.renew("lost", LONG)
    await ledger.reserve("next", "t", ROUTE, LONG)
    with pytest.raises(CapacityError):
        await ledger.reserve("lost", "t", ROUTE, LONG)


async def test_a_row_whose_time_is_over_is_not_held_any_more(ledger, journal_url):
    """The session's hash ends by another clock than its rows, so it may outlive them by a moment."""
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", [LLM, DETOKENIZER], LONG)
    with redis.Redis.from_url(journal_url) as client:
        for pool in ("llm", "detokenizer", "@t"):
            client.zadd(f"{{ledger}}:reserved:{pool}", {"a": 1})
    await ledger.reserve("a", "t", [LLM], LONG)
    assert await reserved(ledger) == [0, 1, 0]


async def test_a_session_that_holds_its_rows_is_never_refused(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", ROUTE, LONG, tenant_limit=1)
    for kind in ROUTE:
        await ledger.withdraw(kind, f"{kind.name}-1")
    await ledger.reserve("a", "t", ROUTE, LONG, tenant_limit=1)
    assert await reserved(ledger) == [1, 1, 1]


async def test_a_route_may_widen_and_never_narrows(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", [LLM], LONG)
    await ledger.reserve("a", "t", [LLM, DETOKENIZER], LONG)
    await ledger.reserve("a", "t", [LLM], LONG)
    assert await reserved(ledger) == [0, 1, 1]
    await ledger.release("a")
    assert await reserved(ledger) == [0, 0, 0]


async def test_a_session_keeps_what_it_has_when_widening_is_refused(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("other", "t", [DETOKENIZER], LONG)
    await ledger.reserve("a", "t", [LLM], LONG)
    with pytest.raises(CapacityError):
        await ledger.reserve("a", "t", [LLM, DETOKENIZER], LONG)
    assert await reserved(ledger) == [0, 1, 1]
    assert await ledger.renew("a", LONG)


async def test_tenants_have_limits_of_their_own(ledger):
    await offer(ledger, rows=9)
    await ledger.reserve("a", "t", ROUTE, LONG, tenant_limit=2)
    await ledger.reserve("b", "t", ROUTE, LONG, tenant_limit=2)
    with pytest.raises(CapacityError) as refused:
        await ledger.reserve("c", "t", ROUTE, LONG, tenant_limit=2)
    assert refused.value.reason == "TENANT_LIMIT"
    await ledger.reserve("d", "u", ROUTE, LONG, tenant_limit=2)
    await ledger.release("a")
    await ledger.reserve("c", "t", ROUTE, LONG, tenant_limit=2)


async def test_the_retry_delay_follows_the_rate_of_releases(ledger):
    await offer(ledger, rows=100)

    async def refused_when_full(rows):
        await ledger.announce(LLM, "llm-1", rows, 0)
        with pytest.raises(CapacityError) as refused:
            await ledger.reserve("late", "t", [LLM], LONG)
        return refused.value.retry_after

    for number in range(70):
        await ledger.reserve(f"s{number}", "t", [LLM], LONG)
    assert await refused_when_full(70) == await refused_when_full(1) == RELEASE_WINDOW
    for number in range(10):
        await ledger.release(f"s{number}")
    assert await refused_when_full(60) == pytest.approx(RELEASE_WINDOW / 10)
    for number in range(10, 69):
        await ledger.release(f"s{number}")
    assert await refused_when_full(1) == pytest.approx(SHORTEST_RETRY)


async def refusal(ledger, **limit):
    with pytest.raises(CapacityError) as refused:
        await ledger.reserve("late", "t", [LLM], LONG, **limit)
    return refused.value.retry_after


async def test_the_retry_delay_is_that_of_steady_churn(ledger):
    """Calls that come and go every two seconds, at the full house: whoever is refused waits for the next to go."""
    await offer(ledger, rows=2)
    for name in ("a", "b"):
        await ledger.reserve(name, "t", ROUTE, LONG)
    server, released = ledger._wire.journal, keys.ledger("released:llm")
    now = round((await server.time())[0] * 1000)
    await server.zadd(released, {f"gone-{ago}": now - 2000 * ago for ago in range(1, 60)})
    assert await refusal(ledger) == pytest.approx(2, rel=0.15)  # 14 or 15 within the half minute
    await ledger.release("a")
    await ledger.reserve("c", "t", ROUTE, LONG)
    assert await refusal(ledger) == pytest.approx(2, rel=0.15)


async def test_who_is_refused_waits_for_all_that_are_beyond_the_capacity(ledger):
    await offer(ledger, rows=14)
    for number in range(14):
        await ledger.reserve(f"s{number}", "t", [LLM], LONG)
    for number in range(10):
        await ledger.release(f"s{number}")
    await ledger.announce(LLM, "llm-1", 2, 0)  # workers died: four sessions on two rows
    assert await refusal(ledger) == pytest.approx(RELEASE_WINDOW / 10 * 3)
    assert await refusal(ledger, tenant_limit=1) == pytest.approx(RELEASE_WINDOW / 10 * 4)


async def test_what_ended_long_ago_is_no_release_of_now(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", [LLM], LONG)
    server, held = ledger._wire.journal, keys.ledger("reserved:llm")
    now = round((await server.time())[0] * 1000)
    await server.zadd(held, {f"gone-{number}": now - 600_000 for number in range(10)})
    assert await refusal(ledger) == RELEASE_WINDOW
    await server.zadd(held, {f"gone-{number}": now - 1000 for number in range(10)})
    assert await refusal(ledger) == pytest.approx(RELEASE_WINDOW / 10)


async def test_what_is_given_back_after_its_end_was_released_at_its_end(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", ROUTE, LONG)
    for pool in (*(kind.name for kind in ROUTE), "@t"):  # long over, its hash not expired yet
        await ledger._wire.journal.zadd(keys.ledger(f"reserved:{pool}"), {"a": 1}, xx=True)
    await ledger.release("a")
    await ledger.reserve("b", "t", ROUTE, LONG)
    await ledger.release("b")
    await ledger.reserve("c", "t", ROUTE, LONG)
    assert await refusal(ledger) == pytest.approx(30.0)  # one release in the last half minute, not two


async def test_everything_but_the_workers_expires(ledger):
    await offer(ledger)
    await ledger.reserve("a", "t", ROUTE, LONG)
    await ledger.reserve("b", "t", ROUTE, LONG)
    await ledger.release("b")
    client = ledger._wire.journal
    for key in await client.keys("*"):
        assert key.startswith(b"{ledger}:")
        lasting = b":workers:" in key or key.endswith(b":partitions")
        assert lasting == (await client.pttl(key) == -1)


async def test_what_one_holder_gives_back_stays_with_the_others(ledger):
    await offer(ledger, rows=1)
    for holder in ("call", "request"):
        await ledger.reserve("a", "t", ROUTE, LONG, holder=holder)
    assert await reserved(ledger) == [1, 1, 1]
    await ledger.release("a", "request")
    await ledger.release("a", "request")
    assert await reserved(ledger) == [1, 1, 1]
    await ledger.release("a", "call")
    assert await reserved(ledger) == [0, 0, 0]


async def test_a_holder_that_fell_silent_holds_nothing(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", ROUTE, 0.02, holder="silent")
    await ledger.reserve("a", "t", ROUTE, LONG, holder="call")

    async def given_back():
        await ledger.reserve("a", "t", ROUTE, LONG, holder="call")
        await ledger.release("a", "call")
        return await reserved(ledger) == [0, 0, 0]

    await until(given_back)


async def test_a_deleted_session_gives_back_what_all_its_holders_have(ledger):
    await offer(ledger, rows=1)
    for holder in ("call", "request"):
        await ledger.reserve("a", "t", ROUTE, LONG, holder=holder)
    await ledger.release("a")
    assert await reserved(ledger) == [0, 0, 0]


async def test_a_refusal_names_the_stage(ledger):
    await offer(ledger, rows=1)
    await ledger.reserve("a", "t", [LLM], LONG)
    with pytest.raises(CapacityError) as caught:
        await ledger.reserve("b", "t", [LLM], LONG)
    assert caught.value.stage == "llm"
