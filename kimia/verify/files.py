"""Reading golden sets: JSON, tensors, arrays and sounds; what cannot be read is a GoldenSetError naming the file."""

from __future__ import annotations

import hashlib
import json
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from kimia.errors import AudioError, GoldenSetError
from kimia.model.audio import load_audio
from kimia.verify.report import Case, Comparison

INT16_SCALE = 32767  # stored waveforms are round(32767 * wave)
PCM_SCALE = 32768.0  # of recorded samples
CORRECTED = ("correct", "fixed", "always_add")  # names of what stands beside an `upstream` variant


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise GoldenSetError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:  # neither JSON nor UTF-8
        raise GoldenSetError(f"{path}: is not JSON ({error})") from error
    except RecursionError as error:
        raise GoldenSetError(f"{path}: is nested too deeply to be read") from error


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file, on the CPU, as stored."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise GoldenSetError(f"{path}: cannot be read as safetensors ({error})") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz file, by name."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {str(name): file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, tokenize.TokenError, SyntaxError) as error:
        raise GoldenSetError(f"{path}: cannot be read as npz ({error})") from error


def read_sound(path: Path, rate: int) -> np.ndarray:
    """A sound file as the model hears it: mono float32 samples at `rate` Hz."""
    try:
        return load_audio(path, rate)
    except AudioError as error:
        raise GoldenSetError(str(error)) from error


def wave_facts(wave: np.ndarray) -> dict[str, Any]:
    """What the sets store of a waveform (S,) at the model's rate: its length and a digest of its float32 samples."""
    return {
        "samples_16k": len(wave),
        "wav16k_sha256_f32le": hashlib.sha256(wave.astype("<f4").tobytes()).hexdigest(),
    }


def join_pieces(folder: Path, pieces: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """A waveform put together from int16 ranges of files: {file, start, stop, shift_right} or {zeros}."""
    return np.concatenate([_piece(folder, piece) for piece in pieces]).astype(np.float32) / np.float32(PCM_SCALE)


def _piece(folder: Path, piece: Mapping[str, Any]) -> np.ndarray:
    if "zeros" in piece:
        return np.zeros(piece["zeros"], np.int16)
    path = folder / piece["file"]
    try:
        samples, _ = soundfile.read(str(path), dtype="int16")
    except (OSError, soundfile.LibsndfileError) as error:
        raise GoldenSetError(f"{path}: cannot be read ({error})") from error
    if samples.ndim != 1:
        raise GoldenSetError(f"{path}: pieces are cut from mono files, this one has {samples.shape[1]} channels")
    cut = samples[piece.get("start", 0) : piece.get("stop")]
    return np.asarray(cut >> piece.get("shift_right", 0))


def compare_wave(comparison: Comparison, what: str, wave: torch.Tensor, stored: torch.Tensor, tolerance: float) -> None:
    """Compare with a stored waveform; integers could not hold what lies beyond full scale (the louder cross-fades)."""
    heard = wave if stored.is_floating_point() else wave.clamp(-1.0, 1.0)
    comparison.close(what, heard, full_scale(stored), tolerance)


def full_scale(stored: torch.Tensor) -> torch.Tensor:
    """A stored waveform in float32: integers are divided by their scale."""
    return stored.float() if stored.is_floating_point() else stored.float() / INT16_SCALE


def skip_reason(name: str, entry: Any, names: Collection[str]) -> str:
    """Why an entry is not compared, empty if it is: it shows a defect that this library corrects on purpose."""
    if isinstance(entry, Mapping) and entry.get("reproduces_upstream_defect"):
        return "reproduces a defect of the release"
    if "upstream" in name and any(name.replace("upstream", word) in names for word in CORRECTED):
        return "the release's variant; the corrected one beside it is compared"
    return ""


def listed(
    stage: str,
    file: str,
    entries: Sequence[Any] | Mapping[str, Any],
    compare: Callable[[Mapping[str, Any], Comparison], None],
) -> Iterator[Case]:
    """One case per entry, named `<file>.<name>`; an entry of a list without a name goes by its place.

    What else is wrong with an entry shows when it is run, so that it spoils no other.
    """
    named = _named(entries)
    names = [name for name, _ in named]
    for name, entry in named:
        skip = skip_reason(name, entry, names)
        yield Case(stage, f"{file}.{name}", None if skip else partial(compare, entry), skip)


def _named(entries: Sequence[Any] | Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Entries with their names; those of a mapping are given theirs as a field."""
    if isinstance(entries, Mapping):
        return [
            (name, {**entry, "name": name} if isinstance(entry, Mapping) else entry) for name, entry in entries.items()
        ]
    return [
        (str(entry.get("name", f"[{place}]")) if isinstance(entry, Mapping) else f"[{place}]", entry)
        for place, entry in enumerate(entries)
    ]
