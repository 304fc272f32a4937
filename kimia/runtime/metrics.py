"""Every Prometheus metric of every process, on one page. Labels are `stage` and `outcome`, never an id.

`stage` is tokenizer, llm, detokenizer or orchestrator; `docs/operations.md` explains what to watch.
"""

from __future__ import annotations

from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from kimia.errors import SettingsError

__all__ = ["MetricsServer", "start_metrics"]

disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the series and nobody reads them

# Seconds. Fine where a caller feels it (10 ms to 1 s), coarse above.
FELT = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0, 10.0, 30.0)
# Seconds. Whole turns.
LONG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0)
# Seconds. One round trip to Redis.
QUICK = (0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
# Ratio: computing time over the length of the speech. Below 1 keeps up.
RATIO = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 5.0)

# ---- a stage ----
TURNS = Counter(
    "kimia_turns", "Turns that ended, by outcome: done, cancelled, error, handed_over", ["stage", "outcome"]
)
ROWS = Gauge("kimia_rows", "Rows: turns that this process can compute at once", ["stage"])
ROWS_USED = Gauge("kimia_rows_used", "Rows in use", ["stage"])
PARKED = Gauge("kimia_rows_parked", "Turns whose row is given to others until their caller needs more", ["stage"])
ROW_WAIT = Histogram(
    "kimia_row_wait_seconds",
    "Seconds that a parked turn waited for a row when it needed one again",
    ["stage"],
    buckets=FELT,
)
CLAIMS = Counter("kimia_claims", "Turns claimed from the job streams", ["stage"])
TAKE_OVERS = Counter("kimia_take_overs", "Turns taken over from a worker that fell silent", ["stage"])
QUEUE_WAIT = Histogram(
    "kimia_queue_wait_seconds", "Seconds from a job's queueing to its claim", ["stage"], buckets=FELT
)
FIRST_CHUNK = Histogram(
    "kimia_first_chunk_seconds", "Seconds from a turn's start in this stage to its first chunk", ["stage"], buckets=FELT
)
REBUILD = Histogram(
    "kimia_rebuild_seconds",
    "Seconds from the claim of a turn that had begun to its next chunk, parking left out",
    ["stage"],
    buckets=FELT,
)
STAGE_LATENCY = Histogram(
    "kimia_stage_seconds", "Seconds from a turn's start in this stage to its last chunk", ["stage"], buckets=LONG
)
PUBLISH = Histogram("kimia_publish_seconds", "Seconds of one publishing round trip", ["stage"], buckets=QUICK)
REAL_TIME_FACTOR = Histogram(
    "kimia_real_time_factor", "Ratio: seconds of computing per second of sound", ["stage"], buckets=RATIO
)
ENCODED = Counter(
    "kimia_encoded_sound_seconds",
    "Seconds of sound that turns needed encoded, by outcome: made, or found in the blob store; early: made before that",
    ["outcome"],
)
JOBS_WAITING = Gauge(
    "kimia_jobs_waiting", "Turns queued for the stage and not claimed; above 0 for long: an alarm", ["stage"]
)

# ---- the language model ----
PREFIX_TURNS = Counter(
    "kimia_prefix_turns",
    "Later turns of conversations, by outcome: hit (KV of the beginning of their prompt was there), miss",
    ["outcome"],
)
PREFIX_POSITIONS = Counter(
    "kimia_prefix_positions",
    "Positions of the prompts of later turns, by outcome: hit (their KV was there), miss (they were read)",
    ["outcome"],
)
PREFIX_BYTES = Gauge("kimia_prefix_bytes", "Memory of the KV that is kept for conversations' next turns")

# ---- the orchestrator ----
FIRST_TEXT = Histogram("kimia_first_text_seconds", "Seconds from a turn's start to its first text (TTFT)", buckets=FELT)
FIRST_AUDIO = Histogram(
    "kimia_first_audio_seconds", "Seconds from a turn's start to its first speech (TTFA)", buckets=FELT
)
UNDERRUN = Counter("kimia_underrun_seconds", "Seconds that callers waited for speech after it had begun")
SESSIONS = Gauge("kimia_sessions", "Calls and turns that this process serves")

# ---- admission ----
REFUSED = Counter(
    "kimia_refused", "Admissions refused, by the stage that lacks a row; tenant: the tenant's own limit", ["stage"]
)
CAPACITY = Gauge(
    "kimia_capacity_rows", "Rows of the stage in all live workers together; told by orchestrators", ["stage"]
)
RESERVED = Gauge(
    "kimia_reserved_rows", "Rows of the stage that sessions have reserved; told by orchestrators", ["stage"]
)


@dataclass(frozen=True)
class MetricsServer:
    """The HTTP server of `/metrics`."""

    port: int
    _server: WSGIServer
    _thread: Thread

    def close(self) -> None:
        """Stop it and free its port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def start_metrics(port: int, host: str = "127.0.0.1") -> MetricsServer:
    """Serve the metrics at http://host:port/metrics; port 0 takes any free one. Raises SettingsError."""
    try:
        server, thread = start_http_server(port, addr=host)
    except (OSError, OverflowError) as error:
        raise SettingsError(f"KIMIA_METRICS_PORT: cannot listen on {host}:{port} ({error}); choose another") from error
    return MetricsServer(server.server_port, server, thread)
