"""Weight-only quantisation: what is quantised and what is not, what it frees; the engine against its plain twin."""

import builtins
import dataclasses
import sys

import pytest
import torch

from kimia.errors import ParameterError
from kimia.model.engine import Engine
from kimia.model.fused import FusedLM, QuantizedMatrix, Wanted, fuse
from kimia.model.generate import generate
from kimia.model.lm import DualTrackLM, load_lm, stack
from kimia.model.quantize import INSTALL, SCHEMES, check_scheme, quantize, weight_bytes
from tests.model.test_engine import PROMPT, begun, ids, options, run
from tests.model.tiny_lm import TOKENS, WIDE, random_lm

pytestmark = pytest.mark.unit

EVERY = pytest.mark.parametrize("scheme", SCHEMES)
STEP = {"int8": 1 / 127, "fp8": 1 / 14}  # between neighbouring numbers, of the largest one of a row
MATRICES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MATRICES += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def quantized_lm(scheme: str, config=WIDE) -> DualTrackLM:
    lm = random_lm(config, seed=3)
    quantize(lm, scheme)
    return lm


def alone(engine: Engine, seed: int) -> list[tuple[int, int]]:
    [steps] = run(engine, [begun(engine, seed=seed)])
    return ids(steps)


def is_plain(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, torch.nn.Parameter)


@EVERY
def test_the_matrices_of_all_layers_and_both_heads_are_quantised_and_nothing_else(scheme) -> None:
    lm, before = quantized_lm(scheme), random_lm(WIDE, seed=3).state_dict()
    layers = [f"model.layers.{n}" for n in range(4)] + [f"model.mimo_layers.{n}" for n in range(2)]
    wanted = {f"{layer}.{name}.weight" for layer in layers for name in MATRICES}
    wanted |= {"lm_head.weight", "mimo_output.weight"}
    assert {name for name, weight in lm.named_parameters() if not is_plain(weight)} == wanted
    for name, weight in lm.named_parameters():
        if name not in wanted:
            assert torch.equal(weight, before[name]), name
            continue
        near = weight.dequantize()
        assert near.shape == before[name].shape
        error = (near - before[name]).abs() / before[name].abs().amax(dim=1, keepdim=True)
        assert 0 < error.max() <= STEP[scheme] / 2 * 1.001, name


@EVERY
def test_matrices_that_are_fused_hold_the_numbers_that_each_would_hold_alone(scheme) -> None:
    lm, other = quantized_lm(scheme), random_lm(WIDE, seed=3)
    attention, alone_of = lm.model.layers[0].self_attn, other.model.layers[0].self_attn
    whole = fuse(attention.q_proj, attention.k_proj, attention.v_proj).dequantize()
    parts = [part.weight.dequantize() for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    assert torch.equal(whole, torch.cat(parts))
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    kind = Int8WeightOnlyConfig if scheme == "int8" else Float8WeightOnlyConfig
    quantize_(alone_of.k_proj, kind(set_inductor_config=False))
    assert torch.equal(alone_of.k_proj.weight.dequantize(), parts[1])


@EVERY
def test_memory_really_falls(scheme) -> None:
    """To one byte a weight and four a row, of what is quantised; nothing is held twice."""
    config = dataclasses.replace(WIDE, hidden_size=192, intermediate_size=384)
    before, lm = random_lm(config), quantized_lm(scheme, config)
    names = {name for name, weight in lm.named_parameters() if not is_plain(weight)}
    matrices = [weight for name, weight in before.named_parameters() if name in names]
    saved = sum(3 * weight.numel() for weight in matrices)
    scales = sum(4 * len(weight) for weight in matrices)
    zero_points = sum(len(weight) for weight in matrices) if scheme == "int8" else 0
    assert weight_bytes(before) - weight_bytes(lm) == saved - scales - zero_points
    FusedLM(lm, 2)  # the decode step's matrices are the same memory
    assert weight_bytes(before) - weight_bytes(lm) == saved - scales - zero_points


@EVERY
def test_the_decode_step_multiplies_by_what_is_quantised(scheme) -> None:
    lm = quantized_lm(scheme)
    fused, first = FusedLM(lm, 2), lm.model.layers[0].self_attn
    layer = fused._trunk[0]
    for product in (layer.qkv, layer.gate_up, layer.out, layer.down, fused._heads[0]._matrix, fused._heads[1]._matrix):
        assert isinstance(product, QuantizedMatrix)
        assert not is_plain(product._weight)
    numbers = [weight.qdata.untyped_storage().data_ptr() for weight in (layer.qkv._weight, first.k_proj.weight)]
    assert numbers[0] == numbers[1]  # held once


@EVERY
@pytest.mark.parametrize("rows", [1, 5])
def test_the_engine_draws_what_its_plain_twin_draws(scheme, rows) -> None:
    lm = quantized_lm(scheme)
    for seed in range(3):
        twin = ids(list(generate(lm, PROMPT, TOKENS, options(seed=seed))))
        assert alone(Engine(lm, rows), seed) == twin


@EVERY
def test_logits_of_the_engine_are_those_of_the_quantised_network_and_not_of_the_other(scheme) -> None:
    lm = quantized_lm(scheme)
    engine = Engine(lm, rows=5)
    text, audio = engine._fused.step([begun(engine).feed()], Wanted(text=True, audio=True))
    for network, is_it in ((lm, True), (random_lm(WIDE, seed=3), False)):
        expected = network(stack([PROMPT], lm.device))
        assert torch.allclose(text[0], expected.text_logits[0, -1], atol=5e-5, rtol=0) is is_it
        assert torch.allclose(audio[0], expected.audio_logits[0, -1], atol=5e-5, rtol=0) is is_it


@EVERY
def test_neighbours_change_nothing(scheme) -> None:
    engine = Engine(quantized_lm(scheme), rows=5)
    by_itself = [alone(engine, seed) for seed in range(5)]
    together = run(engine, [begun(engine, seed=seed) for seed in range(5)])
    assert [ids(steps) for steps in together] == by_itself
    assert run(engine, [begun(engine, seed=3), begun(engine, seed=0)])[1] == together[0]  # in another row


def test_text_only_has_one_head(tiny) -> None:
    lm = load_lm(tiny, device="cpu", dtype=torch.float32, text_only=True, quantize="int8")
    assert not is_plain(lm.lm_head.weight)
    assert not hasattr(lm, "mimo_output")


def test_half_precision_computes_in_its_own_type() -> None:
    lm = random_lm(WIDE, seed=3).to(torch.bfloat16)
    quantize(lm, "int8")
    assert len(alone(Engine(lm, 2), 5)) > 1
    assert lm.like.dtype is lm.lm_head.weight.dtype is torch.bfloat16


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("none", [None, ""])
def test_none_is_none(none) -> None:
    assert check_scheme(none, "cpu") is None


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(ParameterError, match="quantize must be one of int8, fp8, got 'int4'"):
        check_scheme("int4", "cpu")


@pytest.mark.parametrize(("capability", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False)])
def test_fp8_needs_a_gpu_that_has_it(capability, refused, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Something")
    assert check_scheme("int8", "cuda") == "int8"
    if refused:
        with pytest.raises(ParameterError, match="NVIDIA Something is older; use int8"):
            check_scheme("fp8", "cuda")
    else:
        assert check_scheme("fp8", "cuda") == "fp8"


def test_a_missing_library_says_what_to_install_before_anything_is_read(tmp_path, monkeypatch) -> None:
    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("torchao"):
            raise ModuleNotFoundError("No module named 'torchao'")
        return real(name, *rest)

    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ParameterError) as caught:
        load_lm(tmp_path / "nothing", device="cpu", dtype=torch.float32, quantize="int8")
    assert INSTALL in str(caught.value)


def test_no_switch_of_the_process_is_touched() -> None:
    before = torch.get_float32_matmul_precision()
    quantized_lm("int8")
    assert torch.get_float32_matmul_precision() == before
