"""A request body made of a file between two short texts: streamed, paced by the bandwidth cap, memory bounded."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from orchestrator_client.errors import TransferError
from orchestrator_client.transfers.bandwidth import Bandwidth

_FIRST_PIECE: Final = 256 * 1024
_LARGEST_PIECE: Final = 2 * 1024**2
_SMALLEST_PIECE: Final = 16 * 1024
_QUICK_SEC: Final = 0.1
_SLOW_SEC: Final = 1.0

ParamsT = ParamSpec("ParamsT")
ResultT = TypeVar("ResultT")


class FileBody:
    """The bytes of one attempt: head, file, tail.

    Args:
        file: what is sent, at its beginning.
        head: goes before it.
        tail: goes after it.
        bandwidth: the cap.
        on_progress: hears bytes of the file that were handed to the network, and its size.

    Attributes:
        length: of all three, bytes.
        on_pause: hears seconds that the cap made us wait: they are not the peer's fault.
        sent: bytes that were handed to the network.
        is_sent: whether that is all of them.
    """

    def __init__(
        self,
        file: OpenFile,
        *,
        head: bytes,
        tail: bytes,
        bandwidth: Bandwidth,
        on_progress: Callable[[int, int], None],
    ) -> None:
        self._file = file
        self._head = head
        self._tail = tail
        self._bandwidth = bandwidth
        self._on_progress = on_progress
        self._piece = _FIRST_PIECE
        self.length = len(head) + file.size + len(tail)
        self.on_pause: Callable[[float], None] = _unheard
        self.is_sent = False
        self.sent = 0

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """All bytes in order, once.

        Raises:
            TransferError: the file is shorter than it was.
            OSError: it cannot be read.
        """
        async for piece in self._paced(self._head):
            yield piece
        done = 0
        reading = self._read_ahead(done)
        try:
            while done < self._file.size:
                block = await asyncio.shield(reading)
                if not block:
                    raise TransferError(
                        f"{self._file.path} has {done} bytes, and had {self._file.size} before: it changed"
                    )
                done += len(block)
                reading = self._read_ahead(done)
                await self._wait_for_turn(len(block))
                started = asyncio.get_running_loop().time()
                yield block
                self._adapt(asyncio.get_running_loop().time() - started)
                self.sent += len(block)
                self._on_progress(done, self._file.size)
        finally:
            # A thread may still read: the file must not be closed under it, its number would go to the next file.
            await asyncio.wait({reading})
            if not reading.cancelled():
                reading.exception()  # of no interest any more
        async for piece in self._paced(self._tail):
            yield piece
        self.is_sent = True

    def _read_ahead(self, done: int) -> asyncio.Future[bytes]:
        """Begin to read what comes after `done` bytes, while the network takes what came before."""
        wanted = self._bandwidth.piece(min(self._piece, self._file.size - done))
        return asyncio.ensure_future(asyncio.to_thread(self._file.read, wanted))

    async def _paced(self, text: bytes) -> AsyncIterator[bytes]:
        while text:
            size = self._bandwidth.piece(_FIRST_PIECE)
            piece, text = text[:size], text[size:]
            await self._wait_for_turn(len(piece))
            yield piece
            self.sent += len(piece)

    async def _wait_for_turn(self, size: int) -> None:
        waited = await self._bandwidth.take(size)
        if waited:
            self.on_pause(waited)

    def _adapt(self, took_sec: float) -> None:
        """Keep a piece short enough for the peer's pace: only a write that stands still may count as a stall."""
        if took_sec < _QUICK_SEC:
            self._piece = min(self._piece * 2, _LARGEST_PIECE)
        elif took_sec > _SLOW_SEC:
            self._piece = max(self._piece // 2, _SMALLEST_PIECE)


class OpenFile:
    """A file that is being sent, with the size that it had when it was opened."""

    def __init__(self, path: Path, file: BufferedReader) -> None:
        self.path = path
        self.size = os.fstat(file.fileno()).st_size
        self.read = file.read
        self._file = file

    def last_byte(self) -> bytes:
        """The last byte that is no white space; empty if there is none in the last 64."""
        self._file.seek(max(self.size - 64, 0))
        end = self._file.read(64).strip()[-1:]
        self._file.seek(0)
        return end

    def first_byte(self) -> bytes:
        """The first byte that is no white space; empty if there is none in the first 64."""
        start = self._file.read(64).strip()[:1]
        self._file.seek(0)
        return start


@contextmanager
def opened(path: Path) -> Iterator[OpenFile]:
    """Open a file to send it.

    Raises:
        OSError: it cannot be opened.
    """
    with path.open("rb") as file:
        yield OpenFile(path, file)


async def finished_in_thread(
    work: Callable[ParamsT, ResultT], *args: ParamsT.args, **kwargs: ParamsT.kwargs
) -> ResultT:
    """Like `asyncio.to_thread`, but a caller that is cancelled waits for the thread.

    Else it would close a file which the thread still uses, and whose number the next file gets.
    """
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        await asyncio.wait({running})
        if not running.cancelled():
            running.exception()  # of no interest any more
        raise


def _unheard(_seconds: float) -> None:
    pass
