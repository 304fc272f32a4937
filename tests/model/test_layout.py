"""The tables of names and shapes against real files and against the release's published numbers."""

import pytest

from kimia.model import layout
from kimia.model.checkpoint import (
    ROTARY_LEFTOVER,
    open_checkpoint,
    sharded_source,
    torch_source,
    without,
    without_prefix,
)
from kimia.model.checkpoint_presets import PRESETS
from kimia.model.consistency import read_configs
from kimia.model.random_weights import preset_configs
from tests.golden_data import golden

pytestmark = pytest.mark.parity


def shapes(source):
    return {name: item.shape for name, item in source.items()}


def test_golden_checkpoint_has_exactly_these_tensors():
    checkpoint = open_checkpoint(golden("e2e") / "model")
    configs = read_configs(checkpoint)
    lm = without(sharded_source(checkpoint.root), ROTARY_LEFTOVER.pattern)
    assert shapes(lm) == layout.language_model(configs.lm)
    whisper = without(sharded_source(checkpoint.whisper), r"^model\.decoder\.")
    assert shapes(without_prefix(whisper, "model.encoder.")) == layout.whisper_encoder(configs.whisper)
    vq = layout.vq_tokenizer(configs.vq) | layout.codebook_training_state(configs.vq)
    assert shapes(sharded_source(checkpoint.vq_tokenizer)) == vq
    flow = without(torch_source(checkpoint.flow / "model.pt", "state_dict"), r"^resampler\.")
    assert shapes(without_prefix(flow, layout.FLOW_PREFIX)) == layout.flow(configs.flow)
    vocoder = torch_source(checkpoint.vocoder / "model.pt", "generator")
    assert shapes(vocoder) == layout.weight_normed(layout.vocoder(configs.vocoder))


@pytest.fixture(scope="module")
def released():
    return preset_configs(PRESETS["7b"])


def test_released_parameter_counts(released):
    assert layout.parameters(layout.language_model(released.lm)) == 9_766_334_464
    assert layout.parameters(layout.whisper_encoder(released.whisper)) == 636_968_960
    assert layout.parameters(layout.vq_tokenizer(released.vq)) == 343_599_360
    assert round(layout.parameters(layout.flow(released.flow)) / 1e9, 3) == 1.584
    assert round(layout.parameters(layout.vocoder(released.vocoder)) / 1e6) == 241


def test_released_tensor_counts(released):
    rotary_leftovers = released.lm.layers + released.lm.mimo_layers
    assert len(layout.language_model(released.lm)) + rotary_leftovers == 453
    assert len(layout.whisper_encoder(released.whisper)) == 487
    vq = layout.vq_tokenizer(released.vq) | layout.codebook_training_state(released.vq)
    assert len(vq) == 249
    assert len(layout.weight_normed(layout.vocoder(released.vocoder))) == 1206


def test_released_shapes(released):
    lm = layout.language_model(released.lm)
    assert lm["model.layers.27.self_attn.k_proj.weight"] == (512, 3584)
    assert lm["model.mimo_layers.5.mlp.down_proj.weight"] == (3584, 18944)
    assert lm["model.vq_adaptor.layers.0.weight"] == (3584, 5120)
    assert lm["mimo_output.weight"] == (168448, 3584)
    assert layout.vq_tokenizer(released.vq)["embed_positions2.weight"] == (375, 1280)
    flow = layout.flow(released.flow)
    assert flow["semantic_token_embedding.weight"] == (16385, 2304)
    assert flow["blocks.15.adaLN_modulation.1.weight"] == (6 * 2304, 2304)
    vocoder = layout.vocoder(released.vocoder)
    assert vocoder["ups.0.0.weight"] == (2048, 1024, 9)
    assert vocoder["resblocks.27.convs2.2.weight"] == (16, 16, 11)
    assert vocoder["conv_post.weight"] == (1, 16, 7)
    assert "conv_post.bias" not in vocoder


def test_position_tables_of_the_flow_model(released):
    from dataclasses import replace

    learnable = layout.flow(replace(released.flow, position_embedding="learnable"))
    assert learnable["position_embedding.weight"] == (released.flow.max_seq_len + 1, 2304)
    sincos = layout.flow(replace(released.flow, position_embedding="sincos"))
    assert sincos["position_embedding._float_tensor"] == (1,)
    assert not [name for name in layout.flow(released.flow) if name.startswith("position")]
