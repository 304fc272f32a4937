"""The SDK: talk to a running service. Needs grpc and protobuf, no model and no torch.

from kimia.client import Kimia

with Kimia("localhost:50051") as kimia:
    print(kimia.transcribe("call.wav"))
"""

from kimia.client.aio import AsyncKimia, AsyncTurn
from kimia.client.aio_call import AsyncCall
from kimia.client.connection import ClientOptions, Identity
from kimia.client.events import (
    Answer,
    AudioChunk,
    ClientTimes,
    Event,
    Latency,
    StageLatency,
    TextDelta,
    TurnCancelled,
    TurnDone,
    TurnFailed,
    TurnStarted,
    Usage,
)
from kimia.client.requests import Session
from kimia.client.sync import Kimia, Turn
from kimia.client.sync_call import Call

__all__ = [
    "Answer",
    "AsyncCall",
    "AsyncKimia",
    "AsyncTurn",
    "AudioChunk",
    "Call",
    "ClientOptions",
    "ClientTimes",
    "Event",
    "Identity",
    "Kimia",
    "Latency",
    "Session",
    "StageLatency",
    "TextDelta",
    "Turn",
    "TurnCancelled",
    "TurnDone",
    "TurnFailed",
    "TurnStarted",
    "Usage",
]
