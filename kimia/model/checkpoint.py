"""Reading released checkpoints: where the files lie, and strict loading of their tensors.

A `Source` maps tensor names to `Stored` tensors that are read one at a time, so that loading never holds more than
one tensor (at most one memory-mapped file) above the module's own size. Renaming, filtering and folding are plain
functions from Source to Source; `load_strict` then demands that names and shapes match the module exactly.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kimia.errors import CheckpointError, WeightsError

VQ_TOKENIZER = "glm-4-voice-tokenizer"
HUB_VQ_TOKENIZER = f"THUDM/{VQ_TOKENIZER}"

ROTARY_LEFTOVER = re.compile(r"\.rotary_emb\.inv_freq$")  # bf16-rounded buffer: loading it would corrupt RoPE


@dataclass(frozen=True)
class Stored:
    """One tensor of a file, not yet read."""

    shape: tuple[int, ...]
    dtype: str  # the file's own name for it
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


def open_checkpoint(model: str | Path, vq_tokenizer: str | Path | None = None) -> Checkpoint:
    """Find a checkpoint by local path or hub id; nothing is read but the folder names.

    The VQ tokenizer is looked for inside the model folder, then beside it; with a hub id it comes from the hub.
    """
    root = resolve(model)
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


def resolve(location: str | Path) -> Path:
    """A local folder as it is, or a hub id `owner/name` downloaded (with a progress bar) to the hub's cache."""
    path = Path(location)
    if path.is_dir():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", str(location)) or path.exists():
        raise CheckpointError(f"{location}: neither a folder nor a hub id of the form owner/name")
    return _download(str(location))


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(f"{hub_id}: no such local folder, and the hub does not give it ({error})") from error


# ---- tensors of a file ------------------------------------------------------------------------------------------


def safetensors_source(path: Path) -> Source:
    """The tensors of one safetensors file."""

    def reader(name: str) -> Callable[[], Tensor]:
        def read() -> Tensor:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name)

        return read

    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            return {
                name: Stored(tuple(part.get_shape()), part.get_dtype(), reader(name)) for name, part in slices.items()
            }
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read as safetensors ({error})") from error


def sharded_source(folder: Path) -> Source:
    """The tensors of `model.safetensors` or of the shards that `model.safetensors.index.json` names.

    The released shards have irregular names (`model-1-of-35` ... `model-36-of-36`): the weight map alone counts.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return safetensors_source(folder / "model.safetensors")
    weight_map = _read_weight_map(index)
    shards = {name: safetensors_source(folder / name) for name in sorted(set(weight_map.values()))}
    lacking = sorted(name for name, shard in weight_map.items() if name not in shards[shard])
    if lacking:
        raise WeightsError(f"{index}: the shards lack {_listed(lacking)}")
    stray = sorted(name for shard, source in shards.items() for name in source if weight_map.get(name) != shard)
    if stray:
        raise WeightsError(f"{index}: the shards hold what the index does not name: {_listed(stray)}")
    return {name: shards[shard][name] for name, shard in weight_map.items()}


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index}: is no safetensors index ({error!r})") from error
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) and Path(shard).name == shard for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: weight_map must map tensor names to file names of the same folder")
    return weight_map


def torch_source(path: Path, key: str) -> Source:
    """The tensors under `key` of a `.pt` file, memory-mapped; only tensors are unpickled, never code."""
    try:
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: refused, it holds more than tensors (a pickle can run code)") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as a torch file ({error})") from error
    tensors = content.get(key) if isinstance(content, dict) else None
    if not isinstance(tensors, dict) or not all(isinstance(item, Tensor) for item in tensors.values()):
        raise CheckpointError(f"{path}: has no tensors under the key {key!r}")
    return {name: in_memory(tensor) for name, tensor in tensors.items()}


def in_memory(tensor: Tensor) -> Stored:
    """A Stored tensor that is already there."""
    return Stored(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), lambda: tensor)


# ---- from Source to Source --------------------------------------------------------------------------------------


def without(source: Source, *patterns: str) -> Source:
    """The source less the names that a regular expression finds: the named list of what is ignored on purpose."""
    return {name: item for name, item in source.items() if not any(re.search(pattern, name) for pattern in patterns)}


def under_prefix(source: Source, prefix: str) -> Source:
    """Only the names under a prefix, with the prefix taken off."""
    return {name.removeprefix(prefix): item for name, item in source.items() if name.startswith(prefix)}


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
                folded[stem + "weight"] = _folded(folded.pop(name), folded.pop(stem + direction))
    return folded


def _folded(magnitude: Stored, direction: Stored) -> Stored:
    def read() -> Tensor:
        g, v = magnitude.read().float(), direction.read().float()
        return v * (g / v.norm(dim=tuple(range(1, v.dim())), keepdim=True))

    return Stored(direction.shape, "float32", read)


# ---- into a module ----------------------------------------------------------------------------------------------


def load_strict(
    module: nn.Module, source: Source, where: str, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Fill a module that was built on the meta device; parameters become `dtype` on `device`.

    Raises WeightsError that lists every missing, unknown and mis-shaped tensor; then nothing has been read.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [
        f"{kind} {_listed(sorted(names))}"
        for kind, names in (
            ("missing:", expected.keys() - source.keys()),
            ("unknown:", source.keys() - expected.keys()),
            ("wrong shape:", _misshaped(expected, source)),
        )
        if names
    ]
    if problems:
        raise WeightsError(f"{where}: the tensors do not fit the config; " + "; ".join(problems))
    for name in expected:
        _assign(module, name, source[name].read().to(device=device, dtype=dtype))
    module.requires_grad_(False)
    module.eval()


def _misshaped(expected: dict[str, tuple[int, ...]], source: Source) -> set[str]:
    return {
        f"{name} {source[name].shape} instead of {shape}"
        for name, shape in expected.items()
        if name in source and source[name].shape != shape
    }


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
