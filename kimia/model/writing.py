"""Writing tensor files one tensor at a time, and whole or not at all.

A `Source` is written in constant memory: the 7B checkpoint needs no more than its largest tensor. Files and folders
appear under their final name only when they are complete, so that an interrupted run leaves nothing half-written.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kimia.errors import CheckpointError
from kimia.model.checkpoint import FLOATING, Source

SAFETENSORS_NAMES = {torch_name: name for name, torch_name in FLOATING.items()}
HEADER_ALIGNMENT = 8  # bytes, demanded by the safetensors format

PARTIAL = ".kimia-partial-"  # begins the name of what is not complete

Progress = Callable[[int], object]  # told the bytes just written


def stored_bytes(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of one stored tensor; `dtype` is torch's name."""
    return prod(shape) * torch.empty(0, dtype=getattr(torch, dtype)).element_size()


def write_safetensors(
    path: Path, source: Source, metadata: dict[str, str] | None = None, progress: Progress | None = None
) -> None:
    """Write a source as a safetensors file, reading one tensor at a time."""
    names = sorted(source, key=lambda name: (-stored_bytes((), source[name].dtype), name))  # wide values first: aligned
    with open(path, "wb") as file:
        file.write(_safetensors_header(source, names, metadata))
        for name in names:
            data = _raw(source[name].read(), source[name].dtype)
            file.write(data)
            if progress is not None:
                progress(len(data))


def _safetensors_header(source: Source, names: list[str], metadata: dict[str, str] | None) -> bytes:
    header: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    end = 0
    for name in names:
        item = source[name]
        begin, end = end, end + stored_bytes(item.shape, item.dtype)
        header[name] = {
            "dtype": SAFETENSORS_NAMES[item.dtype],
            "shape": list(item.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _raw(tensor: Tensor, dtype: str) -> memoryview:
    converted = tensor.to(device="cpu", dtype=getattr(torch, dtype)).contiguous()
    return converted.reshape(-1).view(torch.uint8).numpy().data


def write_torch(path: Path, key: str, source: Source, progress: Progress | None = None) -> None:
    """Write a float32 source as `{key: {name: tensor}}` in a torch archive.

    torch.save wants all tensors at once: they pass through a scratch file, mapped, so that memory stays free.
    """
    scratch = path.with_name(path.name + ".scratch")
    try:
        with open(scratch, "wb") as file:
            for item in source.values():
                data = _raw(item.read(), "float32")
                file.write(data)
                if progress is not None:
                    progress(len(data))
        with open(path, "wb") as file:  # a path would turn a full disk into a RuntimeError
            torch.save({key: _mapped(scratch, source)}, file)
    finally:
        scratch.unlink(missing_ok=True)


def _mapped(scratch: Path, source: Source) -> dict[str, Tensor]:
    tensors, offset = {}, 0
    for name, item in source.items():
        values = np.memmap(scratch, np.float32, "c", offset, item.shape)
        tensors[name] = torch.from_numpy(values)
        offset += stored_bytes(item.shape, "float32")
    return tensors


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Give a path beside `path` to write to, and move it into place when the block ends well.

    A link is replaced, not written through: in the hub's cache it leads to a file that is named by its content.
    Raises CheckpointError when the disk refuses: no permission, no room, too long a name.
    """
    with _write_errors(path):
        handle, name = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)
        os.close(handle)
        partial = Path(name)
        try:
            yield partial
            partial.chmod(0o644)  # mkstemp's are private
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a new folder to fill, and move it into place when the block ends well.

    Raises CheckpointError when `folder` exists and is not an empty folder, and when the disk refuses.
    """
    with _write_errors(folder):
        target = Path(os.path.realpath(folder))  # Path.resolve raises no OSError where links go round in a circle
        present = target.exists()
        if present and not (target.is_dir() and not any(target.iterdir())):
            raise CheckpointError(f"{folder}: exists and is not empty; name a new folder")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target if present else target.parent))
        try:
            yield partial
            if present:  # it stays the folder that it is: somebody's working directory, or a mounted disk
                for entry in sorted(partial.iterdir()):
                    entry.replace(target / entry.name)
            else:
                partial.chmod(0o755)
                partial.replace(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}) and nothing of it is left behind; name a place "
            "that is writable and has room"
        ) from error
