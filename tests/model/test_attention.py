"""Attention against a softmax written out per query, and flash-attn against PyTorch's."""

import math
import sys
from types import ModuleType

import pytest
import torch

from kimia.model import attention as module
from kimia.model.attention import Visible, attention

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
CASES = {
    "prefill": Visible((7, 7), 7, causal=True, device=CPU),
    "prefill behind a prefix": Visible((9, 9), 4, causal=True, device=CPU),
    "one step": Visible((9, 9), 1, causal=True, device=CPU),
    "one step, ragged": Visible((9, 4), 1, causal=True, device=CPU),
    "several steps, ragged": Visible((5, 9), 3, causal=True, device=CPU),
    "full": Visible((6, 6), 6, causal=False, device=CPU),
    "full, ragged": Visible((6, 2), 6, causal=False, device=CPU),
}


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: Visible) -> torch.Tensor:
    q, k, v = q.double(), k.double(), v.double()
    out = torch.zeros_like(q)
    group = q.shape[1] // k.shape[1]
    for b, length in enumerate(visible.lengths):
        for h in range(q.shape[1]):
            for t in range(visible.queries):
                seen = length - visible.queries + t + 1 if visible.causal else length
                scores = k[b, h // group, :seen] @ q[b, h, t] / math.sqrt(q.shape[-1])
                weights = (scores - scores.max()).exp()
                out[b, h, t] = (weights / weights.sum()) @ v[b, h // group, :seen]
    return out


def tensors(visible: Visible, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    rows = len(visible.lengths)
    shapes = (6, visible.queries), (2, visible.keys), (2, visible.keys)
    q, k, v = (torch.randn(rows, heads, length, 8, generator=generator) for heads, length in shapes)
    return (2 * q).to(dtype), (2 * k).to(dtype), v.to(dtype)


@pytest.mark.parametrize("name", CASES)
def test_equals_the_written_out_softmax(name):
    visible = CASES[name]
    q, k, v = tensors(visible)
    torch.testing.assert_close(attention(q, k, v, visible).double(), plain(q, k, v, visible), atol=2e-6, rtol=0)


@pytest.mark.parametrize("name", CASES)
def test_float32_is_not_narrowed(name):
    """Half precision anywhere inside would be off by 1e-4 and more."""
    visible = CASES[name]
    q, k, v = tensors(visible)
    out = attention(q, k, v + 100, visible)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), plain(q, k, v + 100, visible), atol=5e-5, rtol=0)


def test_keys_beyond_a_row_do_not_matter():
    visible = CASES["several steps, ragged"]
    q, k, v = tensors(visible)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[0, :, 5:], changed_v[0, :, 5:] = 1e4, -1e4
    torch.testing.assert_close(attention(q, k, v, visible), attention(q, changed_k, changed_v, visible), atol=0, rtol=0)


def test_gradients_flow():
    visible = CASES["prefill"]
    q, k, v = (tensor.requires_grad_() for tensor in tensors(visible))
    attention(q, k, v, visible).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.abs().sum() > 0 for tensor in (q, k, v))


# ---- flash-attn -------------------------------------------------------------------------------------------------


def test_cpu_and_float32_never_take_flash(monkeypatch):
    monkeypatch.setattr(module, "FLASH_INSTALLED", True)
    for dtype in (torch.float32, torch.bfloat16):
        assert not module.flash_fits(torch.zeros(1, 1, 1, 8, dtype=dtype))


@pytest.fixture
def documented_flash(monkeypatch):
    """flash-attn's two functions as its documentation has them: (B, T, heads, D), last query aligned to last key."""

    def with_lengths(q, k, v, lengths, causal):
        assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
        visible = Visible(tuple(lengths), q.shape[1], causal, q.device)
        return plain(*(heads.transpose(1, 2) for heads in (q, k, v)), visible).transpose(1, 2).to(q.dtype)

    def flash_attn_func(q, k, v, causal=False):
        return with_lengths(q, k, v, [k.shape[1]] * k.shape[0], causal)

    def flash_attn_with_kvcache(q, k_cache, v_cache, k=None, v=None, *, cache_seqlens, block_table=None, causal=False):
        assert cache_seqlens.dtype == torch.int32
        lengths = cache_seqlens.tolist()
        if block_table is None:
            return with_lengths(q, k_cache, v_cache, lengths, causal)
        assert block_table.dtype == torch.int32
        assert k.shape == v.shape == (len(lengths), q.shape[1], *k_cache.shape[2:])
        size = k_cache.shape[1]
        for row, at in enumerate(lengths):  # one new position, stored in place
            page = block_table[row, at // size]
            k_cache[page, at % size], v_cache[page, at % size] = k[row, 0], v[row, 0]
        keys, values = (cache[block_table.long()].flatten(1, 2) for cache in (k_cache, v_cache))
        return with_lengths(q, keys, values, [at + 1 for at in lengths], causal)

    fake = ModuleType("flash_attn")
    fake.flash_attn_func = flash_attn_func
    fake.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    monkeypatch.setattr(module, "flash_fits", lambda q: True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("documented_flash")
def test_flash_is_called_as_documented(name):
    visible = CASES[name]
    q, k, v = tensors(visible)
    torch.testing.assert_close(attention(q, k, v, visible).double(), plain(q, k, v, visible), atol=1e-6, rtol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not (torch.cuda.is_available() and module.FLASH_INSTALLED), reason="needs CUDA and flash-attn")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_flash_equals_sdpa(name, dtype, monkeypatch):
    case = CASES[name]
    visible = Visible(case.lengths, case.queries, case.causal, torch.device("cuda"))
    q, k, v = (tensor.cuda() for tensor in tensors(visible, dtype))
    assert module.flash_fits(q)
    fast = attention(q, k, v, visible)
    monkeypatch.setattr(module, "FLASH_INSTALLED", False)
    torch.testing.assert_close(fast, attention(q, k, v, visible), atol=2e-2, rtol=2e-2)
