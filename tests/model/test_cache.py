"""The KV cache: room, ragged rows, slots that fell behind."""

import pytest
import torch

from kimia.model.cache import SMALLEST_ROOM, KVCache

pytestmark = pytest.mark.unit


def piece(rows: int, length: int, fill: float) -> torch.Tensor:
    return torch.full((rows, 2, length, 4), fill)


def append(cache: KVCache, slot: int, length: int, fill: float, counts: tuple[int, ...] | None = None):
    where = torch.tensor(cache.filled[slot])[:, None] + torch.arange(length)
    k = piece(cache.rows, length, fill)
    return cache.append(slot, k, -k, where, counts or (length,) * cache.rows)


def test_returns_keys_and_values_in_order_of_arrival():
    cache = KVCache(rows=1, slots=1)
    append(cache, 0, 3, 1.0)
    keys, values = append(cache, 0, 1, 2.0)
    assert keys[0, 0, :, 0].tolist() == [1, 1, 1, 2]
    assert torch.equal(values, -keys)
    assert cache.lengths == (4,)


def test_room_grows_geometrically_and_keeps_the_past():
    cache = KVCache(rows=1, slots=1)
    stores = set()
    for step in range(4 * SMALLEST_ROOM + 1):
        keys, _ = append(cache, 0, 1, float(step))
        stores.add(cache.keys[0].data_ptr())
    assert keys[0, 1, :, 3].tolist() == list(range(4 * SMALLEST_ROOM + 1))
    assert cache.keys[0].shape[2] == 8 * SMALLEST_ROOM
    assert len(stores) <= 4


def test_unwritten_slots_take_no_memory():
    cache = KVCache(rows=1, slots=3)
    append(cache, 0, 3, 1.0)
    assert cache.keys[1:] == cache.values[1:] == [None, None]


def test_padding_is_overwritten_by_the_next_positions():
    cache = KVCache(rows=3, slots=1)
    append(cache, 0, 4, 1.0, counts=(4, 2, 3))
    keys, values = append(cache, 0, 2, 2.0, counts=(1, 2, 0))
    assert cache.lengths == (5, 4, 3)
    assert keys[:, 0, :, 0].tolist() == [[1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 0, 0], [1, 1, 1, 2, 2, 0]]
    assert torch.equal(values, -keys)


def test_memory_beyond_the_content_is_zero():
    """Masked keys are multiplied by 0: they must be finite."""
    cache = KVCache(rows=2, slots=1)
    append(cache, 0, 4, 1.0, counts=(4, 2))
    assert not cache.keys[0][:, :, 4:].any()
    assert not cache.values[0][:, :, 4:].any()


def test_a_slot_that_was_skipped_is_refused():
    cache = KVCache(rows=2, slots=2)
    for slot in (0, 1):
        append(cache, slot, 3, 1.0)
    append(cache, 0, 1, 2.0)  # slot 1 skips a step
    append(cache, 0, 1, 3.0)
    with pytest.raises(RuntimeError, match=r"slot 1 holds \(3, 3\) .* stands at \(4, 4\)"):
        append(cache, 1, 1, 3.0)
