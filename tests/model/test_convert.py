"""Converted detokenizer files: smaller, and the same model."""

import pytest
import torch

from kimia.errors import CheckpointError, ParameterError, WeightsError
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import open_checkpoint, safetensors_source
from kimia.model.convert import convert
from kimia.model.dit import load_dit

pytestmark = pytest.mark.unit


def weights(checkpoint):
    dit = load_dit(checkpoint.flow, "cpu", torch.float32)
    vocoder = load_vocoder(checkpoint.vocoder, "cpu", torch.float32)
    return dit.state_dict(), vocoder.state_dict()


def test_conversion_keeps_every_weight(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    before = weights(checkpoint)
    done = convert(checkpoint, progress=False)
    for item in done:
        assert item.target_bytes == item.target.stat().st_size
        assert item.saved_bytes == item.archive.stat().st_size - item.target_bytes
        item.archive.unlink()  # what is loaded now is the converted file
    after = weights(checkpoint)
    for old, new in zip(before, after, strict=True):
        assert set(old) == set(new)
        assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


def test_the_rest_of_a_training_state_is_ignored(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    before, _ = weights(checkpoint)
    path = checkpoint.flow / "model.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"] |= {"epoch": 3, "optimizer": {"lr": [1e-4]}, "ema.decay": torch.ones(1)}
    torch.save(content | {"global_step": 7}, path)
    after, _ = weights(checkpoint)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(convert(checkpoint, progress=False)) == 2


def test_a_weight_that_is_no_tensor_is_missed(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    path = checkpoint.flow / "model.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["speech_model.input_linear.bias"] = [0.0]
    torch.save(content, path)
    with pytest.raises(WeightsError, match=r"missing: input_linear\.bias"):
        weights(checkpoint)
    with pytest.raises(WeightsError, match=r"first in input_linear\.bias"):
        convert(checkpoint, progress=False)


def test_names_are_stripped_and_weight_norm_is_folded(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    convert(checkpoint, progress=False)
    flow = safetensors_source(checkpoint.flow / "model.safetensors")
    assert "blocks.0.attn.qkv.weight" in flow
    assert not [name for name in flow if "speech_model" in name or "resampler" in name]
    vocoder = safetensors_source(checkpoint.vocoder / "model.safetensors")
    assert not [name for name in vocoder if name.endswith(("weight_g", "weight_v"))]
    assert {item.dtype for item in vocoder.values()} == {"float32"}


def test_retyping_touches_only_the_flow_model(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    before, _ = weights(checkpoint)
    convert(checkpoint, "bf16", progress=False)
    flow = safetensors_source(checkpoint.flow / "model.safetensors")
    assert {item.dtype for item in flow.values()} == {"bfloat16"}
    assert all(torch.equal(before[name].bfloat16(), item.read()) for name, item in flow.items())
    vocoder = safetensors_source(checkpoint.vocoder / "model.safetensors")
    assert {item.dtype for item in vocoder.values()} == {"float32"}


def test_converting_again_gives_the_same(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    first = [item.target.read_bytes() for item in convert(checkpoint, progress=False)]
    assert [item.target.read_bytes() for item in convert(checkpoint, progress=False)] == first


def test_an_archive_that_does_not_fit_is_not_converted(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    path = checkpoint.flow / "model.pt"
    content = torch.load(path, weights_only=True)
    content["state_dict"]["speech_model.extra"] = torch.ones(1)
    torch.save(content, path)
    with pytest.raises(WeightsError, match="does not fit the config beside it, first in extra"):
        convert(checkpoint, progress=False)
    assert not (checkpoint.flow / "model.safetensors").exists()


def test_refusals(tiny_copy):
    checkpoint = open_checkpoint(tiny_copy)
    with pytest.raises(ParameterError, match="dtype must be one of bf16, fp32"):
        convert(checkpoint, "int8")
    for folder in (checkpoint.flow, checkpoint.vocoder):
        (folder / "model.pt").unlink()
    with pytest.raises(CheckpointError, match=r"has no model\.pt"):
        convert(checkpoint)


def test_an_interrupted_conversion_leaves_the_old_state(tiny_copy, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    checkpoint = open_checkpoint(tiny_copy)
    before = {path.name for path in checkpoint.flow.iterdir()}
    monkeypatch.setattr("kimia.model.convert.write_safetensors", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be written \(disk full\)"):
        convert(checkpoint, progress=False)
    assert {path.name for path in checkpoint.flow.iterdir()} == before
