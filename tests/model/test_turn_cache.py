"""The cache of one turn: room, order, and what a step sees."""

import pytest
import torch

from kimia.model.turn_cache import SMALLEST_ROOM, TurnCache

pytestmark = pytest.mark.unit

LIKE = torch.zeros(1)


def piece(length: int, fill: float) -> torch.Tensor:
    return torch.full((1, 2, length, 4), fill)


def appended(cache: TurnCache, length: int, fill: float) -> list[torch.Tensor]:
    cache.reserve(cache.length + length)
    seen = []
    for slot in range(3):
        k = piece(length, fill + slot)
        seen.extend(cache.append(slot, k, -k, torch.empty(0), (length,)))
    cache.advance(length)
    return seen


def test_keys_and_values_in_order_of_arrival():
    cache = TurnCache(3, 2, 4, LIKE)
    appended(cache, 3, 1.0)
    keys, values = appended(cache, 1, 5.0)[2:4]
    assert keys[0, 0, :, 0].tolist() == [2, 2, 2, 6]
    assert torch.equal(values, -keys)
    assert cache.lengths == (4,)


def test_room_doubles_and_keeps_the_past():
    cache, rooms = TurnCache(3, 2, 4, LIKE), set()
    for step in range(2 * SMALLEST_ROOM + 1):
        keys = appended(cache, 1, float(step))[0]
        rooms.add(cache.nbytes)
    assert keys[0, 1, :, 3].tolist() == list(range(2 * SMALLEST_ROOM + 1))
    assert [size // min(rooms) for size in sorted(rooms)] == [1, 2, 4]


def test_a_step_writes_in_place_and_sees_its_own_position():
    cache = TurnCache(3, 2, 4, LIKE)
    appended(cache, 2, 1.0)
    places, seen = cache.next_position()
    places[1].copy_(torch.stack([piece(1, 8.0)[:, :, 0], piece(1, 9.0)[:, :, 0]]))
    assert seen[2][0, 1, :, 2].tolist() == [2, 2, 8]
    assert seen[3][0, 1, :, 2].tolist() == [-2, -2, 9]
    assert [tuple(view.shape) for view in seen] == [(1, 2, 3, 4)] * 6
