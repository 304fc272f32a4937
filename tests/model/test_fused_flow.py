"""One evaluation in fewer operations against the plain layers."""

from dataclasses import replace

import pytest
import torch

from kimia.model.dit import DiT, Packed
from kimia.model.fused_flow import FusedDiT
from tests.model.tiny_detokenizer import FLOW, random_dit

pytestmark = pytest.mark.parity

CONFIGS = {
    "rope": FLOW,
    "learnable": replace(FLOW, position_embedding="learnable"),
    "sincos": replace(FLOW, position_embedding="sincos", use_rope=False),
}
TIMES = (34, 620, 999)


def x(frames: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(frames, FLOW.mel_bins, generator=torch.Generator().manual_seed(seed))


def chunk(dit: DiT, tokens: list[int], start: int = 9):
    """Behind five frames of noise."""
    noise = torch.randn(2, FLOW.depth, 1, FLOW.heads, 5, FLOW.head_dim, generator=torch.Generator().manual_seed(start))
    prefix = replace(dit.empty_prefix(), keys=noise[0].to(dit.dtype), values=noise[1].to(dit.dtype))
    return dit.chunk(torch.tensor([tokens]), 4, start, prefix)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
def test_it_is_the_plain_field(config, dtype, error):
    """Velocities, keys and values, of every time step in one product of modulations."""
    dit = random_dit(config).to(dtype)
    fused, plain, fast = FusedDiT(dit), chunk(dit, [4, 9, 4]), chunk(dit, [4, 9, 4])
    times = dit.embed_times(TIMES)
    for step, modulation in enumerate(fused.modulate(times[:, None], fast.tokens[0])):
        expected = dit(x(12)[None], times[step : step + 1], plain)[0]
        got = fused(x(12), modulation, fast)
        torch.testing.assert_close(got, expected, atol=error, rtol=error)
        torch.testing.assert_close(fast.cache.keys, plain.cache.keys, atol=error, rtol=error)
        torch.testing.assert_close(fast.cache.values, plain.cache.values, atol=error, rtol=error)
    assert expected.abs().max() > 0.5


def test_packed_chunks_are_the_plain_ones():
    dit = random_dit()
    fused, times = FusedDiT(dit), dit.embed_times(TIMES)
    chunks = [chunk(dit, [4, 9, 4]), chunk(dit, [1, 2], start=30)]
    places = torch.cat([times[:1].expand(3, -1), times[1:2].expand(2, -1)])
    packed = Packed(chunks)
    got = fused(torch.cat([x(12), x(8, 6)]), fused.modulate(places[None], packed.tokens[0])[0], packed)
    expected = [dit(x(12)[None], times[:1], chunks[0])[0], dit(x(8, 6)[None], times[1:2], chunks[1])[0]]
    torch.testing.assert_close(got, torch.cat(expected), atol=1e-5, rtol=0)


def test_no_weight_is_stored_twice():
    dit = random_dit()
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    FusedDiT(dit)
    FusedDiT(dit)  # again: nothing changes any more
    layers = [block.adaLN_modulation[1].weight for block in dit.blocks] + [dit.final_layer.adaLN_modulation[1].weight]
    assert len({layer.untyped_storage().data_ptr() for layer in layers}) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
