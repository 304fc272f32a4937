import asyncio

import pytest
from prometheus_client import REGISTRY

from kimia.errors import CapacityError
from kimia.stage import DETOKENIZER, LLM, TOKENIZER
from kimia.streams.ledger import Ledger
from kimia.streams.wire import Wire, WireOptions
from orchestrator.admission import Admission

pytestmark = pytest.mark.unit

ROUTE = (LLM, DETOKENIZER)


@pytest.fixture
async def ledger(valkey_url):
    wire = await Wire.connect(valkey_url, options=WireOptions(lease=10))
    ledger = Ledger(wire)
    for kind in ROUTE:
        await ledger.announce(kind, "worker", 1, 0)
    yield ledger
    await wire.aclose()


async def reserved(ledger):
    return (await ledger.usage())["llm"].reserved


async def test_rows_are_held_until_released(ledger):
    admission = Admission(ledger)
    first = await admission.admit("a", "t", ROUTE)
    with pytest.raises(CapacityError) as caught:
        await admission.admit("b", "t", ROUTE)
    assert caught.value.retry_after > 0
    await first.release()
    second = await admission.admit("b", "t", ROUTE)
    await second.release()
    assert await reserved(ledger) == 0


async def test_a_tenant_has_a_limit(ledger):
    await ledger.announce(LLM, "another", 9, 0)
    admission = Admission(ledger, tenant_sessions=1)
    first = await admission.admit("a", "t", (LLM,))
    with pytest.raises(CapacityError) as caught:
        await admission.admit("b", "t", (LLM,))
    assert caught.value.reason == "TENANT_LIMIT"
    other = await admission.admit("b", "u", (LLM,))
    await asyncio.gather(first.release(), other.release())


async def test_a_session_is_not_refused_a_second_time(ledger):
    admission = Admission(ledger)
    first, again = [await admission.admit("a", "t", ROUTE) for _ in range(2)]
    assert await reserved(ledger) == 1
    again.leave()
    await first.release()


async def test_what_is_kept_outlives_its_window_and_what_is_left_does_not(ledger):
    admission = Admission(ledger, window=0.15)
    reservation = await admission.admit("a", "t", ROUTE)
    await asyncio.sleep(0.3)
    assert await reserved(ledger) == 1
    reservation.leave()
    async with asyncio.timeout(5):
        while await reserved(ledger):
            await asyncio.sleep(0.01)


async def test_a_reservation_that_was_lost_is_made_again(ledger):
    admission = Admission(ledger, window=0.15)
    reservation = await admission.admit("a", "t", ROUTE)
    await ledger.release("a")
    async with asyncio.timeout(5):
        while not await reserved(ledger):
            await asyncio.sleep(0.01)
    await reservation.release()


async def test_a_resumed_turn_keeps_what_there_is_and_takes_no_more(ledger):
    admission = Admission(ledger, window=0.15)
    await admission.reserve("a", "t", ROUTE)
    kept, none = admission.resumed("a", "t"), admission.resumed("b", "t")
    await asyncio.sleep(0.3)
    assert await reserved(ledger) == 1
    kept.leave()
    none.leave()


def refusals(label):
    return REGISTRY.get_sample_value("kimia_refused_total", {"stage": label}) or 0.0


async def test_refusals_are_counted_by_the_stage_that_lacks_a_row(ledger):
    before = refusals("llm"), refusals("tenant")
    admission = Admission(ledger, tenant_sessions=1)
    first = await admission.admit("a", "t", (LLM,))
    for tenant in ("t", "u", "u"):
        with pytest.raises(CapacityError):
            await admission.admit("b", tenant, (LLM,))
    assert (refusals("llm"), refusals("tenant")) == (before[0] + 2, before[1] + 1)
    await first.release()


async def test_a_holder_gives_back_only_its_own_part(ledger):
    admission = Admission(ledger)
    call, request = [await admission.admit("a", "t", ROUTE, holder) for holder in ("call", "request")]
    await request.release()
    assert await reserved(ledger) == 1
    await call.release()
    assert await reserved(ledger) == 0


async def test_a_worker_may_announce_itself_late_to_a_journal_that_is_new(ledger):
    admission = Admission(ledger)

    async def journal_is_new(seconds):
        assert seconds == ledger.announced_seconds
        await ledger.announce(TOKENIZER, "late", 1, 0)
        return True

    admission.journal_is_new = journal_is_new
    before = refusals("tokenizer")
    await (await admission.admit("a", "t", (TOKENIZER,))).release()
    assert refusals("tokenizer") == before


async def test_a_refusal_counts_when_the_journal_is_new_no_more(ledger):
    admission, answers = Admission(ledger), [False, True, True]

    async def journal_is_new(_):
        return answers.pop()

    admission.journal_is_new = journal_is_new
    before = refusals("tokenizer")
    with pytest.raises(CapacityError, match="no tokenizer worker is running"):
        await admission.admit("a", "t", (TOKENIZER,))
    assert (answers, refusals("tokenizer")) == ([], before + 1)


async def test_the_limit_of_a_tenant_does_not_wait_for_workers(ledger):
    admission = Admission(ledger, tenant_sessions=1)

    async def journal_is_new(_):
        raise AssertionError

    admission.journal_is_new = journal_is_new
    first = await admission.admit("a", "t", (LLM,))
    with pytest.raises(CapacityError):
        await admission.admit("b", "t", (LLM,))
    await first.release()
