"""Continuous features: against the golden set, against a plain formulation, in company and from every file layout."""

import json
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kimia.errors import AudioError, CheckpointError, ConfigError, WeightsError
from kimia.model import whisper
from kimia.model.checkpoint import load_strict
from kimia.model.whisper import WhisperFeatures, load_whisper
from tests.golden_data import golden
from tests.model import recordings
from tests.model.in_memory import in_memory
from tests.model.plain_encoder import (
    ENCODER,
    FEATURES,
    encoder_json,
    speech_like,
    whisper_features,
    whisper_weights,
    write_folder,
)

pytestmark = pytest.mark.parity

WEIGHTS = whisper_weights(ENCODER)
LENGTHS = [9000, 1, 70000, 1280, 32001, 1281, 32000]


def build(weights=WEIGHTS, group=4, config=ENCODER):
    module = WhisperFeatures(config, FEATURES, group)
    source = {name: in_memory(tensor) for name, tensor in weights.items()}
    load_strict(module.encoder, source, "test", device="cpu", dtype=torch.float32)
    return module


@pytest.fixture(scope="module")
def released():
    return load_whisper(golden("tokenizer") / "whisper-large-v3", 4, "cpu", torch.float32)


@pytest.mark.parametrize("name", recordings.CASES)
def test_golden_features(name, released):
    _, arrays = recordings.expected(name)
    wave = recordings.waveform(name)
    [features] = released.encode([wave])
    np.testing.assert_allclose(features, arrays["features"], atol=5e-5, rtol=0)
    for key in arrays:
        if key.startswith("wh_mel_s"):
            segment, start, stop = (int(part) for part in key.removeprefix("wh_mel_s").split("_"))
            length = released.features.segment_samples
            mel = released.log_mel(wave[segment * length : (segment + 1) * length], length)
            np.testing.assert_allclose(mel[:, start:stop], arrays[key], atol=5e-5, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "relu"])
@pytest.mark.parametrize("group", [1, 4])
def test_equals_the_plain_formulation(group, activation):
    config = replace(ENCODER, activation=activation)
    module = build(group=group, config=config)
    wave = speech_like(7000)
    mel = torch.from_numpy(module.log_mel(wave, FEATURES.segment_samples))
    count = -(-len(wave) // (320 * group))
    [features] = module.encode([wave])
    plain = whisper_features(WEIGHTS, config, mel, group, count)
    assert features.shape == (count, group * ENCODER.d_model)
    torch.testing.assert_close(features, plain, atol=2e-5, rtol=0)


def test_company_changes_nothing(monkeypatch):
    monkeypatch.setattr(whisper, "BATCH_SEGMENTS", 3)
    module = build()
    waves = [speech_like(length, seed) for seed, length in enumerate(LENGTHS)]
    for wave, together in zip(waves, module.encode(waves), strict=True):
        assert together.shape == (-(-len(wave) // 1280), module.width)
        alone = [module.encode([wave[start : start + 32000]])[0] for start in range(0, len(wave), 32000)]
        torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_nothing_in_nothing_out():
    assert build().encode([]) == []
    with pytest.raises(AudioError):
        build().encode([speech_like(100), np.zeros(0, np.float32)])


def test_features_may_enter_training():
    [features] = build().encode([speech_like(2000)])
    assert not features.is_inference()
    assert not features.requires_grad


def decoder(prefix):
    return {f"{prefix}decoder.layers.0.fc1.weight": torch.ones(2, 2), "proj_out.weight": torch.ones(2, 2)}


@pytest.mark.parametrize("prefix", ["model.", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layouts(prefix, dtype, tmp_path):
    rounded = {name: tensor.to(dtype) for name, tensor in WEIGHTS.items()}
    stored = {f"{prefix}encoder.{name}": tensor for name, tensor in rounded.items()} | decoder(prefix)
    folder = write_folder(tmp_path, encoder_json(ENCODER), FEATURES, stored)
    wave = speech_like(5000)
    module = load_whisper(folder, 4, "cpu", torch.float32)
    direct = build({name: tensor.float() for name, tensor in rounded.items()})
    assert module.encoder.conv1.weight.dtype == torch.float32
    assert torch.equal(module.encode([wave])[0], direct.encode([wave])[0])


def test_shards(tmp_path):
    stored = {f"model.encoder.{name}": tensor for name, tensor in WEIGHTS.items()} | decoder("model.")
    folder = write_folder(tmp_path, encoder_json(ENCODER), FEATURES, {})
    (folder / "model.safetensors").unlink()
    names = sorted(stored)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, of_shard in shards.items():
        save_file({name: stored[name].contiguous() for name in of_shard}, folder / shard)
    weight_map = {name: shard for shard, of_shard in shards.items() for name in of_shard}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    wave = speech_like(3000)
    loaded = load_whisper(folder, 4, "cpu", torch.float32)
    assert torch.equal(loaded.encode([wave])[0], build().encode([wave])[0])


def test_bfloat16(tmp_path):
    folder = write_folder(tmp_path, encoder_json(ENCODER), FEATURES, {f"encoder.{n}": t for n, t in WEIGHTS.items()})
    [features] = load_whisper(folder, 4, "cpu", torch.bfloat16).encode([speech_like(5000)])
    [exact] = build().encode([speech_like(5000)])
    assert features.dtype == torch.bfloat16
    assert (features.float() - exact).square().mean() < 0.003 * exact.square().mean()


def test_loading_is_silent_and_offline(tmp_path, monkeypatch, capfd, caplog):
    def refuse(*_):
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    folder = write_folder(tmp_path, encoder_json(ENCODER), FEATURES, {f"encoder.{n}": t for n, t in WEIGHTS.items()})
    load_whisper(folder, 4, "cpu", torch.float32).encode([speech_like(5000)])
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": torch.ones(1)}, "unknown: extra"),
        ({"encoder.layers.4.fc1.bias": torch.ones(24)}, "unknown: layers.4.fc1.bias"),
        ({"encoder.conv1.bias": torch.ones(3)}, "wrong shape: conv1.bias"),
        ({"encoder.layer_norm.bias": None}, "missing: layer_norm.bias"),
        ({"conv1.bias": torch.ones(16)}, "with and without the prefix"),
    ],
)
def test_weights_must_fit(change, message, tmp_path):
    stored = {f"encoder.{name}": tensor for name, tensor in WEIGHTS.items()} | change
    stored = {name: tensor for name, tensor in stored.items() if tensor is not None}
    folder = write_folder(tmp_path, encoder_json(ENCODER), FEATURES, stored)
    with pytest.raises(WeightsError, match=message):
        load_whisper(folder, 4, "cpu", torch.float32)


@pytest.mark.parametrize(
    ("config", "features", "group", "message"),
    [
        (replace(ENCODER, mel_bins=13), FEATURES, 4, "num_mel_bins is 13, .*feature_size is 12"),
        (replace(ENCODER, max_positions=99), FEATURES, 4, "100 encoder frames, .*max_source_positions is 99"),
        (replace(ENCODER, max_positions=101), FEATURES, 4, "whole segments"),
        (ENCODER, FEATURES, 3, "not a multiple of 3"),
    ],
)
def test_configs_must_fit(config, features, group, message):
    with pytest.raises(ConfigError, match=message):
        WhisperFeatures(config, features, group)


def test_missing_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_whisper(tmp_path, 4, "cpu", torch.float32)
