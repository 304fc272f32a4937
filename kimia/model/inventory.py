"""What a checkpoint folder holds, part by part, and whether each part would load.

Every part is loaded by the code that serving uses: on the meta device to see whether files, names and shapes fit, or
for real to measure the cold start. A part that cannot be used is reported, not raised, so that one look shows all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kimia.errors import CheckpointError
from kimia.model.bigvgan import load_vocoder
from kimia.model.checkpoint import SINGLE_FILE, Checkpoint, safetensors_source, torch_source
from kimia.model.config import EncoderConfig, FlowConfig, LMConfig, VocoderConfig, VQConfig, exact_div
from kimia.model.consistency import read_configs
from kimia.model.dit import load_dit
from kimia.model.lm import load_lm
from kimia.model.text import TextTokenizer
from kimia.model.vq import load_vq
from kimia.model.whisper import load_whisper
from kimia.model.writing import stored_bytes


@dataclass(frozen=True)
class _Kind:
    """How one kind of part is read."""

    name: str
    folder: Path
    licence: str
    config: Callable[[], Any]
    load: Callable[[str], nn.Module]  # on a device
    torch_key: str = ""  # where the tensors lie in a `model.pt`


@dataclass(frozen=True)
class Part:
    """One part of a checkpoint."""

    name: str
    folder: str
    licence: str
    files: dict[str, int]  # name -> bytes
    stored: dict[str, int]  # dtype -> bytes of tensors, those that are ignored included
    parameters: int | None  # that serving keeps; None: the part does not load
    dimensions: dict[str, Any]
    load_seconds: float | None  # None: not measured
    problem: str | None


@dataclass(frozen=True)
class Inventory:
    """A whole checkpoint."""

    root: str
    parts: tuple[Part, ...]
    special_tokens: dict[str, int]
    problems: tuple[str, ...]  # of any part, and of their fit together

    @property
    def bytes(self) -> int:
        """Size of all files listed."""
        return sum(size for part in self.parts for size in part.files.values())


def take_inventory(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, measure: bool) -> Inventory:
    """Look into every part; `measure` loads each in `dtype` on the CPU, one after the other, and lets it go again."""
    parts = tuple(_part(kind, measure) for kind in _kinds(checkpoint, dtype))
    special, problems = {}, [part.problem for part in parts if part.problem]
    try:
        read_configs(checkpoint)
        config = LMConfig.read(checkpoint.root / "config.json")
        special = asdict(TextTokenizer.load(checkpoint.root, config).special)
    except CheckpointError as error:
        problems.append(str(error))
    return Inventory(str(checkpoint.root), parts, special, tuple(dict.fromkeys(problems)))


def _kinds(checkpoint: Checkpoint, dtype: torch.dtype) -> tuple[_Kind, ...]:
    root, whisper, vq = checkpoint.root, checkpoint.whisper, checkpoint.vq_tokenizer
    flow, vocoder = checkpoint.flow, checkpoint.vocoder
    return (
        _Kind(
            "language model",
            root,
            "MIT (moonshotai/Kimi-Audio); derived from Qwen2.5-7B, Apache-2.0",
            lambda: LMConfig.read(root / "config.json"),
            lambda device: load_lm(root, device=device, dtype=dtype),
        ),
        _Kind(
            "whisper encoder",
            whisper,
            "MIT (moonshotai/Kimi-Audio); started from openai/whisper-large-v3, Apache-2.0",
            lambda: EncoderConfig.read(whisper / "config.json"),
            lambda device: load_whisper(whisper, _feature_group(checkpoint), device, dtype).encoder,
        ),
        _Kind(
            "vq tokenizer",
            vq,
            'glm-4-voice licence: commercial use needs registration with Zhipu AI and a "Built with glm-4" notice',
            lambda: VQConfig.read(vq / "config.json"),
            lambda device: load_vq(vq, device),
        ),
        _Kind(
            "flow matching",
            flow,
            "MIT (moonshotai/Kimi-Audio)",
            lambda: FlowConfig.read(flow / "config.yaml"),
            lambda device: load_dit(flow, device, dtype),
            "state_dict",
        ),
        _Kind(
            "vocoder",
            vocoder,
            "MIT (moonshotai/Kimi-Audio); architecture of NVIDIA BigVGAN, MIT",
            lambda: VocoderConfig.read(vocoder / "config.json"),
            lambda device: load_vocoder(vocoder, device, dtype),
            "generator",
        ),
    )


def _feature_group(checkpoint: Checkpoint) -> int:
    adaptor = LMConfig.read(checkpoint.root / "config.json").adaptor_input_dim
    width = EncoderConfig.read(checkpoint.whisper / "config.json").d_model
    return exact_div(adaptor, width, f"{checkpoint.root}: kimia_adaptor_input_dim / Whisper's d_model")


def _part(kind: _Kind, measure: bool) -> Part:
    stored: dict[str, int] = {}
    dimensions: dict[str, Any] = {}
    parameters = load_seconds = problem = None
    try:
        dimensions = asdict(kind.config())
        stored = _stored(kind)
        parameters = sum(tensor.numel() for tensor in kind.load("meta").parameters())
        if measure:
            begin = time.perf_counter()
            kind.load("cpu")
            load_seconds = time.perf_counter() - begin
    except CheckpointError as error:
        problem = str(error)
    files = {path.name: path.stat().st_size for path in _files(kind.folder)}
    return Part(
        kind.name, str(kind.folder), kind.licence, files, stored, parameters, dimensions, load_seconds, problem
    )  # fmt: skip


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.glob("*")) if path.is_file())


def _stored(kind: _Kind) -> dict[str, int]:
    """Bytes by dtype of every tensor in the folder's weight files."""
    sizes: dict[str, int] = {}
    for path in _files(kind.folder):
        if path.suffix == ".safetensors":
            source = safetensors_source(path)
        elif path.suffix == ".pt" and not (kind.folder / SINGLE_FILE).exists():
            source = torch_source(path, kind.torch_key)
        else:
            continue
        for item in source.values():
            sizes[item.dtype] = sizes.get(item.dtype, 0) + stored_bytes(item.shape, item.dtype)
    return sizes
