"""The least that any durable worker must do: read a message, commit it, publish an answer.

`python -m benchmarks.echo_responder PORT FILE`: asyncio and hiredis, no client library. Hears `bench.ask`, answers on
`bench.answer`; says hello there when it is subscribed.
"""

from __future__ import annotations

import asyncio
import signal
import sqlite3
import sys
from pathlib import Path

import hiredis

from benchmarks.broker_link import packed


class Responder(asyncio.Protocol):
    """Hears questions, commits each, answers through another connection.

    Args:
        database: where questions are kept.
        out: the connection to answer through.
    """

    def __init__(self, database: sqlite3.Connection, out: asyncio.WriteTransport) -> None:
        self._database = database
        self._out = out
        self._reader = hiredis.Reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Subscribe."""
        if isinstance(transport, asyncio.WriteTransport):
            transport.write(packed("SUBSCRIBE", "bench.ask"))

    def data_received(self, data: bytes) -> None:
        """Answer what has come."""
        self._reader.feed(data)
        while (reply := self._reader.gets()) is not False:
            if reply[0] == b"message":
                self._database.execute("INSERT INTO kept (body) VALUES (?)", (reply[2],))
            self._out.write(packed("PUBLISH", "bench.answer", reply[2]))


async def serve(port: int, file: Path) -> None:
    """Answer until SIGTERM."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    database = sqlite3.connect(file, isolation_level=None)  # each statement commits
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    database.execute("CREATE TABLE kept (number INTEGER PRIMARY KEY, body BLOB)")
    out, _ = await loop.create_connection(asyncio.Protocol, "127.0.0.1", port)
    transport, _ = await loop.create_connection(lambda: Responder(database, out), "127.0.0.1", port)
    await stop.wait()
    transport.close()
    out.close()
    database.close()


if __name__ == "__main__":
    asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2])))
