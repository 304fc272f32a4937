"""How many GPUs so many calls need, stage by stage, with the arithmetic shown.

A stage is kept up with when the work that arrives in a second takes at most `LOAD` seconds. What a run takes comes from
one of two sources (`Times`): `Floors`, the cost model of `kimia.model.cost` at a GPU's data-sheet rates times a factor
for what programs do not reach, or `Measured`, a profile that `benchmarks/gpu.sh` has written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from kimia.errors import ConfigError, ParameterError
from kimia.model import cost
from kimia.model.config import FlowConfig, read_json
from kimia.model.consistency import ModelConfigs
from kimia.model.cost import Cost, FlowChunk
from kimia.model.detokenize import UPSAMPLE
from kimia.model.gpus import GPU
from kimia.model.presets import LOW_LATENCY
from kimia.model.prompt import TOKEN_RATE

LOAD = 0.8  # share of a second that a stage may compute: the rest is for what arrives unevenly
OVER_FLOOR = 1.5  # what a run takes, over its floor, where nothing was measured
BF16, FP32 = 2, 4  # bytes of a value
RESERVED = 0.1  # share of a GPU's memory for activations, buffers and the allocator
MOST_ROWS = 512  # of one decode step

COMMITTED = LOW_LATENCY.commits[-1]  # tokens of a steady chunk
STEADY = FlowChunk(
    frames=(COMMITTED + LOW_LATENCY.look_ahead) * UPSAMPLE,
    committed=COMMITTED * UPSAMPLE,
    evaluations=LOW_LATENCY.ode_points - 1,
    prefix=LOW_LATENCY.kv_window,
)
CHUNK_SECONDS = COMMITTED / TOKEN_RATE  # of speech in a steady chunk
SEGMENT_SECONDS = 30.0
CHUNK_ROWS = (1, 2, 4, 8, 16, 32)  # chunks that may be solved together
VQ_FRAMES = 50  # encoder frames a second, before pooling


@dataclass(frozen=True)
class Traffic:
    """Calls at once, and what one of them does. Raises ParameterError for what no call does."""

    calls: int
    speech_share: float = 0.45  # of the time the service speaks
    turns_per_minute: float = 4.0
    question_seconds: float = 5.0  # of sound that a turn brings
    prompt: int = 2000  # positions of the conversation at a turn's beginning
    reuse: float = 0.0  # share of them whose keys and values are still there

    def __post_init__(self) -> None:
        for name, there in (
            ("calls", self.calls >= 1),
            ("speech share", 0 < self.speech_share <= 1),
            ("turns per minute", self.turns_per_minute > 0),
            ("question seconds", self.question_seconds > 0),
            ("prompt", self.prompt >= 1),
            ("reuse", 0 <= self.reuse < 1),
        ):
            if not there:
                raise ParameterError(f"{name}: no call is like this; see kimia plan --help for what it means")

    @property
    def speaking(self) -> float:
        """Calls that the service speaks to at once."""
        return self.calls * self.speech_share

    @property
    def turns(self) -> float:
        """Turns that begin in a second."""
        return self.calls * self.turns_per_minute / 60

    @property
    def answer_positions(self) -> float:
        """Steps of one answer."""
        return TOKEN_RATE * self.speech_share * 60 / self.turns_per_minute

    @property
    def context(self) -> int:
        """Positions behind a step, on average."""
        return round(self.prompt + self.answer_positions / 2)


class Times(Protocol):
    """Seconds that runs take on one GPU."""

    @property
    def source(self) -> str:
        """Where they come from, for the reader."""

    def encode(self, seconds: float) -> float:
        """Both encoders over one recording."""

    def prefill(self, positions: float) -> float:
        """Positions of a prompt."""

    def decode(self, rows: int, context: int) -> float:
        """One step of so many rows."""

    def speak(self, rows: int) -> float:
        """One steady chunk of each of so many turns, with its sound."""


# ---- where times come from --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floors:
    """By the cost model."""

    configs: ModelConfigs
    gpu: GPU
    over: float = OVER_FLOOR

    @property
    def source(self) -> str:
        """Words for the reader."""
        return f"floors of the cost model at {self.gpu.name}'s data-sheet rates, times {self.over:g}; nothing measured"

    def _seconds(self, work: Cost, bytes_per_value: int = BF16) -> float:
        rate = self.gpu.bf16_flop_per_second if bytes_per_value == BF16 else self.gpu.fp32_flop_per_second
        return self.over * max(work.flop / rate, work.bytes / self.gpu.bytes_per_second)

    def encode(self, seconds: float) -> float:
        """Whisper always reads whole segments; the VQ tokenizer, in float32, what is there."""
        segments = ceil(seconds / SEGMENT_SECONDS)
        frames = ceil(min(seconds, SEGMENT_SECONDS) * VQ_FRAMES)
        whisper = self._seconds(cost.whisper_segment(self.configs.whisper, BF16))
        return segments * (whisper + self._seconds(cost.vq_segment(self.configs.vq, frames, FP32), FP32))

    def prefill(self, positions: float) -> float:
        """All of them with features, which costs most."""
        return self._seconds(cost.prefill(self.configs.lm, ceil(positions), ceil(positions), BF16))

    def decode(self, rows: int, context: int) -> float:
        """Weights are read once for all rows, keys and values for each."""
        one, empty = (cost.decode_step(self.configs.lm, positions, BF16) for positions in (context, 0))
        return self._seconds(Cost(one.flop * rows, empty.bytes + rows * (one.bytes - empty.bytes)))

    def speak(self, rows: int) -> float:
        """As `decode`; the vocoder computes in float32."""
        assert self.configs.flow is not None
        assert self.configs.vocoder is not None
        steady = cost.flow_chunk(self.configs.flow, STEADY, BF16)
        bare = cost.flow_chunk(
            self.configs.flow, FlowChunk(STEADY.frames, STEADY.committed, STEADY.evaluations, 0), BF16
        )
        flow = Cost(steady.flop * rows, bare.bytes + rows * (steady.bytes - bare.bytes))
        sound = cost.vocoder_chunk(self.configs.vocoder, STEADY.committed, FP32)
        return self._seconds(flow) + rows * self._seconds(sound, FP32)


class Measured:
    """By a profile of `benchmarks/gpu.sh`. Between two measured numbers of rows times are interpolated."""

    def __init__(self, profile: Mapping[str, Any], where: str) -> None:
        """Raises ConfigError for a profile that lacks what is needed."""
        self.source = f"measured: {where} ({profile.get('device', 'no device named')})"
        try:
            self._encode = float(profile["encode"]["ms"]) / 1e3
            self._prefill = float(profile["prefill"]["ms_per_1000_positions"]) / 1e6
            self._decode = _by_rows(profile["decode"])
            self._speak = _by_rows(profile["speak"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            rule = f"{where}: no whole profile ({type(error).__name__}: {error})"
            raise ConfigError(f"{rule}; let benchmarks/gpu.sh finish, or leave --measured out") from error

    @classmethod
    def read(cls, path: Path) -> Measured:
        """From its file. Raises CheckpointError where it cannot be opened, else ConfigError."""
        profile = read_json(path)
        if not isinstance(profile, dict):
            raise ConfigError(f"{path}: a profile is an object; name the file that benchmarks/gpu.sh has written")
        return cls(profile, str(path))

    def encode(self, seconds: float) -> float:
        """One segment of 30 s was measured."""
        return self._encode * ceil(seconds / SEGMENT_SECONDS)

    def prefill(self, positions: float) -> float:
        """In proportion."""
        return self._prefill * positions

    def decode(self, rows: int, context: int) -> float:  # noqa: ARG002 - as deep as it was measured
        """Infinity beyond what was measured."""
        return _between(self._decode, rows)

    def speak(self, rows: int) -> float:
        """Infinity beyond what was measured."""
        return _between(self._speak, rows)


def _by_rows(found: Mapping[str, Any]) -> dict[int, float]:
    """Seconds by number of rows, ascending."""
    times = {int(rows): float(entry["ms"]) / 1e3 for rows, entry in found.items()}
    if not times:
        raise ValueError("no rows")
    return dict(sorted(times.items()))


def _between(times: Mapping[int, float], rows: int) -> float:
    counts = list(times)
    at = bisect_left(counts, rows)
    if at == len(counts):
        return float("inf")
    if at == 0 or counts[at] == rows:
        return times[counts[at]]
    low, high = counts[at - 1], counts[at]
    return times[low] + (times[high] - times[low]) * (rows - low) / (high - low)


# ---- the plan ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StagePlan:
    """One stage: its replicas, one GPU each, and why."""

    stage: str
    replicas: int
    rows: int  # turns at once of one replica
    why: tuple[str, ...]


def plan(
    traffic: Traffic, configs: ModelConfigs, gpu: GPU, times: Times, *, quantized: bool = False
) -> list[StagePlan]:
    """Every stage. Raises ParameterError where one GPU cannot hold a stage, or keep up with a single call.

    With `quantized` weights of the language model more keys and values fit. Its steps are not taken to be faster:
    whether they are depends on kernels, and was never measured.
    """
    weights = cost.language_model_bytes(configs.lm, BF16, quantized)
    return [
        _tokenizer(traffic, configs, gpu, times),
        _language_model(traffic, configs, gpu, times, weights),
        _detokenizer(traffic, configs, gpu, times),
    ]


def host_bytes(
    configs: ModelConfigs, rows: Mapping[str, int], kept: int | None = None, *, quantized: bool = False
) -> dict[str, float]:
    """What each stage of a co-located host may take of its GPU, by name: weights, and the state of its turns.

    `rows` of each stage by name. Keys and values of the llm: `kept` bytes (KIMIA_PREFIX_BYTES; None: its rows filled to
    the end of the context); of the detokenizer: twice its rows, since a parked turn keeps its own.
    """
    assert configs.flow is not None
    filled = rows["llm"] * configs.lm.max_positions * cost.kv_bytes_per_position(configs.lm, BF16)
    parked = 2 * rows["detokenizer"] * _flow_turn_bytes(configs.flow)
    return {
        "tokenizer": _encoder_bytes(configs),
        "llm": cost.language_model_bytes(configs.lm, BF16, quantized) + (filled if kept is None else kept),
        "detokenizer": _speech_bytes(configs) + parked,
    }


def check_host(needed: Mapping[str, float], free: float) -> None:
    """Raise ParameterError with the arithmetic where stages that take so many bytes do not fit in `free` bytes."""
    if sum(needed.values()) > free * (1 - RESERVED):
        told = " + ".join(f"{stage} {_gb(size)}" for stage, size in needed.items())
        raise ParameterError(
            f"{told} do not fit in nine tenths of the {_gb(free)} that are free on this GPU; lower KIMIA_LLM_ROWS or "
            "KIMIA_PREFIX_BYTES, set KIMIA_QUANTIZE, or give the stages GPUs of their own"
        )


def _encoder_bytes(configs: ModelConfigs) -> int:
    """Weights of the tokenizer."""
    counts = cost.parameter_counts(configs)
    return counts["whisper encoder"] * BF16 + counts["vq tokenizer"] * FP32


def _speech_bytes(configs: ModelConfigs) -> int:
    """Weights of the detokenizer."""
    counts = cost.parameter_counts(configs)
    return counts["flow matching"] * BF16 + counts["vocoder"] * FP32


def _flow_turn_bytes(flow: FlowConfig) -> int:
    """Keys and values of one turn in the detokenizer."""
    return 2 * flow.hidden_size * flow.depth * (STEADY.prefix + STEADY.frames) * BF16


def _tokenizer(traffic: Traffic, configs: ModelConfigs, gpu: GPU, times: Times) -> StagePlan:
    each = times.encode(traffic.question_seconds)
    busy = traffic.turns * each
    replicas = max(1, ceil(busy / LOAD))
    why = (
        f"{traffic.turns:.1f} turns/s ({traffic.calls} calls x {traffic.turns_per_minute:g}/min) x {_ms(each)} = "
        f"{busy:.2f} s of work a second; / {LOAD} = {replicas}",
        _fits("tokenizer", _encoder_bytes(configs), 0, gpu),
    )
    return StagePlan("tokenizer", replicas, 1, why)


def _language_model(traffic: Traffic, configs: ModelConfigs, gpu: GPU, times: Times, weights: int) -> StagePlan:
    """`weights` in bytes."""
    per_call = round((traffic.prompt + traffic.answer_positions) * cost.kv_bytes_per_position(configs.lm, BF16))
    room = int((gpu.memory_bytes * (1 - RESERVED) - weights) // per_call)
    prefill = times.prefill(traffic.prompt * (1 - traffic.reuse))
    turns_of_speaking = traffic.turns_per_minute / 60 / traffic.speech_share  # a second, per call that is spoken to

    def busy(rows: int) -> float:
        return TOKEN_RATE * times.decode(rows, traffic.context) + rows * turns_of_speaking * prefill

    fitting = [rows for rows in range(1, min(room, MOST_ROWS) + 1) if busy(rows) <= LOAD]
    if not fitting:
        _fits("language model", weights, per_call, gpu)
        raise ParameterError(
            f"language model: one {gpu.name} does not keep up with a single call: {busy(1):.2f} s of work a second; "
            "take a faster GPU, a shorter --prompt or more --reuse"
        )
    rows = min(fitting[-1], ceil(traffic.speaking))
    replicas = ceil(traffic.speaking / rows)
    rows = ceil(traffic.speaking / replicas)
    step = times.decode(rows, traffic.context)
    all_calls = ceil(traffic.calls / replicas)
    kept = "fit" if all_calls <= room else f"do not fit: {room} do, the others' prompts are read again"
    why = (
        f"{traffic.speaking:.0f} of {traffic.calls} calls are spoken to at once (share {traffic.speech_share:g}): "
        f"{rows} rows in each of {replicas}",
        f"{TOKEN_RATE:g} steps/s x {_ms(step)} behind {traffic.context} positions + "
        f"{rows * turns_of_speaking:.2f} prompts/s x {_ms(prefill)} ({traffic.prompt} positions, {traffic.reuse:.0%} "
        f"there already) = {busy(rows):.2f} s of work a second <= {LOAD}; a step has 80 ms",
        _fits("language model", weights, rows * per_call, gpu),
        f"keys and values of all {all_calls} calls of a replica ({_gb(per_call)} each) {kept}",
    )
    return StagePlan("llm", replicas, rows, why)


def _detokenizer(traffic: Traffic, configs: ModelConfigs, gpu: GPU, times: Times) -> StagePlan:
    assert configs.flow is not None
    weights, per_call = _speech_bytes(configs), _flow_turn_bytes(configs.flow)
    seconds = {rows: times.speak(rows) / rows for rows in CHUNK_ROWS if times.speak(rows) < float("inf")}
    if not seconds:
        raise ParameterError("detokenizer: the profile has no time of a chunk; run benchmarks/gpu.sh again")
    together = min(seconds, key=lambda rows: seconds[rows])
    busy = traffic.speaking / CHUNK_SECONDS * seconds[together]
    room = int((gpu.memory_bytes * (1 - RESERVED) - weights) // per_call)
    replicas = max(1, ceil(busy / LOAD), ceil(traffic.speaking / max(room, 1)))
    rows = ceil(traffic.speaking / replicas)
    why = (
        f"{traffic.speaking:.0f} calls / {CHUNK_SECONDS:.2f} s of speech in a chunk x {_ms(seconds[together])} a chunk "
        f"({together} solved together) = {busy:.2f} s of work a second; / {LOAD} = {replicas}",
        _fits("detokenizer", weights, rows * per_call, gpu),
    )
    return StagePlan("detokenizer", replicas, rows, why)


def _fits(stage: str, weights: float, more: float, gpu: GPU) -> str:
    """The arithmetic of memory. Raises ParameterError when it does not fit."""
    usable = gpu.memory_bytes * (1 - RESERVED)
    told = (
        f"memory: weights {_gb(weights)} + keys and values {_gb(more)}" if more else f"memory: weights {_gb(weights)}"
    )
    if weights + more > usable:
        raise ParameterError(
            f"{stage}: {told} do not fit the {_gb(usable)} of a {gpu.name} that may be used; take a larger GPU"
        )
    return f"{told} <= {_gb(usable)} of {gpu.name}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"
