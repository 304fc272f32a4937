"""Attention with grouped queries: one function for every network, so that no model branches on the device.

PyTorch's scaled_dot_product_attention is the default. flash-attn takes its place when it is installed and the
tensors are float16 or bfloat16 on CUDA. Which keys a query sees is said once per forward pass by `Visible`;
both implementations read the same object.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

FLASH_INSTALLED = find_spec("flash_attn") is not None
FLASH_MAX_HEAD_DIM = 256  # flash-attn 2


@dataclass(frozen=True)
class Visible:
    """Which keys the queries of each row see.

    A row has `lengths[row]` keys; keys beyond are never seen. Causal: the T queries stand at the row's last T
    positions, each sees the keys up to its own. Not causal: each query sees all keys of its row.
    """

    lengths: tuple[int, ...]  # keys per row
    queries: int  # T
    causal: bool
    device: torch.device

    @property
    def keys(self) -> int:
        """Keys of the longest row: S."""
        return max(self.lengths)

    @property
    def uniform(self) -> bool:
        """Whether all rows have the same number of keys."""
        return min(self.lengths) == self.keys

    @property
    def square(self) -> bool:
        """Whether the keys are just the queries' own positions."""
        return self.uniform and self.keys == self.queries

    @property
    def unmasked(self) -> bool:
        """Whether every query sees every key."""
        return self.uniform and (not self.causal or self.queries == 1)

    @cached_property
    def row_lengths(self) -> Tensor:
        """Keys per row as int32."""  # (B,)
        return torch.tensor(self.lengths, dtype=torch.int32, device=self.device)

    @cached_property
    def mask(self) -> Tensor:
        """True where a query sees a key."""  # (B, 1, T, S)
        ends = self.row_lengths[:, None]  # (B, 1)
        if self.causal:
            ends = ends - torch.arange(self.queries - 1, -1, -1, device=self.device)  # (B, T)
        return (torch.arange(self.keys, device=self.device) < ends[..., None])[:, None]


def attention(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    """Softmax attention, scale 1 / sqrt(D); query head h uses key head h // (H // kv_heads).

    q (B, H, T, D); k, v (B, kv_heads, S, D) with S = `visible.keys` -> (B, H, T, D), in the dtype of q.
    Float32 stays float32.
    """
    if flash_fits(q):
        return _flash(q, k, v, visible)
    if visible.unmasked:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    if visible.causal and visible.square:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=visible.mask, enable_gqa=True)


def flash_fits(q: Tensor) -> bool:
    """Whether flash-attn is there and takes queries of this kind (..., D)."""
    half = q.dtype in (torch.float16, torch.bfloat16)
    return FLASH_INSTALLED and q.is_cuda and half and q.shape[-1] <= FLASH_MAX_HEAD_DIM


def _flash(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_with_kvcache

    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))  # (B, T or S, heads, D); only D must be contiguous
    if visible.uniform:  # differentiable; causal aligns the last query with the last key, as Visible does
        return flash_attn_func(q, k, v, causal=visible.causal).transpose(1, 2)
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=visible.row_lengths, causal=visible.causal).transpose(1, 2)


def decode_in_pages(queries: Tensor, keys_values: Tensor, pages: Tensor, lengths: Tensor, table: Tensor) -> Tensor:
    """One position of each of B rows by flash-attn: its key and value are stored, its queries see the row so far.

    queries (B, kv_heads, group, D), keys_values (B, 2, kv_heads, D), pages (2, pages, positions, kv_heads, D), lengths
    (B,) int32 before this position, table (B, n) int32 of each row's pages -> (B, heads x D).
    """
    from flash_attn import flash_attn_with_kvcache

    keys, values = keys_values[:, None].unbind(2)  # (B, 1, kv_heads, D)
    mixed = flash_attn_with_kvcache(
        queries.flatten(1, 2)[:, None],
        *pages,
        keys,
        values,
        cache_seqlens=lengths,
        block_table=table,
        causal=True,
    )
    return mixed.flatten(1)
