"""A download on its way to the disk: a temporary file beside its place, hashed while it is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path
from typing import Final

from orchestrator_client.transfers.file_body import finished_in_thread

_BLOCK: Final = 1024**2
_LONGEST_STEM: Final = 180


class PartFile:
    """Collects a download.

    Args:
        target: where the whole file will be; its folder exists.

    Raises:
        OSError: the temporary file cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self._path = target.with_name(f".{target.name[:_LONGEST_STEM]}.{secrets.token_hex(4)}.part")
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        self._digest = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self.size = 0
        """Bytes received, those in memory included."""

    async def add(self, piece: bytes) -> bool:
        """Take more bytes. Returns whether a block went to the disk.

        Raises:
            OSError: it cannot be written.
        """
        self._waiting.append(piece)
        self._waiting_bytes += len(piece)
        self.size += len(piece)
        if self._waiting_bytes < _BLOCK:
            return False
        await self._flush()
        return True

    async def restart(self) -> None:
        """Forget everything received.

        Raises:
            OSError: the file cannot be emptied.
        """
        self._waiting.clear()
        self._waiting_bytes = 0
        self.size = 0
        self._digest = hashlib.sha256()
        await finished_in_thread(self._empty)

    async def sha256(self) -> str:
        """Digest of everything received.

        Raises:
            OSError: it cannot be written.
        """
        await self._flush()
        return self._digest.hexdigest()

    async def finish(self) -> None:
        """Put the file in its place, durably.

        Raises:
            OSError: it cannot be written or renamed.
        """
        await self._flush()
        await finished_in_thread(self._publish)

    def discard(self) -> None:
        """Leave nothing behind; after `finish` this does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            with contextlib.suppress(FileNotFoundError):
                self._path.unlink()

    async def _flush(self) -> None:
        block = b"".join(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        if block:
            await finished_in_thread(self._write, block)

    def _write(self, block: bytes) -> None:
        self._digest.update(block)
        view = memoryview(block)
        while view:
            view = view[os.write(self._descriptor, view) :]

    def _empty(self) -> None:
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)

    def _publish(self) -> None:
        os.fsync(self._descriptor)
        self._path.rename(self._target)
        os.close(self._descriptor)
        self._descriptor = -1
