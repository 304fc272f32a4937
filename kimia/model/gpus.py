"""Data-sheet figures of GPUs: dense tensor-core rate in bfloat16, plain rate in float32, memory and its bandwidth."""

from __future__ import annotations

from dataclasses import dataclass

from kimia.errors import ParameterError


@dataclass(frozen=True)
class GPU:
    """One device by its maker's data sheet."""

    name: str
    bf16_flop_per_second: float  # dense: the sheets' larger figure counts half of the products as zeros
    fp32_flop_per_second: float
    bytes_per_second: float
    memory_bytes: float


def _gpu(name: str, bf16_tflops: float, fp32_tflops: float, gigabytes_per_second: float, gigabytes: float) -> GPU:
    return GPU(name, bf16_tflops * 1e12, fp32_tflops * 1e12, gigabytes_per_second * 1e9, gigabytes * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h200", 989, 67, 4800, 141),  # SXM
        _gpu("h100", 989, 67, 3350, 80),  # SXM
        _gpu("h100-pcie", 756, 51, 2000, 80),
        _gpu("a100", 312, 19.5, 2039, 80),  # SXM
        _gpu("a100-40", 312, 19.5, 1555, 40),
        _gpu("l40s", 362, 91.6, 864, 48),
        _gpu("l4", 121, 30.3, 300, 24),
        _gpu("a10", 125, 31.2, 600, 24),
        _gpu("4090", 165, 82.6, 1008, 24),  # accumulating in float32
        _gpu("3090", 71, 35.6, 936, 24),  # accumulating in float32
    )
}


def find_gpu(name: str) -> GPU:
    """By its name. Raises ParameterError that lists the names."""
    if name.lower() not in GPUS:
        raise ParameterError(f"gpu must be one of {', '.join(GPUS)}, got {name!r}")
    return GPUS[name.lower()]
