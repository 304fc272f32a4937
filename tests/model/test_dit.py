"""The velocity field against golden activations and against its plain formulation."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kimia.errors import WeightsError
from kimia.model.dit import DiT, SinusoidalPosition, load_dit, rotary, rotate, time_sinusoid
from tests.golden_data import golden, golden_json
from tests.model.tiny_detokenizer import FLOW, PlainDiT, random_dit

pytestmark = pytest.mark.parity

TOKENS = [3, 3, 7, 7, 0, 0, 10, 10]


@pytest.fixture(scope="module")
def dit() -> DiT:
    return random_dit()


def mel(frames: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(frames, FLOW.mel_bins, generator=torch.Generator().manual_seed(seed))


def velocity(dit: DiT, x: torch.Tensor, index: int, chunk) -> torch.Tensor:
    return dit(x[None], dit.embed_times((index,)), chunk)[0]


# ---- golden activations -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden_dit() -> DiT:
    return load_dit(golden("detokenizer") / "checkpoint" / "audio_detokenizer", "cpu", torch.float32)


@pytest.fixture(scope="module")
def unit() -> dict[str, torch.Tensor]:
    return load_file(golden("detokenizer") / "unit.safetensors")


@pytest.fixture(scope="module")
def tolerance() -> float:
    return golden_json("detokenizer", "goldens.json")["tolerances_float32"]["dit"]


def test_golden_time(golden_dit, unit, tolerance):
    torch.testing.assert_close(time_sinusoid(unit["time.t"]), unit["time.sinusoid"], atol=tolerance, rtol=0)
    torch.testing.assert_close(golden_dit.t_embedder(unit["time.t"]), unit["time.emb"], atol=tolerance, rtol=0)


def test_golden_velocities(golden_dit, unit, tolerance):
    seen = []
    hook = golden_dit.blocks[0].register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    prefix, found = golden_dit.empty_prefix(), {}
    for case in ("a", "b"):
        start = int(unit[f"dit.{case}.start_position"])
        chunk = golden_dit.chunk(unit[f"dit.{case}.tokens"][None], 1, start, prefix)
        x, index = unit[f"dit.{case}.x"], int(unit[f"dit.{case}.t"])
        found[f"dit.{case}.velocity"] = velocity(golden_dit, x, index, chunk)
        prefix = chunk.cache
    hook.remove()
    frames = found["dit.a.velocity"].shape[0]
    found["dit.a.block0_out"] = seen[0].flatten(0, 2)
    found["dit.a.layer0_k"] = prefix.keys[0, 0, :, :frames].transpose(0, 1)
    found["dit.a.layer0_v"] = prefix.values[0, 0, :, :frames].transpose(0, 1)
    for name, value in found.items():
        torch.testing.assert_close(value, unit[name], atol=tolerance, rtol=0, msg=lambda text, n=name: f"{n}: {text}")


# ---- the plain formulation --------------------------------------------------------------------------------------


def test_velocity_is_the_plain_one(dit):
    got = velocity(dit, mel(8), 344, dit.chunk(torch.tensor([TOKENS]), 1, 7, dit.empty_prefix()))
    expected, _ = PlainDiT(dit)(mel(8), TOKENS, 344, 7)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)
    assert np.abs(expected).max() > 0.5  # or nothing would be tested


def test_velocity_behind_a_prefix_is_the_plain_one(dit):
    plain = PlainDiT(dit)
    first = dit.chunk(torch.tensor([TOKENS]), 1, 7, dit.empty_prefix())
    velocity(dit, mel(8), 999, first)
    second = dit.chunk(torch.tensor([[1, 2, 2]]), 1, 15, first.cache)
    got = velocity(dit, mel(3, seed=6), 20, second)
    _, past = plain(mel(8), TOKENS, 999, 7)
    expected, heard = plain(mel(3, seed=6), [1, 2, 2], 20, 15, past)
    alone, _ = plain(mel(3, seed=6), [1, 2, 2], 20, 15)
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)
    assert np.abs(expected - alone).max() > 1e-2
    np.testing.assert_allclose(second.cache.keys[1, 0, 2].numpy(), heard[1][2][0], atol=2e-5)
    np.testing.assert_allclose(second.cache.values[1, 0, 2].numpy(), heard[1][2][1], atol=2e-5)


def test_without_rope_positions_do_not_count():
    dit = random_dit(replace(FLOW, use_rope=False))
    near, far = (
        velocity(dit, mel(8), 344, dit.chunk(torch.tensor([TOKENS]), 1, start, dit.empty_prefix())) for start in (0, 90)
    )
    torch.testing.assert_close(near, far, atol=0, rtol=0)
    np.testing.assert_allclose(near.numpy(), PlainDiT(dit)(mel(8), TOKENS, 344, 0)[0], atol=2e-5)


def test_modulation_per_token_is_modulation_per_frame(dit):
    """The fast path against its plain twin."""
    prefix = dit.chunk(torch.tensor([TOKENS]), 1, 0, dit.empty_prefix())
    velocity(dit, mel(8), 999, prefix)
    per_token = dit.chunk(torch.tensor([[4, 9, 4]]), 4, 8, prefix.cache)
    per_frame = dit.chunk(torch.tensor([[4, 9, 4]]).repeat_interleave(4, dim=1), 1, 8, prefix.cache)
    fast, plain = velocity(dit, mel(12), 620, per_token), velocity(dit, mel(12), 620, per_frame)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=0)
    torch.testing.assert_close(per_token.cache.keys, per_frame.cache.keys, atol=1e-5, rtol=0)


def test_head_of_a_chunk_is_a_chunk_of_its_own(dit):
    first = dit.chunk(torch.tensor([TOKENS]), 1, 0, dit.empty_prefix())
    velocity(dit, mel(8), 999, first)
    whole = dit.chunk(torch.tensor([[4, 9, 2]]), 2, 8, first.cache)
    short = dit.chunk(torch.tensor([[4, 9]]), 2, 8, first.cache)
    got = velocity(dit, mel(4), 999, whole.head(2))
    torch.testing.assert_close(got, velocity(dit, mel(4), 999, short), atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.cache.span(0, 12).keys, short.cache.keys, atol=1e-6, rtol=0)


def test_prefix_is_never_written(dit):
    first = dit.chunk(torch.tensor([TOKENS]), 1, 0, dit.empty_prefix())
    velocity(dit, mel(8), 999, first)
    keys, values = first.cache.keys.clone(), first.cache.values.clone()
    velocity(dit, mel(4), 30, dit.chunk(torch.tensor([[4, 9]]), 2, 8, first.cache))
    assert torch.equal(first.cache.keys, keys)
    assert torch.equal(first.cache.values, values)


def test_rows_of_a_batch_do_not_meet(dit):
    tokens = torch.tensor([TOKENS, TOKENS[::-1]])
    x = torch.stack([mel(8, seed=1), mel(8, seed=2)])
    both = dit(x, dit.embed_times((10, 700)), dit.chunk(tokens, 1, 0, dit.empty_prefix(batch=2)))
    for row, index in enumerate((10, 700)):
        alone = velocity(dit, x[row], index, dit.chunk(tokens[row : row + 1], 1, 0, dit.empty_prefix()))
        torch.testing.assert_close(both[row], alone, atol=5e-5, rtol=0)


# ---- time and positions -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 34, 999, 1000])
def test_time_sinusoid_has_cosines_first(index):
    found = time_sinusoid(torch.tensor([index]))[0]
    for rank in (0, 1, 64, 127):
        angle = index * 10000 ** (-rank / 128)
        assert found[rank].item() == pytest.approx(math.cos(angle), abs=1e-4)
        assert found[128 + rank].item() == pytest.approx(math.sin(angle), abs=1e-4)


def test_rotation_turns_neighbouring_pairs():
    cos, sin = rotary(replace(FLOW, rope_scale=1.0), start=3, frames=2, device=torch.device("cpu"))
    vector = torch.zeros(2, FLOW.head_dim)
    vector[:, 2] = 1.0  # the first of pair 1
    angle = 4 * FLOW.rope_base ** (-2 / FLOW.head_dim)  # of position 4
    turned = rotate(vector, (cos, sin))[1]
    assert turned[2:4].tolist() == pytest.approx([math.cos(angle), math.sin(angle)], abs=1e-6)
    assert turned[[0, 1, 4, 5]].abs().max() == 0


def test_learnable_positions_are_absolute():
    dit = random_dit(replace(FLOW, position_embedding="learnable", use_rope=False))
    chunk = dit.chunk(torch.tensor([[1, 2]]), 2, 30, dit.empty_prefix())
    assert torch.equal(chunk.position, dit.state_dict()["position_embedding.weight"][30:34])
    moved = dit.chunk(torch.tensor([[1, 2]]), 2, 31, dit.empty_prefix())
    difference = velocity(dit, mel(4), 5, chunk) - velocity(dit, mel(4), 5, moved)
    assert difference.abs().max() > 1e-2


def test_sincos_positions_are_ranks_inside_the_chunk():
    embed = SinusoidalPosition(6)
    late, first = embed(torch.arange(40, 44)), embed(torch.arange(4))
    assert torch.equal(embed(torch.arange(80, 84)), late)
    assert first[0].abs().max() == 0  # position 0 counts as padding
    torch.testing.assert_close(first[1:], late[:3])
    speeds = [1.0, 10000**-0.5, 1e-4]
    expected = [math.sin(2 * speed) for speed in speeds] + [math.cos(2 * speed) for speed in speeds]
    assert late[1].tolist() == pytest.approx(expected, abs=1e-6)


# ---- loading ----------------------------------------------------------------------------------------------------

CONFIG_YAML = """
normalize_mel: true
mel_mean: -1.5
mel_std: 2.0
model:
  dit:
    input_size: 5
    semantic_vocab_size: 11
    hidden_size: 24
    depth: 2
    num_heads: 3
    mlp_ratio: 1.6666667
    ffn_type: vanilla_mlp
    use_rope: true
    rope_params: {max_position_embeddings: 400, rope_base: 50.0, rope_interpolation_factor: 2.0}
    position_embedding_type: POSITION
    max_seq_len: 420
"""


def write_config(folder, position: str = "skip") -> None:
    (folder / "config.yaml").write_text(CONFIG_YAML.replace("POSITION", position))


@pytest.mark.parametrize("position", ["skip", "learnable", "sincos"])
def test_loads_the_released_archive(tmp_path, position):
    write_config(tmp_path, position)
    stored = random_dit(replace(FLOW, position_embedding=position)).state_dict()
    archive = {f"speech_model.{name}": tensor for name, tensor in stored.items()}
    torch.save({"state_dict": archive | {"resampler.kernel": torch.zeros(1, 1, 16)}}, tmp_path / "model.pt")
    loaded = load_dit(tmp_path, "cpu", torch.float32)
    assert loaded.config == replace(FLOW, position_embedding=position)
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in stored.items())


def test_prefers_the_converted_file(tmp_path, dit):
    write_config(tmp_path)
    (tmp_path / "model.pt").write_bytes(b"not opened")
    save_file({name: tensor.half() for name, tensor in dit.state_dict().items()}, tmp_path / "model.safetensors")
    loaded = load_dit(tmp_path, "cpu", torch.float32)
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded.input_linear.weight, dit.input_linear.weight, atol=1e-3, rtol=1e-3)


def test_refuses_an_archive_of_another_shape(tmp_path, dit):
    write_config(tmp_path)
    archive = {f"speech_model.{name}": tensor for name, tensor in dit.state_dict().items()}
    del archive["speech_model.blocks.1.attn.proj.bias"]
    torch.save({"state_dict": archive}, tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=r"missing: blocks\.1\.attn\.proj\.bias"):
        load_dit(tmp_path, "cpu", torch.float32)
