"""The detokenizer's torch archives as safetensors: stripped, folded, quick to open.

The released `audio_detokenizer/model.pt` is a training state of 19 GB, of which a third is the model;
`vocoder/model.pt` keeps its weights split by weight norm. Both loaders prefer a `model.safetensors` beside them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from tqdm import tqdm

from kimia.errors import CheckpointError, ParameterError, WeightsError
from kimia.model import layout
from kimia.model.bigvgan import released_vocoder
from kimia.model.checkpoint import ARCHIVE, SINGLE_FILE, Checkpoint, Source
from kimia.model.config import FlowConfig, VocoderConfig
from kimia.model.dit import released_flow
from kimia.model.layout import Layout
from kimia.model.writing import stored_bytes, whole_file, write_safetensors

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


@dataclass(frozen=True)
class Conversion:
    """One converted file."""

    archive: Path
    target: Path
    archive_bytes: int
    target_bytes: int

    @property
    def saved_bytes(self) -> int:
        """Disk that is saved once the archive is deleted."""
        return self.archive_bytes - self.target_bytes


def convert(checkpoint: Checkpoint, dtype: str | None = None, *, progress: bool | None = None) -> list[Conversion]:
    """Write `model.safetensors` beside both archives of the detokenizer; the archives stay.

    `dtype` ("bf16" or "fp32") re-types the flow model, None keeps what is stored; the vocoder is always float32.
    Memory stays bounded and a file appears only when complete. Raises CheckpointError when nothing is there to
    convert, WeightsError when an archive does not fit its config.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ParameterError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    present = [folder for folder in (checkpoint.flow, checkpoint.vocoder) if (folder / ARCHIVE).is_file()]
    if not present:
        raise CheckpointError(f"{checkpoint.root}: has no {ARCHIVE} in audio_detokenizer or vocoder to convert")
    done = []
    for folder in present:
        source = _flow_source(folder) if folder == checkpoint.flow else _vocoder_source(folder)
        if dtype is not None and folder == checkpoint.flow:
            source = retyped(source, DTYPES[dtype])
        done.append(_converted(folder, source, progress))
    return done


def _flow_source(folder: Path) -> Source:
    source = released_flow(folder)
    _check_fits(source, layout.flow(FlowConfig.read(folder / "config.yaml")), folder)
    return source


def _vocoder_source(folder: Path) -> Source:
    source = retyped(released_vocoder(folder), "float32")
    _check_fits(source, layout.vocoder(VocoderConfig.read(folder / "config.json")), folder)
    return source


def retyped(source: Source, dtype: str) -> Source:
    """The source, to be stored as `dtype` (torch's name)."""
    return {name: replace(item, dtype=dtype) for name, item in source.items()}


def _check_fits(source: Source, expected: Layout, folder: Path) -> None:
    found = {name: item.shape for name, item in source.items()}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        raise WeightsError(f"{folder / ARCHIVE}: does not fit the config beside it, first in {wrong[0]}; not converted")


def _converted(folder: Path, source: Source, progress: bool | None) -> Conversion:
    archive, target = folder / ARCHIVE, folder / SINGLE_FILE
    total = sum(stored_bytes(item.shape, item.dtype) for item in source.values())
    disable = None if progress is None else not progress
    with (
        whole_file(target) as partial,
        tqdm(total=total, unit="B", unit_scale=True, desc=f"{folder.name}/{target.name}", disable=disable) as bar,
    ):
        write_safetensors(partial, source, {"format": "pt"}, bar.update)
    return Conversion(archive, target, archive.stat().st_size, target.stat().st_size)
