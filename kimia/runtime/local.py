"""The in-process adapter: a turn through its stages, joined by queues. For tests, the command line and notebooks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence

from kimia.errors import ParameterError
from kimia.stage import Stage, StageKind, route_of
from kimia.v1.turn_pb2 import Chunk, Turn

Produced = tuple[StageKind, Chunk]


async def run_route(stages: Mapping[str, Stage], turn: Turn, input: Sequence[Chunk] = ()) -> AsyncIterator[Produced]:
    """Every chunk that the stages of `turn.route` give out, in order of production, with the stage that made it.

    `stages` by name; `input` is what the first stage reads: the whole `input` log, or, where the route begins later,
    the `encoded` or `tokens` log, possibly empty. The stages run at the same time; closing the iterator ends them all.
    Raises what a stage raises, and ParameterError when one is missing.
    """
    produced: asyncio.Queue[Produced | Exception | None] = asyncio.Queue()
    tasks = _start(stages, turn, input, produced)
    running = len(tasks)
    try:
        while running:
            item = await produced.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _start(
    stages: Mapping[str, Stage],
    turn: Turn,
    input: Sequence[Chunk],
    produced: asyncio.Queue[Produced | Exception | None],
) -> list[asyncio.Task[None]]:
    """One task per stage of the route, each reading what the one before it writes."""
    route = route_of(turn)
    missing = [kind.name for kind in route if kind.name not in stages]
    if missing:
        raise ParameterError(f"the turn passes {', '.join(missing)}, which was not given; add it to `stages`")
    inbox = _replay(input)
    tasks = []
    for kind in route:
        written: asyncio.Queue[Chunk] = asyncio.Queue()
        tasks.append(asyncio.create_task(_run(stages[kind.name], turn, inbox, written, produced)))
        inbox = _follow(written)
    return tasks


async def _run(
    stage: Stage,
    turn: Turn,
    inbox: AsyncIterator[Chunk],
    written: asyncio.Queue[Chunk],
    produced: asyncio.Queue[Produced | Exception | None],
) -> None:
    chunks = stage.run(turn, inbox)
    try:
        async for chunk in chunks:
            written.put_nowait(chunk)
            produced.put_nowait((stage.kind, chunk))
        produced.put_nowait(None)
    except Exception as error:  # noqa: BLE001 - the edge of a task: raised again by run_route
        produced.put_nowait(error)
    finally:
        await close(chunks)


async def close(chunks: AsyncIterator[Chunk]) -> None:
    """Close a stage's generator: its turn ends within one step or chunk."""
    aclose = getattr(chunks, "aclose", None)
    if aclose is not None:
        await aclose()


async def _replay(chunks: Sequence[Chunk]) -> AsyncIterator[Chunk]:
    for chunk in chunks:
        yield chunk


async def _follow(written: asyncio.Queue[Chunk]) -> AsyncIterator[Chunk]:
    while True:
        chunk = await written.get()
        yield chunk
        if chunk.final:
            return
