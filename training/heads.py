"""Where a later run begins: the weights of a checkpoint folder, and the heads that training read its losses from.

Serving never opens the heads' files. They also let anyone measure what an encoder hears without a language model: the
letters are read by a head.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from kimia.errors import CheckpointError
from kimia.model.checkpoint import Stored, safetensors_source
from kimia.model.writing import whole_file, write_safetensors

FOLDER = "training"  # in a checkpoint


def take_over(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Fill a module that is trained; what is trained in it stays so. Raises CheckpointError when they do not match."""
    try:
        module.load_state_dict(tensors)
    except RuntimeError as error:
        raise CheckpointError(f"{where}: is of other dimensions than what is trained ({error})") from error


def _path(root: Path, stage: str) -> Path:
    return root / FOLDER / f"{stage}.safetensors"


def write_heads(root: Path, stage: str, heads: nn.ModuleDict) -> None:
    """Write a stage's heads into a checkpoint folder, float16."""
    _path(root, stage).parent.mkdir(parents=True, exist_ok=True)
    source = {
        name: Stored(tuple(value.shape), "float16", lambda value=value: value)  # type: ignore[misc]
        for name, value in heads.state_dict().items()
    }
    with whole_file(_path(root, stage)) as partial:
        write_safetensors(partial, source)


def read_heads(root: Path, stage: str, heads: nn.ModuleDict) -> None:
    """Fill a stage's heads from a checkpoint folder. Raises CheckpointError."""
    path = _path(root, stage)
    take_over(
        heads, {name: item.read().to(torch.float32) for name, item in safetensors_source(path).items()}, str(path)
    )
