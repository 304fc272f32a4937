"""Reading released checkpoints: where the files lie, and strict loading of their tensors.

A `Source` maps tensor names to `Stored` tensors that are read one at a time from memory-mapped files, whose pages are
let go as loading goes on, so that never more than one shard is held above the module's own size. Renaming, filtering
and folding are plain functions from Source to Source; `load_strict` then demands that names and shapes match the
module exactly.
"""

from __future__ import annotations

import functools
import pickle
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kimia.errors import CheckpointError, WeightsError
from kimia.model.config import read_json

VQ_TOKENIZER = "glm-4-voice-tokenizer"
HUB_VQ_TOKENIZER = f"THUDM/{VQ_TOKENIZER}"

SHARD_INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ARCHIVE = "model.pt"  # of the detokenizer's two parts

# What a download fetches of a hub repository, and leaves out where no speech is wanted: 20 GB.
FETCHED = ("*.json", "*.yaml", "*.safetensors", "*.pt", "*.model", "LICENSE*", "README*")
DETOKENIZER_FILES = ("audio_detokenizer/*", "vocoder/*")

MAPPED_BYTES = 256 << 20  # read from one mapping of a .pt file before its pages are let go

INCOMPLETE = "the download is incomplete, fetch it again"

FLOATING = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors to torch names

ROTARY_LEFTOVER = re.compile(r"\.rotary_emb\.inv_freq$")  # bf16-rounded buffer: loading it would corrupt RoPE


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, not yet read."""

    shape: tuple[int, ...]
    dtype: str  # torch's name for it
    read: Callable[[], Tensor]


Source = dict[str, Stored]


# ---- where the files lie ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """The folders of one model in the released layout."""

    root: Path  # moonshotai/Kimi-Audio-7B-Instruct
    vq_tokenizer: Path  # THUDM/glm-4-voice-tokenizer, a release of its own

    @property
    def whisper(self) -> Path:
        """Folder of the continuous-feature encoder."""
        return self.root / "whisper-large-v3"

    @property
    def flow(self) -> Path:
        """Folder of the flow-matching model."""
        return self.root / "audio_detokenizer"

    @property
    def vocoder(self) -> Path:
        """Folder of BigVGAN."""
        return self.root / "vocoder"


def open_checkpoint(
    model: str | Path, vq_tokenizer: str | Path | None = None, *, detokenizer: bool = True
) -> Checkpoint:
    """Find a checkpoint by local path or hub id; nothing is read but the folder names.

    The VQ tokenizer is looked for inside the model folder, then beside it; with a hub id it comes from the hub.
    Without `detokenizer`, a download leaves its files out. Raises CheckpointError.
    """
    root = resolve(model, detokenizer=detokenizer)
    if vq_tokenizer is not None:
        return Checkpoint(root, resolve(vq_tokenizer))
    for folder in (root / VQ_TOKENIZER, root.parent / VQ_TOKENIZER):
        if folder.is_dir():
            return Checkpoint(root, folder)
    if Path(model).is_dir():
        raise CheckpointError(
            f"no {VQ_TOKENIZER} folder in or beside {root}: it is a release of its own ({HUB_VQ_TOKENIZER}); "
            "put it there or name it (--vq-tokenizer, vq_tokenizer=)"
        )
    return Checkpoint(root, resolve(HUB_VQ_TOKENIZER))


def resolve(location: str | Path, *, detokenizer: bool = True) -> Path:
    """A local folder as it is, or a hub id `owner/name` downloaded (with a progress bar) to the hub's cache.

    Without `detokenizer` its files are not downloaded. Raises CheckpointError.
    """
    path = Path(location)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)) or path.exists():
        raise CheckpointError(f"{location}: neither a folder nor a hub id of the form owner/name")
    return _download(str(location), () if detokenizer else DETOKENIZER_FILES)


def _download(hub_id: str, left_out: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(FETCHED), ignore_patterns=list(left_out)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"{hub_id}: no such local folder, and the hub does not give it ({error})") from error


# ---- tensors of a file ------------------------------------------------------------------------------------------


def safetensors_source(path: Path) -> Source:
    """The tensors of one safetensors file."""

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return read

    def stored(name: str, part: Any) -> Stored:
        dtype = part.get_dtype()
        return Stored(tuple(part.get_shape()), FLOATING.get(dtype, dtype), reader(name))

    try:
        with safe_open(path, framework="pt") as file:
            return {name: stored(name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; {INCOMPLETE}") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error}); {INCOMPLETE}") from error


def sharded_source(folder: Path) -> Source:
    """The tensors of `model.safetensors` or of the shards that `model.safetensors.index.json` names.

    The released shards have irregular names (`model-1-of-35` ... `model-36-of-36`): the weight map alone counts.
    """
    index = folder / SHARD_INDEX
    if not index.exists():
        return safetensors_source(folder / SINGLE_FILE)
    weight_map = _read_weight_map(index)
    absent = sorted(shard for shard in set(weight_map.values()) if not (folder / shard).is_file())
    if absent:
        raise CheckpointError(f"{folder}: lacks {_listed(absent)}, which {SHARD_INDEX} names; {INCOMPLETE}")
    shards = {name: safetensors_source(folder / name) for name in sorted(set(weight_map.values()))}
    lacking = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if lacking:
        raise WeightsError(f"{index}: the shards lack {_listed(lacking)}")
    stray = sorted(name for shard, source in shards.items() for name in source if weight_map.get(name) != shard)
    if stray:
        raise WeightsError(f"{index}: the shards hold what the index does not name: {_listed(stray)}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names of the same folder")
    return weight_map


def torch_source(path: Path, key: str) -> Source:
    """The tensors under `key` of a `.pt` file, memory-mapped; no code is unpickled, and what is no tensor is left out.

    A training state has more than tensors there. A weight that is none is then missed by `load_strict`.
    """
    mapping = _Mapping(path, key)
    return {
        name: Stored(tuple(tensor.shape), _dtype_name(tensor), functools.partial(mapping.read, name))
        for name, tensor in mapping.tensors.items()
    }


class _Mapping:
    """One memory-mapped `.pt` file, mapped anew after every MAPPED_BYTES read, which frees the pages read so far."""

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key = path, key
        self.tensors = _map_tensors(path, key)
        self.bytes_read = 0

    def read(self, name: str) -> Tensor:
        if self.bytes_read >= MAPPED_BYTES:
            self.tensors, self.bytes_read = _map_tensors(self.path, self.key), 0
        tensor = self.tensors[name]
        self.bytes_read += tensor.nbytes
        return tensor


def _map_tensors(path: Path, key: str) -> dict[str, Tensor]:
    content = _load_mapped(path)
    items = content.get(key) if isinstance(content, dict) else None
    named = items.items() if isinstance(items, dict) else ()
    tensors = {name: item for name, item in named if isinstance(name, str) and isinstance(item, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: has no tensors under the key {key!r}")
    return tensors


def _load_mapped(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; {INCOMPLETE}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(
            f"{path}: refused, it is no torch archive: cut off (then fetch it again), or a bare pickle of before "
            "torch 1.6, which can run code (then save it again with torch.save, where you trust it)"
        )
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: refused, it holds more than tensors, and a pickle can run code (none of it was run)"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error).split(". ", 1)[0]  # torch goes on with advice for programmers
        raise CheckpointError(f"{path}: cannot be read as a torch archive ({reason})") from error


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


# ---- from Source to Source --------------------------------------------------------------------------------------


def without(source: Source, *patterns: str) -> Source:
    """The source less the names that a regular expression finds: the named list of what is ignored on purpose."""
    return {name: item for name, item in source.items() if not any(re.search(pattern, name) for pattern in patterns)}


def without_prefix(source: Source, *prefixes: str) -> Source:
    """All names, the first of the prefixes that occurs taken off where it stands; the rest is left for strictness."""
    prefix = next((prefix for prefix in prefixes if any(name.startswith(prefix) for name in source)), "")
    stripped = {name.removeprefix(prefix): item for name, item in source.items()}
    if len(stripped) < len(source):
        raise WeightsError(f"tensors occur both with and without the prefix {prefix!r}")
    return stripped


def fold_weight_norm(source: Source) -> Source:
    """Weight-normalised tensors (legacy `weight_g/_v` or `parametrizations.weight.original0/1`) as plain `weight`.

    weight = g * v / ||v||, the norm taken over all dimensions but the first, in float32.
    """
    folded = dict(source)
    for magnitude, direction in (
        ("weight_g", "weight_v"),
        ("parametrizations.weight.original0", "parametrizations.weight.original1"),
    ):
        for name in [name for name in source if name.endswith("." + magnitude)]:
            stem = name.removesuffix(magnitude)
            if stem + direction in folded:
                folded[stem + "weight"] = _folded(stem, folded.pop(name), folded.pop(stem + direction))
    return folded


def _folded(stem: str, magnitude: Stored, direction: Stored) -> Stored:
    expected = direction.shape[:1] + (1,) * (len(direction.shape) - 1)
    if magnitude.shape != expected:
        raise WeightsError(f"{stem}: the weight norm's magnitude has the shape {magnitude.shape} instead of {expected}")

    def read() -> Tensor:
        g, v = magnitude.read().float(), direction.read().float()
        return v * (g / v.norm(dim=tuple(range(1, v.dim())), keepdim=True))

    strange = [item.dtype for item in (magnitude, direction) if item.dtype not in FLOATING.values()]
    return Stored(direction.shape, strange[0] if strange else "float32", read)


# ---- into a module ----------------------------------------------------------------------------------------------


def load_strict(
    module: nn.Module, source: Source, where: str, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Fill a module that was built on the meta device; parameters become `dtype` on `device`.

    Tensors are copied, never views of the file: a module must not change, or fault, when its file does.
    Raises WeightsError that lists every missing, unknown and mis-shaped tensor; then nothing has been read.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [
        f"{kind} {_listed(sorted(names))}"
        for kind, names in (
            ("missing:", expected.keys() - source.keys()),
            ("unknown:", source.keys() - expected.keys()),
            ("wrong shape:", _misshaped(expected, source)),
            ("no floating-point numbers:", _not_floating(source)),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{where}: the tensors do not fit the config; " + "; ".join(problems))
    for name in expected:
        _assign(module, name, source[name].read().to(device=device, dtype=dtype, copy=True))
    module.requires_grad_(False)
    module.eval()


def _misshaped(expected: dict[str, tuple[int, ...]], source: Source) -> set[str]:
    return {
        f"{name} {source[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in source and source[name].shape != shape
    }


def _not_floating(source: Source) -> set[str]:
    return {f"{name} {item.dtype}" for name, item in source.items() if item.dtype not in FLOATING.values()}


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor


def _listed(names: list[str], shown: int = 8) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")
