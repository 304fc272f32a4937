"""Semantic codes: against the golden set, against a plain formulation for every legal config, in company and alone."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kimia.errors import AudioError, ConfigError, WeightsError
from kimia.model import vq
from kimia.model.checkpoint import load_strict
from kimia.model.config import VQConfig
from kimia.model.vq import VQTokenizer, load_vq, pool, visible
from tests.model import recordings
from tests.model.in_memory import in_memory
from tests.model.plain_encoder import (
    ENCODER,
    FEATURES,
    layer_weights,
    nearest,
    pooled,
    speech_like,
    vq_json,
    vq_mask,
    vq_states,
    vq_weights,
    write_folder,
)

pytestmark = pytest.mark.parity

RELEASE = VQConfig(
    encoder=ENCODER,
    pooling_kernel=4,
    pooling_type="avg",
    pooling_position=2,
    quantize_position=2,
    codebook_size=50,
    block_size=8,
    causal_convolution=True,
    causal_attention=False,
)
VARIANTS = {
    "release": RELEASE,
    "max": replace(RELEASE, pooling_type="max"),
    "kernel 2, then layers": replace(RELEASE, pooling_kernel=2, pooling_position=1, quantize_position=3, block_size=10),
    "kernel 3, then layers": replace(RELEASE, pooling_kernel=3, pooling_position=1, quantize_position=3, block_size=9),
    "unequal blocks, then layers": replace(RELEASE, pooling_position=1, quantize_position=3, block_size=11),
    "max, then layers": replace(RELEASE, pooling_type="max", pooling_position=1, quantize_position=4),
    "kernel 8 of 100 frames": replace(RELEASE, pooling_kernel=8),
    "no pooling": replace(RELEASE, pooling_kernel=1),
    "blocks shorter than the kernel, then no layer": replace(RELEASE, block_size=3),
    "no blocks": replace(RELEASE, block_size=None),
    "no blocks, then layers": replace(RELEASE, block_size=None, pooling_position=1),
    "plain convolution": replace(RELEASE, causal_convolution=False),
    "plain convolution, no blocks": replace(RELEASE, causal_convolution=False, block_size=None),
    "causal attention": replace(RELEASE, causal_attention=True, pooling_position=1),
    "4 heads, relu": replace(RELEASE, encoder=replace(ENCODER, heads=4, activation="relu")),
}
LENGTHS = [5000, 67000, 1, 1281, 319, 32000, 320, 20001, 1280, 32001]  # unsorted: batches are formed by length

variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)


def build(config=RELEASE, weights=None):
    module = VQTokenizer(config, FEATURES)
    source = {name: in_memory(tensor) for name, tensor in (weights or vq_weights(config)).items()}
    load_strict(module, source, "test", device="cpu", dtype=torch.float32)
    return module


# ---- golden ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released():
    loaded = {}

    def load(name):
        folder = recordings.vq_folder(name)
        if folder not in loaded:
            loaded[folder] = load_vq(folder, "cpu")
        return loaded[folder]

    return load


@pytest.mark.parametrize("name", recordings.CASES)
def test_golden_codes_and_states(name, released):
    values, arrays = recordings.expected(name)
    module = released(name)
    wave = recordings.waveform(name)
    [codes], [hidden] = module.encode([wave]), module.hidden([wave])
    assert codes.tolist() == values["token_ids"]
    np.testing.assert_allclose(hidden, arrays["prequant"], atol=5e-5, rtol=0)
    segments = list(module.trace(wave))
    for key, stored in arrays.items():
        if key.startswith("vq_mel_s"):
            segment, start, stop = (int(part) for part in key.removeprefix("vq_mel_s").split("_"))
            np.testing.assert_allclose(segments[segment]["mel"][:, start:stop], stored, atol=5e-5, rtol=0)
        elif key.startswith(("vq_in", "vq_out")):
            state, _, segment = key.removeprefix("vq_").rpartition("_s")
            np.testing.assert_allclose(segments[int(segment)][state], stored, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", recordings.CASES)
def test_golden_prefixes(name, released):
    values, _ = recordings.expected(name)
    wave = recordings.waveform(name)
    prefixes = values.get("prefix_token_ids", {})
    codes = released(name).encode([wave[: int(samples)] for samples in prefixes])
    assert [of_prefix.tolist() for of_prefix in codes] == list(prefixes.values())


@pytest.mark.parametrize("batch", recordings.BATCHES, ids=lambda batch: batch["name"])
def test_golden_batches(batch, released):
    values, _ = recordings.expected(f"batch_{batch['name']}")
    codes = released(batch["members"][0]).encode([recordings.waveform(name) for name in batch["members"]])
    assert [of_member.tolist() for of_member in codes] == values["token_ids"]


# ---- the plain formulation ---------------------------------------------------------------------------------------


@variants
@pytest.mark.parametrize("samples", [1, 5000, 20001, 32000])
def test_equals_the_plain_formulation(config, samples):
    module, weights = build(config), vq_weights(config)
    wave = speech_like(samples)
    [traced] = module.trace(wave)
    plain = vq_states(weights, config, traced.pop("mel"), samples, FEATURES.hop)
    assert list(traced) == list(plain)
    for name, state in plain.items():
        torch.testing.assert_close(
            traced[name], state, atol=2e-5, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )
    count = -(-samples // (320 * config.pooling_kernel))
    assert module.encode([wave])[0].tolist() == nearest(weights, plain["hidden"][:count])


@variants
def test_company_changes_nothing(config, monkeypatch):
    monkeypatch.setattr(vq, "BATCH_SEGMENTS", 4)
    module = build(config)
    waves = [speech_like(length, seed) for seed, length in enumerate(LENGTHS)]
    together, codes = module.hidden(waves), module.encode(waves)
    for wave, of_wave, ids in zip(waves, together, codes, strict=True):
        [alone] = module.hidden([wave])
        torch.testing.assert_close(of_wave, alone, atol=2e-5, rtol=0)
        assert torch.equal(ids, module.encode([wave])[0])
        pieces = [len(wave[start : start + 32000]) for start in range(0, len(wave), 32000)]
        assert len(ids) == sum(-(-piece // module.samples_per_token) for piece in pieces)


def test_mel_is_padded_to_whole_tokens_alone_and_to_the_segment_in_long_audio():
    module = build()
    for samples, frames in [(1, [8]), (1281, [16]), (32000, [200]), (32001, [200, 200])]:
        assert [traced["mel"].shape[1] for traced in module.trace(speech_like(samples))] == frames


def test_a_later_sample_changes_no_earlier_block():
    module = build()
    wave = speech_like(20000)
    changed = wave.copy()
    changed[10240:] = 0.1 * speech_like(20000, seed=5)[10240:]  # blocks are 8 frames of 320 samples; quieter
    first, second = module.hidden([wave, changed])
    assert torch.equal(first[:8], second[:8])
    assert not torch.allclose(first[8:], second[8:], atol=1e-2)


@pytest.mark.parametrize(("block", "causal"), [(3, False), (None, False), (3, True)])
def test_mask(block, causal):
    rows = [[True] * 7, [True] * 4 + [False] * 3]
    mask = visible(torch.tensor(rows), block, causal).expand(2, 1, 7, 7)
    assert mask[:, 0].tolist() == [vq_mask(valid, block, causal=causal) for valid in rows]


@pytest.mark.parametrize("kind", ["avg", "max"])
@pytest.mark.parametrize(("frames", "kernel"), [(8, 4), (9, 4), (10, 3), (5, 1)])
def test_pooling_counts_the_zeros_it_adds(kind, frames, kernel):
    x = torch.randn(2, frames, 3, generator=torch.Generator().manual_seed(0)) - 2  # below zero: the maximum shows them
    torch.testing.assert_close(pool(x, kernel, kind), torch.stack([pooled(row, kernel, kind) for row in x]))


def test_quantization_takes_the_nearest_row_and_the_lowest_on_ties(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    weights = vq_weights(RELEASE)
    table = torch.randint(-3, 4, (50, 16), generator=rng).float()  # small integers: exact in float32
    table[30:40] = table[:10]
    module = build(weights=weights | {"codebook.weight": table})
    hidden = torch.cat([table, torch.randint(-3, 4, (101, 16), generator=rng).float()])
    plain = nearest({"codebook.weight": table}, hidden)
    assert plain[30:40] == plain[:10]
    assert module.quantize(hidden).tolist() == plain
    monkeypatch.setattr(vq, "DISTANCE_ROWS", 7)
    assert module.quantize(hidden).tolist() == plain


def test_bad_waveforms():
    assert build().encode([]) == []
    for wave in (np.zeros(0, np.float32), np.zeros(9), np.zeros((9, 1), np.float32)):
        with pytest.raises(AudioError):
            build().encode([speech_like(100), wave])


# ---- files -------------------------------------------------------------------------------------------------------

LEFT_OUT = {
    "ema_count": torch.ones(50),
    "ema_weight": torch.ones(50, 16),
    "embed_positions2.weight": torch.ones(25, 16),
}


def later_layers(config):
    return layer_weights(f"layers.{config.quantize_position}.", config.encoder, torch.Generator().manual_seed(9)) | {
        "layer_norm.weight": torch.ones(16),
        "layer_norm.bias": torch.ones(16),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("prefix", "left_out", "beside"),
    [
        ("", {}, {}),
        ("", LEFT_OUT, {}),
        ("encoder.", LEFT_OUT, {"decoder.x": torch.ones(1)}),
        (
            "model.encoder.",
            LEFT_OUT | later_layers(RELEASE),
            {"model.decoder.x": torch.ones(1), "proj_out.weight": torch.ones(1)},
        ),
    ],
    ids=["plain", "released", "encoder", "full"],
)
def test_layouts(prefix, left_out, beside, dtype, tmp_path):
    rounded = {name: tensor.to(dtype) for name, tensor in vq_weights(RELEASE).items()}
    stored = {f"{prefix}{name}": tensor for name, tensor in (rounded | left_out).items()} | beside
    module = load_vq(write_folder(tmp_path, vq_json(RELEASE), FEATURES, stored), "cpu")
    wave = speech_like(20000)
    direct = build(weights={name: tensor.float() for name, tensor in rounded.items()})
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.equal(module.hidden([wave])[0], direct.hidden([wave])[0])
    assert torch.equal(module.encode([wave])[0], direct.encode([wave])[0])


def test_shards(tmp_path):
    stored = {f"model.encoder.{name}": tensor for name, tensor in (vq_weights(RELEASE) | LEFT_OUT).items()}
    folder = write_folder(tmp_path, vq_json(RELEASE), FEATURES, {})
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    shards = {"model-1.safetensors": names[:7], "model-2.safetensors": names[7:]}
    for shard, of_shard in shards.items():
        save_file({name: stored[name].contiguous() for name in of_shard}, folder / shard)
    weight_map = {name: shard for shard, of_shard in shards.items() for name in of_shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    wave = speech_like(9000)
    assert torch.equal(load_vq(folder, "cpu").encode([wave])[0], build().encode([wave])[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mystery.weight": torch.ones(1)}, "unknown: mystery.weight"),
        ({"codebook.weight": torch.ones(49, 16)}, "wrong shape: codebook.weight"),
        ({"layers.1.fc1.bias": None}, "missing: layers.1.fc1.bias"),
    ],
)
def test_weights_must_fit(change, message, tmp_path):
    stored = {name: tensor for name, tensor in (vq_weights(RELEASE) | change).items() if tensor is not None}
    with pytest.raises(WeightsError, match=message):
        load_vq(write_folder(tmp_path, vq_json(RELEASE), FEATURES, stored), "cpu")


def test_a_layer_before_quantisation_is_never_left_out(tmp_path):
    deep = replace(RELEASE, quantize_position=3)
    stored = {f"encoder.{name}": tensor for name, tensor in vq_weights(RELEASE).items()}
    with pytest.raises(WeightsError, match=r"missing: layers\.2"):
        load_vq(write_folder(tmp_path, vq_json(deep), FEATURES, stored), "cpu")


@pytest.mark.parametrize(
    ("encoder", "message"),
    [
        (replace(ENCODER, mel_bins=13), "num_mel_bins is 13, .*feature_size is 12"),
        (replace(ENCODER, max_positions=99), "100 encoder frames, .*max_source_positions is 99"),
    ],
)
def test_configs_must_fit(encoder, message):
    with pytest.raises(ConfigError, match=message):
        VQTokenizer(replace(RELEASE, encoder=encoder), FEATURES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantize_causal_block_size": 3, "pooling_position": 1}, "smaller than pooling_kernel_size"),
        ({"pooling_type": "median"}, "pooling_type"),
        ({"quantize_position": 5}, "quantize_position"),
    ],
)
def test_illegal_configs(change, message, tmp_path):
    folder = write_folder(tmp_path, vq_json(RELEASE) | change, FEATURES, vq_weights(RELEASE))
    with pytest.raises(ConfigError, match=message):
        load_vq(folder, "cpu")
