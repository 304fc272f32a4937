"""Rows: counted, fair, never lost."""

import asyncio

import pytest

from kimia.runtime.rows import Row, Rows

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


# ---- parking ----------------------------------------------------------------------------------------------------


async def until_it_waits(task):
    for _ in range(3):
        await asyncio.sleep(0)
    assert not task.done()


async def test_a_parked_turn_comes_before_those_that_had_no_row_yet():
    rows = Rows(1)
    await rows.acquire()
    row = Row(rows)
    row.park()
    assert (rows.used, rows.parked, rows.free) == (0, 1, 1)
    await rows.acquire()  # the row is another's now
    new = asyncio.create_task(rows.acquire())
    await until_it_waits(new)
    back = asyncio.create_task(row.unpark())
    await until_it_waits(back)
    assert rows.wanted
    rows.release()
    await back
    assert not new.done()
    assert (rows.used, rows.parked, rows.wanted) == (1, 0, False)
    row.leave()
    row.leave()
    await new
    assert (rows.used, rows.parked) == (1, 0)


async def test_a_process_holds_no_more_than_two_turns_for_each_row():
    rows, held = Rows(2), []
    for _ in range(4):
        assert rows.try_acquire()
        held.append(Row(rows))
        held[-1].park()
    assert (rows.free, rows.try_acquire()) == (0, False)
    new = asyncio.create_task(rows.acquire())
    await until_it_waits(new)
    held.pop().leave()
    await new
    assert (rows.used, rows.parked, rows.free) == (1, 3, 0)


async def test_a_row_that_is_kept_to_the_end_is_not_one_that_a_parked_turn_left():
    rows = Rows(2)
    assert rows.try_acquire()
    row = Row(rows)
    row.park()
    assert rows.try_acquire(for_good=True)
    assert not rows.try_acquire(for_good=True)
    assert rows.try_acquire()


@pytest.mark.parametrize("handed", [False, True], ids=["while it waits", "when it has got the row"])
async def test_a_turn_that_is_stopped_while_it_asks_again_leaves_nothing(handed):
    rows = Rows(1)
    await rows.acquire()
    row = Row(rows)
    row.park()
    await rows.acquire()
    back = asyncio.create_task(row.unpark())
    await until_it_waits(back)
    if handed:
        rows.release()
    back.cancel()
    with pytest.raises(asyncio.CancelledError):
        await back
    row.leave()
    if not handed:
        rows.release()
    assert (rows.used, rows.parked, rows.wanted) == (0, 0, False)
