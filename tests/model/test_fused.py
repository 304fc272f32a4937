"""The operations of the fused step against the plain ones."""

import dataclasses

import pytest
import torch
from torch import nn

from kimia.model import lm as plain
from kimia.model.fused import FEW_ROWS, FusedLM, Head, Norm, Scratch, fuse, matrix, rotate, signed_angles
from tests.model.tiny_lm import CONFIG, random_lm

pytestmark = pytest.mark.unit

ROWS = pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 16])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def scratch(rows: int, dtype: torch.dtype = torch.float32) -> Scratch:
    made = Scratch(CONFIG, rows, torch.empty(0, dtype=dtype))
    made.x.normal_(0, 5, generator=torch.Generator().manual_seed(rows))
    return made


def test_parts_become_views_of_the_whole_and_are_fused_once():
    parts = [nn.Linear(6, width) for width in (4, 2, 2)]
    before = [part(torch.ones(6)) for part in parts]
    whole = fuse(*parts)
    assert fuse(*parts) is whole
    assert all(part.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
    torch.testing.assert_close(torch.cat([part(torch.ones(6)) for part in parts]), torch.cat(before), atol=0, rtol=0)


def test_two_engines_over_one_model_share_its_weights():
    lm = random_lm()
    first, second = FusedLM(lm, 1), FusedLM(lm, 4)
    for one, other in zip(first._trunk, second._trunk, strict=True):
        assert one.qkv._weight.data_ptr() == other.qkv._weight.data_ptr()


@ROWS
@torch.no_grad()
def test_a_product_is_added(rows):
    s = scratch(rows)
    x, weight = torch.randn(rows, 7), torch.randn(CONFIG.hidden_size, 7)
    expected = s.x + x @ weight.t()
    matrix(weight).add_product(s, x)
    torch.testing.assert_close(s.x, expected)


@ROWS
@DTYPES
@torch.no_grad()
def test_norm_and_head(rows, dtype):
    norm, head = (
        plain.RMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps).to(dtype),
        nn.Linear(CONFIG.hidden_size, 61, bias=False),
    )
    norm.weight.data = torch.linspace(-2, 2, CONFIG.hidden_size).to(dtype)
    s, head = scratch(rows, dtype), head.to(dtype)
    Norm(norm)(s)
    torch.testing.assert_close(s.operand, norm(s.x))
    Head(norm, head)(s, s.logits[1])
    torch.testing.assert_close(s.logits[1], head(norm(s.x)), atol=1e-5 if dtype is torch.float32 else 1e-2, rtol=0.02)


@ROWS
@DTYPES
@torch.no_grad()
def test_rotation(rows, dtype):
    s = scratch(rows, dtype)
    s.qkv.normal_(generator=torch.Generator().manual_seed(0))
    positions = torch.arange(rows)[:, None] * 7
    config = dataclasses.replace(CONFIG, max_positions=200)
    s.angles.copy_(signed_angles(config, torch.device("cpu"))[positions[:, 0]])
    given = s.qkv.clone().view(rows, -1, 1, CONFIG.head_dim)  # (B, heads, 1, D)
    rotate(s)
    cos, sin = plain.rotary_tables(positions, CONFIG.head_dim, CONFIG.rope_theta)
    turned = plain.rotate(given[:, : -CONFIG.kv_heads], cos, sin)[:, :, 0]
    for row in range(rows):
        torch.testing.assert_close(s.queries[row].reshape(-1), turned[row, : CONFIG.heads].reshape(-1))
        torch.testing.assert_close(s.keys_values[row, 0], turned[row, CONFIG.heads :])
        torch.testing.assert_close(s.keys_values[row, 1], given[row, -CONFIG.kv_heads :, 0], atol=0, rtol=0)


def test_rows_without_a_turn_have_zeros():
    s = scratch(4)
    s.fill([(1, 2, 3)] * 4)
    s.fill([(5, 6, 7)])
    assert s.numbers.tolist() == [[5, 0, 0, 0], [6, 0, 0, 0], [7, 0, 0, 0]]
