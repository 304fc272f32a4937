"""Keys and values in place: what is committed stays what it was, wherever it comes to lie."""

import pytest
import torch

from kimia.model.dit import Prefix
from kimia.model.flow_cache import FlowCache

pytestmark = pytest.mark.unit

EMPTY = Prefix(torch.empty(2, 1, 3, 0, 4), torch.empty(2, 1, 3, 0, 4))
WINDOW, SPARE = 10, 8


@pytest.fixture
def cache() -> FlowCache:
    return FlowCache(EMPTY, WINDOW, SPARE)


def rows(start: int, count: int) -> Prefix:
    """Frames that carry their number; values its negative."""
    numbers = torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(2, 1, 3, count, 4)
    return Prefix(numbers, -numbers)


def written(cache: FlowCache, start: int, count: int, kept: int) -> Prefix:
    """A solve writes so many frames, of which some stay."""
    room = cache.room(count)
    room.span(cache.frames, cache.frames + count).copy_(rows(start, count))
    cache.keep(kept)
    return room


def holds(cache: FlowCache, start: int, stop: int) -> bool:
    expected = rows(start, stop - start)
    return torch.equal(cache.held.keys, expected.keys) and torch.equal(cache.held.values, expected.values)


def test_only_what_is_kept_stays(cache):
    assert cache.held.frames == 0
    written(cache, 0, 5, 3)
    assert holds(cache, 0, 3)
    written(cache, 3, 6, 4)
    assert holds(cache, 0, 7)


def test_a_room_begins_with_what_is_committed(cache):
    written(cache, 0, 4, 4)
    room = cache.room(5)
    assert room.frames == 9
    assert torch.equal(room.span(0, 4).keys, rows(0, 4).keys)


def test_the_window_moves_over_a_buffer_that_stays(cache):
    written(cache, 0, 6, 4)
    places, start = set(), 4
    for _ in range(20):
        room = written(cache, start, 6, 4)
        start += 4
        assert holds(cache, max(0, start - WINDOW), start)
        places.add(room.keys.untyped_storage().data_ptr())
    assert len(places) == 1


def test_a_chunk_larger_than_the_room_gets_more(cache):
    written(cache, 0, 9, 9)
    written(cache, 9, 40, 40)
    assert holds(cache, 39, 49)
    written(cache, 49, 3, 3)
    assert holds(cache, 42, 52)


def test_what_another_committed_is_heard(cache):
    cache.hear(EMPTY)
    assert cache.frames == 0
    cache.hear(rows(0, 7))
    written(cache, 7, 4, 2)
    assert holds(cache, 0, 9)
    cache.hear(rows(9, 30))
    assert holds(cache, 29, 39)
