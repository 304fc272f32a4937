"""The operations of the fused step against the plain ones."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kimia.model import lm as plain
from kimia.model.fused import FEW_ROWS, FusedLM, fuse, linear, norm, rotate
from tests.model.tiny_lm import random_lm

pytestmark = pytest.mark.unit


def test_parts_become_views_of_the_whole_and_are_fused_once():
    parts = [nn.Linear(6, width) for width in (4, 2, 2)]
    before = [part(torch.ones(6)) for part in parts]
    whole, bias = fuse(*parts)
    again, _ = fuse(*parts)
    assert again is whole
    assert bias.shape == (8,)
    assert all(part.weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() for part in parts)
    torch.testing.assert_close(torch.cat([part(torch.ones(6)) for part in parts]), torch.cat(before), atol=0, rtol=0)


def test_two_engines_over_one_model_share_its_weights():
    lm = random_lm()
    first, second = FusedLM(lm, 1), FusedLM(lm, 4)
    assert all(one.qkv is other.qkv for one, other in zip(first._trunk, second._trunk, strict=True))


@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1, 16])
@pytest.mark.parametrize("bias", [None, torch.arange(5.0)])
def test_products(rows, bias):
    generator = torch.Generator().manual_seed(rows)
    x, weight = torch.randn(rows, 7, generator=generator), torch.randn(5, 7, generator=generator)
    torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype):
    by = plain.RMSNorm(32, 1e-6).to(dtype)
    by.weight.data = torch.linspace(-2, 2, 32).to(dtype)
    x = (torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    with torch.no_grad():
        assert norm(x, by).dtype == dtype
        torch.testing.assert_close(norm(x, by), by(x))


def test_rotation():
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    cos, sin = plain.rotary_tables(torch.tensor([[4], [0], [99]]), 8, 1000.0)  # (3, 1, 1, 8)
    signed = torch.cat([-sin[..., :4], sin[..., 4:]], dim=-1)
    expected = plain.rotate(x[:, :, None], cos, sin)[:, :, 0]
    torch.testing.assert_close(rotate(x, cos[:, 0], signed[:, 0]), expected)
