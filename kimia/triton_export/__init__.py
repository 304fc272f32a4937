"""A model repository for NVIDIA Triton: both encoders and the vocoder of a checkpoint, behind its Python backend.

    kimia_vq/config.pbtxt            the tensors of `kimia.hosting`, dynamic batching, and as parameters where the
    kimia_vq/1/model.py              checkpoint lies and the fingerprint of its weights
    kimia_whisper/...
    kimia_vocoder/...

The repository holds no weights: `kimia.triton_export.backend`, which runs in Triton's Python, loads them with the
library's own loaders. That Python needs `kimia[model]`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from kimia.errors import ParameterError
from kimia.hosting import FINGERPRINT, VQ, HostedModel, HostedTensor, vocoder_model, whisper_model
from kimia.model.checkpoint import Checkpoint
from kimia.model.config import LMConfig, VocoderConfig
from kimia.model.fingerprint import fingerprint
from kimia.model.writing import whole_folder

DATATYPES = {torch.float32: "FP32", torch.bfloat16: "BF16", torch.float16: "FP16"}

MODEL_PY = '''"""Written by `kimia triton export`. Triton's Python backend looks for a class of this name."""

from kimia.triton_export.backend import {kind} as TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
CONFIG = """\
# Written by `kimia triton export`: other weights or another version of kimia need a new export.
name: "{name}"
backend: "python"
max_batch_size: {rows}
{tensors}
instance_group [ {{ count: 1 kind: {kind} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {delay} }}
{parameters}
"""


@dataclass(frozen=True)
class Batching:
    """How Triton gathers rows."""

    rows: int = 8  # at most in one batch
    delay_microseconds: int = 2000  # that a row waits for company

    def __post_init__(self) -> None:
        if self.rows < 1 or self.delay_microseconds < 0:
            raise ParameterError("a batch needs at least one row, and a delay of zero or more microseconds")


@dataclass(frozen=True)
class Exported:
    """A model of the repository."""

    hosted: HostedModel
    kind: str  # class of `kimia.triton_export.backend`
    folders: tuple[Path, ...]  # of its weights
    conditions: tuple[str, ...]  # what else its outputs depend on
    ragged: bool  # rows of unlike length may share a batch

    @property
    def fingerprint(self) -> str:
        """Of the weights."""
        return fingerprint(self.folders, *self.conditions)


def exported_models(checkpoint: Checkpoint) -> tuple[Exported, Exported, Exported]:
    """VQ tokenizer, continuous features, vocoder. Reads configs only; raises CheckpointError."""
    width = LMConfig.read(checkpoint.root / "config.json").adaptor_input_dim
    bins = VocoderConfig.read(checkpoint.vocoder / "config.json").mel_bins
    return (
        Exported(VQ, "VQTokenizer", (checkpoint.vq_tokenizer,), (), ragged=True),
        Exported(whisper_model(width), "Whisper", (checkpoint.whisper,), (str(width),), ragged=True),
        Exported(vocoder_model(bins), "Vocoder", (checkpoint.vocoder,), (), ragged=False),
    )


def export(
    checkpoint: Checkpoint, folder: Path, device: torch.device, dtype: torch.dtype, batching: Batching
) -> list[Path]:
    """Write the repository into `folder`; the folders of its models.

    `dtype` is that of the continuous features, the rest computes in float32. Raises CheckpointError for a checkpoint
    that cannot be used and where nothing can be written, ParameterError where a model is there already.
    """
    models = exported_models(checkpoint)
    made = [folder / model.hosted.name for model in models]
    for path in made:
        if path.exists():
            raise ParameterError(f"{path}: there already; name another folder, or remove it to export anew")
    for path, model in zip(made, models, strict=True):
        config = _config(model, checkpoint, device, dtype, batching)
        with whole_folder(path) as partial:
            (partial / "1").mkdir()
            (partial / "1" / "model.py").write_text(MODEL_PY.format(kind=model.kind), encoding="utf-8")
            (partial / "config.pbtxt").write_text(config, encoding="utf-8")
    return made


def _config(
    model: Exported, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, batching: Batching
) -> str:
    """The model's config in Triton's text format."""
    gives = model.hosted.gives
    gives_type = DATATYPES[dtype] if len(gives.datatypes) > 1 else gives.datatypes[0]
    tensors = [_tensor("input", tensor, tensor.datatypes[0], model.ragged) for tensor in model.hosted.takes]
    tensors.append(_tensor("output", gives, gives_type, ragged=False))
    parameters = {
        FINGERPRINT: model.fingerprint,
        "model": str(checkpoint.root.resolve()),
        "vq_tokenizer": str(checkpoint.vq_tokenizer.resolve()),
    }
    return CONFIG.format(
        name=model.hosted.name,
        rows=batching.rows,
        tensors="\n".join(tensors),
        kind="KIND_GPU" if device.type == "cuda" else "KIND_CPU",
        delay=batching.delay_microseconds,
        parameters="\n".join(_parameter(*item) for item in parameters.items()),
    )


def _tensor(kind: str, tensor: HostedTensor, datatype: str, ragged: bool) -> str:
    unlike = " allow_ragged_batch: true" if ragged and -1 in tensor.dims else ""
    return f'{kind} [ {{ name: "{tensor.name}" data_type: TYPE_{datatype} dims: {list(tensor.dims)}{unlike} }} ]'


def _parameter(key: str, value: str) -> str:
    """JSON's quoting is that of protobuf's text format, for what a path may hold."""
    return f"parameters {{ key: {json.dumps(key)} value: {{ string_value: {json.dumps(value)} }} }}"
