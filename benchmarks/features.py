"""Input features of the language model: blobs in Redis, against a direct fetch by gRPC from the process that made them.

128 kB per second of sound (12.5 rows of 5120 values in bfloat16), in pieces of 12 rows, as the tokenizer cuts them.
Both ways carry the same serialised messages, and the time ends when the reader has parsed them. gRPC gets
the better part: the pieces lie in its memory, which a stage would need to keep for all who may yet ask.

    python -m benchmarks.features serve     # the process that made the features (started by the benchmark itself)
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import redis.asyncio as redis
from redis import Redis as SyncRedis

from kimia.streams.blobs import Blobs
from kimia.streams.wire import Wire
from kimia.v1.stages_pb2 import EncodeRequest, EncodeResponse
from kimia.v1.stages_pb2_grpc import TokenizerServicer, TokenizerStub, add_TokenizerServicer_to_server
from kimia.v1.turn_pb2 import FEATURE_TYPE_BF16, Chunk, Encoded, Turn

WIDTH = 5120
ROW_BYTES = 2 * WIDTH  # bfloat16
PIECE_ROWS = 12
ROWS_PER_SECOND = 12.5
LENGTHS = (1, 10, 30)  # seconds of sound
MESSAGE_LIMIT = 8 << 20  # bytes, as the service has it

Fetch = Callable[[], Awaitable[Sequence[Encoded]]]


def pieces(seconds: float) -> list[Encoded]:
    """Features of a clip, cut as the tokenizer cuts them."""
    rows = round(seconds * ROWS_PER_SECOND)
    found = []
    for start in range(0, rows, PIECE_ROWS):
        count = min(PIECE_ROWS, rows - start)
        data = os.urandom(count * ROW_BYTES)
        codes = list(range(start, start + count))
        found.append(Encoded(codes=codes, features=data, feature_type=FEATURE_TYPE_BF16, feature_width=WIDTH))
    found[-1].clip_end = True
    return found


# ---- the process that made them ---------------------------------------------------------------------------------


class Source(TokenizerServicer):
    """Gives out, again and again, what it has in memory; the turn's seed says how many seconds of sound."""

    def __init__(self) -> None:
        self._pieces = {seconds: pieces(seconds) for seconds in LENGTHS}

    async def Encode(
        self,
        request_iterator: AsyncIterator[EncodeRequest],
        context: object,  # noqa: ARG002
    ) -> AsyncIterator[EncodeResponse]:
        """The pieces; the time of encoding is not part of this benchmark."""
        async for request in request_iterator:
            for index, encoded in enumerate(self._pieces[request.turn.seed]):
                yield EncodeResponse(chunk=Chunk(index=index, encoded=encoded))
            return


async def _serve() -> None:
    server = grpc.aio.server(options=[("grpc.max_send_message_length", MESSAGE_LIMIT)])
    add_TokenizerServicer_to_server(Source(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await server.wait_for_termination()


@contextmanager
def source() -> Iterator[str]:
    """The process with the features; its address."""
    command = [sys.executable, "-m", "benchmarks.features", "serve"]
    root = Path(__file__).resolve().parents[1]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield f"127.0.0.1:{process.stdout.readline().strip()}"
        finally:
            process.terminate()


# ---- both ways --------------------------------------------------------------------------------------------------


async def compare(blob_url: str, repeats: int) -> dict[str, Any]:
    """Both ways, for clips of every length."""
    wire = await Wire.connect(blob_url)
    try:
        with source() as address:
            async with grpc.aio.insecure_channel(address) as channel:
                await channel.channel_ready()
                lengths = {f"{seconds} s": await _length(wire, channel, seconds, repeats) for seconds in LENGTHS}
                return {"lengths": lengths, "publishing_beside": await _beside(wire, channel, repeats)}
    finally:
        await wire.aclose()


async def _length(wire: Wire, channel: grpc.aio.Channel, seconds: int, repeats: int) -> dict[str, Any]:
    blobs, clip = Blobs(wire), pieces(seconds)
    names = [f"{{0}}:blob:default:bench:{seconds}:{index}" for index in range(len(clip))]

    async def put() -> Sequence[Encoded]:
        for name, encoded in zip(names, clip, strict=True):
            await blobs.put(name, encoded.SerializeToString())
        return clip

    async def put_at_once() -> Sequence[Encoded]:
        async with wire.blobs.pipeline(transaction=False) as pipe:
            for name, encoded in zip(names, clip, strict=True):
                pipe.set(name, encoded.SerializeToString(), px=900_000)
            await pipe.execute()
        return clip

    async def get() -> Sequence[Encoded]:
        return [Encoded.FromString(data or b"") for data in await blobs.get(names)]

    async def fetch() -> Sequence[Encoded]:
        call = TokenizerStub(channel).Encode(_ask(seconds))
        return [response.chunk.encoded async for response in call]

    async def measured(way: Fetch) -> dict[str, float]:
        return await _measure(way, clip, wire.blobs, repeats)

    ways = {"put": put, "put_at_once": put_at_once, "get": get, "get_again": get, "grpc": fetch, "grpc_again": fetch}
    return {name: await measured(way) for name, way in ways.items()}


async def _beside(wire: Wire, channel: grpc.aio.Channel, repeats: int) -> dict[str, dict[str, float]]:
    """p50 and p99 in ms of a small command on the same server while the longest clip is fetched over and over."""
    longest = max(LENGTHS)
    names = [f"{{0}}:blob:default:bench:{longest}:{index}" for index in range(len(pieces(longest)))]

    async def get() -> None:
        await Blobs(wire).get(names)

    async def fetch() -> None:
        async for _ in TokenizerStub(channel).Encode(_ask(longest)):
            pass

    async def rest() -> None:
        await asyncio.sleep(0.01)

    return {name: await _ping(wire, way, repeats) for name, way in (("idle", rest), ("blobs", get), ("grpc", fetch))}


async def _ping(wire: Wire, way: Callable[[], Awaitable[None]], repeats: int) -> dict[str, float]:
    """The small command comes from a process of its own, so that only the server is shared."""
    port = wire.blobs.connection_pool.connection_kwargs["port"]
    command = [sys.executable, "-m", "benchmarks.features", "ping", str(port)]
    with subprocess.Popen(
        command, cwd=Path(__file__).resolve().parents[1], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        for _ in range(repeats):
            await way()
        process.terminate()
        p50, p99 = map(float, process.stdout.read().split())
    return {"p50_ms": p50, "p99_ms": p99}


def _pings(port: int) -> None:
    """Ping until SIGTERM, a thousand times a second, and say how long it took."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stopped.append(number))
    times = []
    with SyncRedis(host="127.0.0.1", port=port) as client:
        client.ping()
        print("pinging", flush=True)
        while not stopped:
            begun = time.perf_counter()
            client.ping()
            times.append(1e3 * (time.perf_counter() - begun))
            time.sleep(0.001)
    print(*(float(np.percentile(times, q)) for q in (50, 99)))


async def _ask(seconds: int) -> AsyncIterator[EncodeRequest]:
    yield EncodeRequest(turn=Turn(seed=seconds))


async def _measure(way: Fetch, clip: Sequence[Encoded], client: redis.Redis, repeats: int) -> dict[str, float]:
    """p50 and p99 in ms, bytes on the wire of Redis for each run, and of the messages themselves."""
    await way()
    before, times = await _network(client), []
    for _ in range(repeats):
        begun = time.perf_counter()
        found = await way()
        times.append(1e3 * (time.perf_counter() - begun))
        if [len(piece.features) for piece in found] != [len(piece.features) for piece in clip]:
            raise RuntimeError("features came back with another size")
    moved = (await _network(client) - before) / repeats
    content = sum(piece.ByteSize() for piece in clip)
    p50, p99 = (float(np.percentile(times, q)) for q in (50, 99))
    return {"p50_ms": p50, "p99_ms": p99, "redis_bytes": moved, "message_bytes": content, "runs": repeats}


async def _network(client: redis.Redis) -> int:
    stats = await client.info("stats")
    return int(stats["total_net_input_bytes"] + stats["total_net_output_bytes"])


if __name__ == "__main__":
    if sys.argv[1] == "ping":
        _pings(int(sys.argv[2]))
    else:
        asyncio.run(_serve())
