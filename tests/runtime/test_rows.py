"""Rows: counted, fair, never lost."""

import asyncio

import pytest

from kimia.runtime.rows import Rows

pytestmark = pytest.mark.unit


async def test_rows_are_counted():
    rows = Rows(2)
    assert (rows.free, rows.used) == (2, 0)
    assert rows.try_acquire()
    await rows.acquire()
    assert (rows.free, rows.used) == (0, 2)
    assert not rows.try_acquire()
    rows.release()
    assert (rows.free, rows.used) == (1, 1)


async def test_who_waits_is_served_in_order_of_arrival():
    rows, order = Rows(1), []

    async def taker(name):
        await rows.acquire()
        order.append(name)
        rows.release()

    await rows.acquire()
    async with asyncio.TaskGroup() as group:
        for name in "abc":
            group.create_task(taker(name))
        await asyncio.sleep(0)
        assert order == []
        rows.release()
    assert order == ["a", "b", "c"]
    assert rows.free == 1


async def test_trying_does_not_overtake_who_waits():
    rows = Rows(1)
    await rows.acquire()
    waiter = asyncio.create_task(rows.acquire())
    await asyncio.sleep(0)
    rows.release()
    assert not rows.try_acquire()
    await waiter
    assert rows.used == 1


async def test_a_cancelled_wait_takes_no_row():
    rows = Rows(1)
    await rows.acquire()
    waiter = asyncio.create_task(rows.acquire())
    await asyncio.sleep(0)
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    rows.release()
    assert rows.try_acquire()


async def test_a_row_handed_to_a_cancelled_wait_goes_on_to_the_next():
    rows = Rows(1)
    await rows.acquire()
    first, second = (asyncio.create_task(rows.acquire()) for _ in range(2))
    await asyncio.sleep(0)
    rows.release()
    first.cancel()  # after the row was handed over, before it ran
    with pytest.raises(asyncio.CancelledError):
        await first
    await second
    assert rows.used == 1


def test_wrong_counts_are_refused():
    with pytest.raises(ValueError, match="at least one row"):
        Rows(0)
    with pytest.raises(RuntimeError, match="more rows were given back"):
        Rows(1).release()
