"""What a turn yields: immutable events, times in seconds, sound as bytes in the turn's output format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message as Proto

from kimia.errors import KimiaError
from kimia.v1 import kimi_audio_pb2 as pb
from kimia.v1.turn_pb2 import StageName, StopReason


@dataclass(frozen=True)
class TurnStarted:
    """The turn was accepted."""

    turn_id: str
    session_id: str
    seed: int  # repeats the turn
    encoding: str  # of the speech: "s16le", "f32le", "mulaw" or "alaw"
    sample_rate: int  # Hz


@dataclass(frozen=True)
class TextDelta:
    """Characters of the answer."""

    turn_id: str
    index: int
    text: str


@dataclass(frozen=True)
class AudioChunk:
    """A piece of speech: whole samples; pieces follow one another without gap or overlap."""

    turn_id: str
    index: int
    data: bytes


@dataclass(frozen=True)
class Usage:
    """What a turn took."""

    prompt_positions: int
    steps: int
    audio_codes: int
    audio_samples: int  # at the output rate
    dropped_messages: int  # oldest ones, forgotten because the context was full


@dataclass(frozen=True)
class StageLatency:
    """One stage of a turn; seconds from the turn's start, None where it did not happen."""

    stage: str
    queued: float | None
    claimed: float | None
    first: float | None
    done: float | None
    compute: float | None  # seconds spent computing
    worker: str
    take_overs: int


@dataclass(frozen=True)
class Latency:
    """Where the time of a turn went, on the service's clock; seconds from the turn's start."""

    first_text: float | None
    first_audio: float | None
    total: float | None
    stages: tuple[StageLatency, ...] = ()


@dataclass(frozen=True)
class ClientTimes:
    """The same turn on the caller's clock: seconds from the request to what arrived, None where nothing did."""

    started: float | None = None
    first_text: float | None = None
    first_audio: float | None = None
    total: float | None = None


@dataclass(frozen=True)
class TurnDone:
    """The answer is complete."""

    turn_id: str
    text: str
    stop: str  # "text_eos", "audio_eod" or "max_new_tokens"
    usage: Usage
    latency: Latency


@dataclass(frozen=True)
class TurnCancelled:
    """The turn was stopped by a barge-in."""

    turn_id: str
    heard_codes: int  # semantic tokens (80 ms each) that are remembered


@dataclass(frozen=True)
class TurnFailed:
    """The turn failed; the call goes on."""

    turn_id: str
    error: KimiaError


Event: TypeAlias = TurnStarted | TextDelta | AudioChunk | TurnDone | TurnCancelled | TurnFailed
Ended = TurnDone | TurnCancelled | TurnFailed  # the last event of a turn


@dataclass(frozen=True)
class Answer:
    """A whole turn."""

    text: str
    pcm: bytes  # in `encoding` at `sample_rate`, mono
    sample_rate: int  # Hz
    encoding: str
    turn_id: str
    session_id: str
    seed: int
    stop: str
    usage: Usage
    latency: Latency
    times: ClientTimes

    @property
    def seconds(self) -> float:
        """Length of the speech."""
        return self.usage.audio_samples / self.sample_rate if self.sample_rate else 0.0


# ---- from the wire ----------------------------------------------------------------------------------------------


def seconds(message: Proto, field: str) -> float | None:
    """A duration of `message` in seconds, None when it is unset."""
    if not message.HasField(field):
        return None
    duration: Duration = getattr(message, field)
    return duration.seconds + duration.nanos / 1e9


def read_done(turn_id: str, done: pb.TurnDone) -> TurnDone:
    """The end of an answer as the service tells it."""
    return TurnDone(turn_id, done.text, _name(StopReason.Name(done.stop)), _usage(done.usage), _latency(done.latency))


def _name(value: str) -> str:
    for prefix in ("STOP_REASON_", "STAGE_NAME_"):
        value = value.removeprefix(prefix)
    return value.lower()


def _usage(usage: pb.Usage) -> Usage:
    return Usage(usage.prompt_positions, usage.steps, usage.audio_codes, usage.audio_samples, usage.dropped_messages)


def _latency(latency: pb.Latency) -> Latency:
    first_text, first_audio, total = (seconds(latency, name) for name in ("first_text", "first_audio", "total"))
    return Latency(first_text, first_audio, total, tuple(map(_stage, latency.stages)))


def _stage(stage: pb.StageLatency) -> StageLatency:
    queued, claimed, first, done, compute = (
        seconds(stage, name) for name in ("queued", "claimed", "first", "done", "compute")
    )
    name = _name(StageName.Name(stage.stage))
    return StageLatency(name, queued, claimed, first, done, compute, stage.worker, stage.take_overs)
