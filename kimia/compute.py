"""What the three model stages share: one thread that computes, one way to load, features as bytes.

Models compute in a single thread of their own, so that the event loop never waits for them; turns take it in order of
arrival, one step or chunk at a time, so that they interleave.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from kimia.errors import AudioError, StateError
from kimia.model.checkpoint import Checkpoint, open_checkpoint
from kimia.model.consistency import ModelConfigs, read_configs
from kimia.pipeline import choose_device, choose_dtype
from kimia.runtime.settings import Settings
from kimia.stage import Log
from kimia.v1.turn_pb2 import (
    FEATURE_TYPE_BF16,
    FEATURE_TYPE_F16,
    FEATURE_TYPE_F32,
    Chunk,
    FeatureType,
)

P = ParamSpec("P")
R = TypeVar("R")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEATURE_TYPES = {torch.float32: FEATURE_TYPE_F32, torch.bfloat16: FEATURE_TYPE_BF16, torch.float16: FEATURE_TYPE_F16}
_FEATURE_DTYPES = {number: dtype for dtype, number in FEATURE_TYPES.items()}


# ---- the thread -------------------------------------------------------------------------------------------------


class ComputeThread:
    """The thread in which a process computes."""

    def __init__(self, threads: int = 0, *, calls: int = 1, stream: torch.cuda.Stream | None = None) -> None:
        """`threads` that torch may use for one operation; 0: as it is set up.

        `calls` at once: 1, except where a call only waits for another machine. `stream`: into which it computes, for as
        long as it lives (`own_stream`); None: the device's default stream.
        """
        self._threads = threads
        self._stream = stream
        self._executor = ThreadPoolExecutor(calls, "compute", initializer=self._set_up)

    def _set_up(self) -> None:
        if self._threads:
            torch.set_num_threads(self._threads)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream(self._stream.device))  # where the weights came in
            torch.cuda.set_stream(self._stream)  # of this thread alone

    def turn(self) -> TurnCompute:
        """What one turn computes, and how long it takes."""
        return TurnCompute(self._executor)

    def close(self) -> None:
        """Wait for what is being computed and end the thread."""
        self._executor.shutdown(cancel_futures=True)


class TurnCompute:
    """The compute thread as one turn uses it; `seconds` counts computing, not waiting."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self.seconds = 0.0

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function in the thread, without gradients, and give what it returns or raises.

        Who is cancelled while waiting takes the call out of the queue; one that has begun runs to its end unheard.
        """

        def call() -> R:
            begin = time.perf_counter()
            try:
                with torch.inference_mode():
                    return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - begin

        return await asyncio.get_running_loop().run_in_executor(self._executor, call)


def own_stream(device: torch.device, *, urgent: bool = False) -> torch.cuda.Stream | None:
    """A stream for one of several stages that compute on a device; None on a CPU, which has none.

    `urgent`: its kernels go before those of the others that wait, as torch.cuda.Stream has it: the lower number first.
    """
    if device.type != "cuda":
        return None
    least, greatest = torch.cuda.Stream.priority_range()  # type: ignore[call-arg]  # static, whatever its stub says
    return torch.cuda.Stream(device, priority=greatest if urgent else least)  # type: ignore[no-untyped-call]


# ---- loading ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelPlace:
    """A checkpoint whose parts belong together, and where it is to compute."""

    checkpoint: Checkpoint
    configs: ModelConfigs
    device: torch.device
    dtype: torch.dtype


def open_model(settings: Settings, *, detokenizer: bool = False) -> ModelPlace:
    """Find the checkpoint of the settings and check its configs; no weight is read.

    Without `detokenizer` its files are neither fetched nor opened. Raises CheckpointError, ParameterError.
    """
    device = choose_device(settings.device or None)
    checkpoint = open_checkpoint(settings.model, settings.vq_tokenizer or None, detokenizer=detokenizer)
    configs = read_configs(checkpoint, detokenizer=detokenizer)
    return ModelPlace(checkpoint, configs, device, choose_dtype(DTYPES.get(settings.dtype), device))


# ---- what lies in logs ------------------------------------------------------------------------------------------


def feature_bytes(features: torch.Tensor) -> bytes:
    """Rows (N, F) of float32, bfloat16 or float16 as bytes, row by row, little-endian."""
    rows: bytes = features.contiguous().cpu().view(torch.uint8).numpy().tobytes()
    return rows


def feature_rows(data: bytes | bytearray, kind: FeatureType.ValueType, width: int) -> torch.Tensor:
    """The rows (N, width) that `feature_bytes` wrote. Raises AudioError when the bytes do not make whole rows.

    They lie in `data` itself where it is a bytearray, else in a copy, since tensors may be written to.
    """
    row_count(data, kind, width)
    own = data if isinstance(data, bytearray) else bytearray(data)
    return torch.frombuffer(own, dtype=_FEATURE_DTYPES[kind]).reshape(-1, width)


def row_count(data: bytes | bytearray, kind: FeatureType.ValueType, width: int) -> int:
    """How many rows of features the bytes hold. Raises AudioError when they do not make whole rows."""
    if not data:
        raise AudioError("the continuous features are missing")
    dtype = _FEATURE_DTYPES.get(kind)
    if dtype is None:
        raise AudioError(f"feature_type {kind} is not known; use F32, BF16 or F16")
    if width < 1 or len(data) % (width * dtype.itemsize):
        raise AudioError(f"{len(data)} bytes of features are no whole rows of {width} values")
    return len(data) // (width * dtype.itemsize)


async def replayed(*chunks: Chunk) -> AsyncIterator[Chunk]:
    """A log that is there already, as a stage's inbox."""
    for chunk in chunks:
        yield chunk


def cut_off(log: Log) -> StateError:
    """The error of a stage whose inbox ends before the log does."""
    return StateError(f"the log `{log}` ended before its final chunk; send every chunk, the last one marked final")
