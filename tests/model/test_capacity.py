"""The arithmetic of a plan, against numbers worked out by hand."""

import json
from dataclasses import replace

import pytest

from kimia.errors import ConfigError, ParameterError
from kimia.model.capacity import CHUNK_SECONDS, LOAD, Floors, Measured, Traffic, check_host, host_bytes, plan
from kimia.model.checkpoint_presets import PRESETS
from kimia.model.gpus import find_gpu
from kimia.model.random_weights import preset_configs

pytestmark = pytest.mark.unit

H200 = find_gpu("h200")
PROFILE = {
    "device": "some GPU",
    "encode": {"ms": 10},
    "prefill": {"ms_per_1000_positions": 20},
    "decode": {"1": {"ms": 4}, "64": {"ms": 10.3}},
    "speak": {"1": {"ms": 40}, "8": {"ms": 160}},
}


@pytest.fixture(scope="module")
def released():
    return preset_configs(PRESETS["7b"])


def stages(traffic, released, times, gpu=H200):
    return {stage.stage: stage for stage in plan(traffic, released, gpu, times)}


def test_floors_are_those_of_the_cost_model(released) -> None:
    floors = Floors(released, H200, over=1.0)
    assert floors.decode(1, 100) == pytest.approx(18.3e9 / 4.8e12, rel=0.02)  # bytes of the weights / bandwidth
    kv = 2 * released.lm.kv_heads * released.lm.head_dim * (released.lm.layers + released.lm.mimo_layers) * 2
    assert floors.decode(65, 4000) - floors.decode(1, 4000) == pytest.approx(64 * 4000 * kv / 4.8e12, rel=1e-6)
    assert floors.speak(8) < 8 * floors.speak(1)  # weights are read once
    assert floors.prefill(2000) == pytest.approx(2 * floors.prefill(1000), rel=0.05)  # bound by operations
    assert Floors(released, H200, over=2.0).decode(1, 100) == pytest.approx(2 * floors.decode(1, 100))
    assert floors.encode(31) == pytest.approx(2 * floors.encode(30), rel=0.01)


def test_a_measured_profile_is_interpolated_and_never_extended(released) -> None:
    times = Measured(PROFILE, "here")
    assert times.decode(1, 0) == pytest.approx(4e-3)
    assert times.decode(33, 0) == pytest.approx((4 + 6.3 * 32 / 63) * 1e-3)
    assert times.decode(65, 0) == float("inf")
    assert times.encode(61) == pytest.approx(30e-3)
    found = stages(Traffic(200), released, times)
    assert found["llm"].replicas == 2  # 90 rows, of which one takes 64 at most
    assert found["llm"].rows == 45


def test_replicas_keep_up_with_the_work_of_a_second(released) -> None:
    traffic = Traffic(1000, speech_share=0.5, turns_per_minute=6, prompt=1000)
    found = stages(traffic, released, Measured(PROFILE, "here"))
    assert found["tokenizer"].replicas == 2  # 100 turns/s x 10 ms = 1 s / 0.8
    chunks = 500 / CHUNK_SECONDS * 0.020  # eight in 160 ms
    assert found["detokenizer"].replicas == -(-chunks // LOAD)
    assert "100.0 turns/s" in found["tokenizer"].why[0]
    assert "500 of 1000 calls" in found["llm"].why[0]


def test_more_calls_never_need_less(released) -> None:
    floors = Floors(released, H200)
    needed = [sum(s.replicas for s in plan(Traffic(calls), released, H200, floors)) for calls in (1, 50, 200, 1000)]
    assert needed[0] == 3
    assert needed == sorted(needed)
    reused = stages(Traffic(1000, reuse=0.9), released, floors)["llm"].replicas
    assert reused < stages(Traffic(1000), released, floors)["llm"].replicas


def test_memory_that_does_not_suffice(released) -> None:
    small = replace(H200, name="small", memory_bytes=20e9)
    with pytest.raises(ParameterError, match=r"language model: memory: weights 19\.53 GB .* do not fit the 18\.00 GB"):
        plan(Traffic(1), released, small, Floors(released, small))
    tight = replace(H200, name="tight", memory_bytes=24e9)  # room for a dozen calls
    found = stages(Traffic(60), released, Floors(released, tight), tight)["llm"]
    assert found.replicas > 1
    assert "do not fit" in found.why[-1]


def test_quantised_weights_leave_more_room_and_take_no_less_time(released) -> None:
    plain, small = (
        plan(Traffic(200), released, H200, Floors(released, H200), quantized=each)[1] for each in (False, True)
    )
    assert "weights 19.53 GB" in plain.why[2]
    assert "weights 10.40 GB" in small.why[2]  # 9.13 billion in a byte, 0.64 billion in two
    assert small.why[1] == plain.why[1]
    tight = replace(H200, name="tight", memory_bytes=20e9)  # too small for the others
    assert plan(Traffic(20), released, tight, Floors(released, tight), quantized=True)[1].replicas == 1


def test_too_slow_for_one_call(released) -> None:
    slow = replace(H200, name="slow", bytes_per_second=1e11)
    with pytest.raises(ParameterError, match="does not keep up with a single call"):
        plan(Traffic(1), released, slow, Floors(released, slow))


@pytest.mark.parametrize(
    "wrong",
    [{"calls": 0}, {"speech_share": 0}, {"speech_share": 1.1}, {"turns_per_minute": 0}, {"prompt": 0}, {"reuse": 1}],
)
def test_calls_that_do_not_exist(wrong) -> None:
    with pytest.raises(ParameterError, match="no call is like this"):
        Traffic(**{"calls": 1, **wrong})


@pytest.mark.parametrize(
    "content",
    [
        "nonsense",
        "[]",
        "{}",
        json.dumps(PROFILE | {"decode": {}}),
        json.dumps(PROFILE | {"speak": {"1": {"ms": None}}}),
    ],
)
def test_profiles_that_are_none(content, tmp_path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"gpu\.sh|cannot be parsed"):
        Measured.read(path)


# ---- all stages on one GPU --------------------------------------------------------------------------------------

ROWS = {"tokenizer": 4, "llm": 16, "detokenizer": 4}


def test_what_a_host_may_take_is_the_sum_of_its_stages(released) -> None:
    needed = host_bytes(released, ROWS)
    alone = host_bytes(released, dict.fromkeys(ROWS, 0))
    assert sum(alone.values()) == pytest.approx(26.3e9, rel=0.01)  # the weights, as README has it
    kv = 2 * released.lm.kv_heads * released.lm.head_dim * (released.lm.layers + released.lm.mimo_layers) * 2
    assert needed["llm"] - alone["llm"] == pytest.approx(16 * released.lm.max_positions * kv)
    assert needed["detokenizer"] > alone["detokenizer"]
    assert needed["tokenizer"] == alone["tokenizer"]
    assert host_bytes(released, ROWS, kept=10**9)["llm"] == alone["llm"] + 10**9
    assert host_bytes(released, ROWS, kept=0, quantized=True)["llm"] < 0.7 * alone["llm"]


def test_a_host_that_does_not_fit_is_refused_with_the_arithmetic(released) -> None:
    needed = host_bytes(released, ROWS)
    room = sum(needed.values())
    check_host(needed, 1.12 * room)
    with pytest.raises(ParameterError, match=r"tokenizer .* GB \+ llm .* GB \+ detokenizer .* GB do not fit"):
        check_host(needed, 1.1 * room)  # a tenth of it is for all else
    check_host(host_bytes(released, {**ROWS, "llm": 1}), 1.1 * room)
