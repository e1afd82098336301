"""A peer that talks bytes: for what no HTTP server of good manners does."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@contextlib.asynccontextmanager
async def raw_peer(talk: Talk) -> AsyncIterator[str]:
    """Run `talk` for each connection. Yields the URL; ends when all connections have ended."""
    talks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        talks.add(task)
        with contextlib.suppress(OSError):  # the client has left
            await talk(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, limit=4096)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/r"
        await asyncio.gather(*talks)
