"""A short name for weights of a checkpoint, so that what some have computed is never taken for that of others."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

WEIGHTS = (".safetensors", ".pt")
SAMPLES = 16  # places of a weight file that are looked at
SAMPLE_BYTES = 4096
DIGITS = 16


def fingerprint(folders: Iterable[Path], *conditions: str) -> str:
    """Hexadecimal digits that change with any config and, but for rare cases, any weight in the folders.

    Small files count with all their bytes, weights with their size and samples spread over them, so that gigabytes
    need not be read; names of folders do not count. `conditions` is what else the results depend on.
    """
    digest = hashlib.sha256("\0".join(conditions).encode())
    for folder in folders:
        for path in sorted(path for path in folder.iterdir() if path.is_file()):
            digest.update(f"\0{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(_sampled(path) if path.suffix in WEIGHTS else path.read_bytes())
    return digest.hexdigest()[:DIGITS]


def _sampled(path: Path) -> bytes:
    size = path.stat().st_size
    if size <= SAMPLES * SAMPLE_BYTES:
        return path.read_bytes()
    samples = []
    with path.open("rb") as file:
        for place in range(SAMPLES):
            file.seek(place * (size - SAMPLE_BYTES) // (SAMPLES - 1))
            samples.append(file.read(SAMPLE_BYTES))
    return b"".join(samples)
