"""The cost model against published numbers and against an operation count of the real networks."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from kimia.model import cost
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import open_checkpoint
from kimia.model.checkpoint_presets import PRESETS
from kimia.model.consistency import read_configs
from kimia.model.cost import Cost, Device, FlowChunk, Step
from kimia.model.dit import load_dit
from kimia.model.lm import Row, load_lm, stack
from kimia.model.random_weights import preset_configs
from kimia.model.vq import load_vq
from kimia.model.whisper import load_whisper

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
BF16 = 2


@pytest.fixture(scope="module")
def released():
    return preset_configs(PRESETS["7b"])


def flow_tflop_per_second(config, **change):
    steady = replace(FlowChunk(frames=168, committed=120, evaluations=29, prefix=900), **change)
    return cost.flow_chunk(config, steady, BF16).flop / 2.4 / 1e12  # 120 frames are 2.4 s


def test_flow_model_as_released(released):
    assert flow_tflop_per_second(released.flow, frames_per_modulation=1) == pytest.approx(6.7, abs=0.05)
    assert flow_tflop_per_second(released.flow) == pytest.approx(5.1, abs=0.05)
    first = FlowChunk(frames=120, committed=72, evaluations=29, prefix=0, frames_per_modulation=1)
    assert cost.flow_chunk(released.flow, first, BF16).flop == pytest.approx(11e12, rel=0.01)


def test_weights_of_the_flow_model_are_read_once_per_evaluation(released):
    chunk = FlowChunk(frames=168, committed=0, evaluations=29, prefix=0)
    assert cost.flow_chunk(released.flow, chunk, BF16).bytes == pytest.approx(29 * 3.1e9, rel=0.02)
    committing = cost.flow_chunk(released.flow, replace(chunk, committed=120), BF16)
    assert committing.bytes == pytest.approx(30 * 3.1e9, rel=0.02)


def test_vocoder_as_released(released):
    assert cost.vocoder_chunk(released.vocoder, 50, 4).flop == pytest.approx(0.17e12, rel=0.02)


def test_whisper_as_released(released):
    assert cost.whisper_segment(released.whisper, BF16).flop == pytest.approx(2.3e12, rel=0.02)


def test_savings_of_a_decode_step(released):
    full = cost.decode_step(released.lm, 0, BF16)
    assert full.bytes == pytest.approx(2 * 9.13e9, rel=0.001)
    assert cost.decode_step(released.lm, 0, BF16, Step.SPEECH).bytes / full.bytes == pytest.approx(0.78, abs=0.005)
    assert cost.decode_step(released.lm, 0, BF16, Step.TEXT).bytes / full.bytes == pytest.approx(0.78, abs=0.005)
    assert cost.decode_step(released.lm, 0, BF16, Step.DELAY).bytes / full.bytes == pytest.approx(0.934, abs=0.005)


def test_a_context_adds_its_cache(released):
    without, with_context = (cost.decode_step(released.lm, context, BF16).bytes for context in (0, 1000))
    assert with_context - without == 1000 * cost.kv_bytes_per_position(released.lm, BF16)
    assert cost.kv_bytes_per_position(released.lm, BF16) == 2 * 34 * 4 * 128 * 2


def test_parameter_counts(released):
    counts = cost.parameter_counts(released)
    assert counts["language model"] == 9_766_334_464
    assert set(counts) == {"language model", "whisper encoder", "vq tokenizer", "flow matching", "vocoder"}
    assert "vocoder" not in cost.parameter_counts(replace(released, flow=None, vocoder=None))


def test_floor_is_the_slower_of_both():
    device = Device(flop_per_second=100.0, bytes_per_second=10.0)
    assert device.floor_seconds(Cost(flop=50, bytes=1)) == 0.5
    assert device.floor_seconds(Cost(flop=50, bytes=20)) == 2.0
    assert Cost(1, 2) + Cost(3, 4) == Cost(4, 6)
    assert Cost(1, 2) * 3 == Cost(3, 6)


# ---- against torch's own count of the networks ----


@pytest.fixture(scope="module")
def small(tiny):
    checkpoint = open_checkpoint(tiny)
    return checkpoint, read_configs(checkpoint)


def counted(run):
    plain_attention = sdpa_kernel(SDPBackend.MATH)  # torch does not count the fused one on the CPU
    with torch.inference_mode(), plain_attention, FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_language_model_operations(small):
    checkpoint, configs = small
    lm = load_lm(checkpoint.root, device=CPU, dtype=torch.float32)
    row = Row([5] * 20, [7] * 20, [(3, 9)], [torch.zeros(9, configs.lm.adaptor_input_dim)])
    flop = counted(lambda: lm(stack([row], CPU)))
    heads = 2 * configs.lm.vocab_size * configs.lm.hidden_size
    all_logits = 2 * heads * 19  # the forward pass gives logits of every position
    layers = configs.lm.layers + configs.lm.mimo_layers
    upper_triangle = 2 * 2 * configs.lm.hidden_size * layers * (20 * 20 - 20 * 21 / 2)  # masked, but computed here
    expected = cost.prefill(configs.lm, 20, 9, BF16).flop + all_logits + upper_triangle
    assert flop == pytest.approx(expected, rel=3e-3)  # the model counts biases and norms like weights


def test_flow_operations(small):
    checkpoint, configs = small
    dit = load_dit(checkpoint.flow, CPU, torch.float32)
    tokens = torch.arange(6)[None]

    def run():
        chunk = dit.chunk(tokens, 4, 0, dit.empty_prefix())
        dit(torch.zeros(1, 24, configs.flow.mel_bins), dit.embed_times((1,)), chunk)

    expected = cost.flow_chunk(configs.flow, FlowChunk(frames=24, committed=0, evaluations=1, prefix=0), BF16).flop
    assert counted(run) == pytest.approx(expected, rel=0.02)  # the time embedding is not counted


def test_vocoder_operations(small):
    checkpoint, configs = small
    vocoder = load_vocoder(checkpoint.vocoder, CPU, torch.float32)
    mel = torch.zeros(1, configs.vocoder.mel_bins, 10)
    expected = cost.vocoder_chunk(configs.vocoder, 10, 4).flop
    assert expected == pytest.approx(counted(lambda: _convolutions_only(vocoder, mel)), rel=0.01)


def _convolutions_only(vocoder, mel):
    """The vocoder's forward with the activations (whose filters are left out of the model) made trivial."""
    for module in vocoder.modules():
        if hasattr(module, "downsample"):
            module.forward = lambda x: x
    vocoder(mel)


def test_whisper_operations(small):
    checkpoint, configs = small
    whisper = load_whisper(checkpoint.whisper, 4, CPU, torch.float32)
    mel = torch.zeros(1, configs.whisper.mel_bins, 2 * configs.whisper.max_positions)
    assert counted(lambda: whisper.encoder(mel)) == pytest.approx(
        cost.whisper_segment(configs.whisper, BF16).flop, rel=0.01
    )


def test_vq_weights(small):
    checkpoint, configs = small
    vq = load_vq(checkpoint.vq_tokenizer, CPU)
    used = sum(parameter.numel() for name, parameter in vq.named_parameters() if "embed_positions" not in name)
    assert cost.vq_segment(configs.vq, 1500, 4).bytes == pytest.approx(4 * used, rel=0.02)  # norms and biases aside
