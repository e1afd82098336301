"""What an archive flows through in this process: a tar stream out of a thread, compressors, and the file it ends in."""

from __future__ import annotations

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

from orchestrator_client.archives.archive_choice import MOST_ISAL_THREADS, Choice
from orchestrator_client.archives.archive_content import Content, tar_stream
from orchestrator_client.errors import ArchiveError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

PIECE: Final = 1024**2
"""Bytes that are handled at a time; also the block that isal's threads compress."""
_GZIP: Final = 16 + zlib.MAX_WBITS
_LENGTH_BYTES: Final = 4
"""A gzip file ends with the length of its content, modulo 2**32."""


class Sink(io.RawIOBase):
    """A new file that counts and digests what it is given."""

    def __init__(self, path: Path, check: Callable[[], None]) -> None:
        """Create it.

        Args:
            path: must not exist.
            check: called before each write; what it raises ends the writing.

        Raises:
            OSError: it cannot be created.
        """
        super().__init__()
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        self._check = check
        self._digest = hashlib.sha256()
        self._tail = b""
        self.size = 0

    @property
    def sha256(self) -> str:
        """Digest of everything written, hexadecimal."""
        return self._digest.hexdigest()

    def writable(self) -> bool:
        """It can be written to."""
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        """Write all of it.

        Raises:
            OSError: no space, or another reason.
        """
        self._check()
        with memoryview(data) as view:
            self._digest.update(view)
            self._tail = (self._tail + bytes(view[-_LENGTH_BYTES:]))[-_LENGTH_BYTES:]
            written = 0
            while written < len(view):
                written += os.write(self._descriptor, view[written:])
            self.size += written
            return written

    def require_whole(self, tar_bytes: int) -> None:
        """Check against the gzip trailer that a tar stream of this size arrived.

        This holds whatever became of the programs' exit statuses.

        Raises:
            ArchiveError: it did not.
        """
        arrived, expected = int.from_bytes(self._tail, "little"), tar_bytes % 2 ** (8 * _LENGTH_BYTES)
        if arrived != expected:
            raise ArchiveError(
                f"the archive is not whole: its tar stream has {arrived} bytes (modulo 2^32) instead of {expected}; "
                "the folder changed meanwhile, or a program ended early; archive it again"
            )

    def sync(self) -> None:
        """Make it durable.

        Raises:
            OSError: it is not.
        """
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the descriptor."""
        if not self.closed:
            os.close(self._descriptor)
        super().close()


class TarThread:
    """Python's tar stream, written into a pipe by a thread; behaves like the process it stands for."""

    def __init__(self, content: Content, target: io.FileIO, threads: ThreadPoolExecutor) -> None:
        """Start it. `target` is closed at the end."""
        self._unread = False
        self._target = target
        self._written = 0
        self._ended: Future[str] = threads.submit(self._run, content)

    def bytes_read(self) -> int:
        """Bytes of the stream so far."""
        return self._written

    @property
    def lost_its_reader(self) -> bool:
        """Wait for its end. Returns whether it ended because nobody wanted the stream any more."""
        self._ended.result()
        return self._unread

    def complaint(self) -> str:
        """Wait for its end. Returns why it failed; empty if it did not."""
        return self._ended.result()

    def close(self) -> None:
        """Wait for its end. The pipe must have ended or broken."""
        self._ended.result()

    def _run(self, content: Content) -> str:
        with self._target:
            try:
                for piece in tar_stream(content):
                    view = memoryview(piece)
                    while view:
                        view = view[self._target.write(view) :]
                    self._written += len(piece)
            except BrokenPipeError:
                self._unread = True
                return "nobody read the tar stream to its end"
            except ArchiveError as error:
                return str(error)
        return ""


def copy(source: io.FileIO, sink: Sink) -> None:
    """Copy to the end of the source.

    Raises:
        OSError: from the sink.
    """
    for block in _blocks(source):
        sink.write(block)


def compress_in_process(source: io.FileIO, sink: Sink, choice: Choice, threads: int) -> None:
    """Compress to the end of the source, by isal or merely stored. Neither gzip header has a name or a time.

    Raises:
        OSError: from the sink.
    """
    if choice.program == "store":
        plain = zlib.compressobj(0, zlib.DEFLATED, _GZIP)
        for block in _blocks(source):
            sink.write(plain.compress(block))
        sink.write(plain.flush())
        return
    from isal import igzip_threaded  # noqa: PLC0415 - the daemon starts without it

    many = min(threads, MOST_ISAL_THREADS)
    opened = igzip_threaded.open(sink, "wb", choice.level, threads=many, block_size=PIECE)  # type: ignore[no-untyped-call]
    with opened as archive:
        for block in _blocks(source):
            archive.write(block)


def _blocks(source: io.FileIO) -> Iterator[memoryview]:
    """Full blocks, and the rest. Where a pipe happens to break them would else show in the archive."""
    block = memoryview(bytearray(PIECE))
    while True:
        filled = 0
        while filled < PIECE and (count := source.readinto(block[filled:])):
            filled += count
        if filled:
            yield block[:filled]
        if filled < PIECE:
            return
