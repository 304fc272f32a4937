"""A line that a test can cut or silence: TCP between a client and one of several servers."""

import asyncio
import contextlib
from typing import Self


class Proxy:
    """Listens on a port of its own and carries bytes to `target`, which may change; `cut` breaks every connection."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.address = ""
        self.connections = 0
        self.delay = 0.0  # seconds that everything is late, in either direction
        self._silent = 0  # so many of them, the first ones, are black holes
        self._lines: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *error: object) -> None:
        self._server.close()
        await self.cut()

    async def cut(self, target: str = "") -> None:
        """Break every connection; later ones go to the target given."""
        self.target = target or self.target
        for line in list(self._lines):
            line.cancel()
        await asyncio.gather(*self._lines, return_exceptions=True)

    def silence(self, target: str = "") -> None:
        """Let nothing pass any more through the connections there are: they stand, and nobody hears of it."""
        self.target = target or self.target
        self._silent = self.connections

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        number = self.connections
        line = asyncio.current_task()
        self._lines.add(line)
        try:
            await self._carry(number, reader, writer)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()
            self._lines.discard(line)

    async def _carry(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, port = self.target.split(":")
        upstream, downstream = await asyncio.open_connection(host, int(port))
        pairs = ((reader, downstream), (upstream, writer))
        ways = [asyncio.create_task(self._pump(number, *pair)) for pair in pairs]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            downstream.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _pump(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if self.delay:
                    await asyncio.sleep(self.delay)
                if number > self._silent:
                    writer.write(data)
                    await writer.drain()
