"""What an engine process prints: kept as the task's log, as a tail for errors, and as news that it is alive.

Of several tasks in one engine nobody can tell whose a line is: each gets all that is printed while it is there. None of
them is known to live by it, unless all wait for the engine's load.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import deque
from pathlib import Path
from typing import BinaryIO, Final

import structlog

_TAIL_LINES: Final = 20
_LONGEST_LINE: Final = 400
_LOG_FILE_LIMIT: Final = 64 * 1024**2
"""Bytes of one task's engine log; what comes after is dropped, so that a flood cannot fill the disk."""
_FORWARD_BURST: Final = 100
_FORWARD_PER_SEC: Final = 20.0
"""Lines that also go to the daemon's own log; the rest of a flood stays in the task's log."""

log = structlog.get_logger()


class _TaskLog:
    """One task's log file and its last lines."""

    def __init__(self, task_id: str, path: Path) -> None:
        self.tail: deque[bytes] = deque(maxlen=_TAIL_LINES)
        self._task_id = task_id
        self._path = path
        self._file: BinaryIO | None = None
        self._written = 0

    def keep(self, data: bytes) -> None:
        """Write to the file; what goes wrong with that is logged once."""
        room = _LOG_FILE_LIMIT - self._written
        if room <= 0:
            return
        try:
            if self._file is None:  # at the first output: most short tasks print nothing
                self._file = self._path.open("ab")
                self._written = self._file.tell()
            self._file.write(data[:room])
            if len(data) >= room:
                self._file.write(b"\n[log limit of 64 MiB reached; the rest is dropped]\n")
            self._file.flush()
        except OSError as error:
            log.warning("cannot write the task's log", action="engine_output", task_id=self._task_id, error=str(error))
            self._written = _LOG_FILE_LIMIT
            return
        self._written += len(data)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class EngineOutput(asyncio.Protocol):
    """Reads the pipe that is the engine's stdout and stderr."""

    def __init__(self) -> None:
        self.last_heard = time.monotonic()
        """When something was last printed that tells of every task in the engine that it lives."""
        self.about_all = True
        """Whether each line is about all its tasks: they wait for the load."""
        self._partial = b""
        self._logs: dict[str, _TaskLog] = {}
        self._allowance = float(_FORWARD_BURST)
        self._allowance_at = time.monotonic()
        self._transport: asyncio.ReadTransport | None = None

    def attach(self, task_id: str, path: Path) -> None:
        """Write what comes from now on to `path`, for this task."""
        self.drain()
        self._logs[task_id] = _TaskLog(task_id, path)

    def detach(self, task_id: str) -> None:
        """Stop writing to the task's log, after everything printed so far is in it."""
        self.drain()
        if self._partial and len(self._logs) == 1:  # else the rest of the line may come yet, for the others
            self._line(self._partial)
            self._partial = b""
        if (task_log := self._logs.pop(task_id, None)) is not None:
            task_log.close()

    def tail(self, task_id: str) -> tuple[str, ...]:
        """The last lines that a task's log got, oldest first."""
        task_log = self._logs.get(task_id)
        lines = task_log.tail if task_log is not None else ()
        return tuple(line.decode(errors="replace")[:_LONGEST_LINE] for line in lines)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by asyncio."""
        assert isinstance(transport, asyncio.ReadTransport)  # noqa: S101 - tells the type checker what asyncio passes
        self._transport = transport

    def drain(self) -> None:
        """Read what is already in the pipe, so that the last words of a task are not taken for the next one's."""
        if self._transport is None or self._transport.is_closing():
            return
        descriptor = self._transport.get_extra_info("pipe").fileno()
        for _ in range(64):
            try:
                chunk = os.read(descriptor, 65536)
            except BlockingIOError:
                return
            if not chunk:
                return
            self.data_received(chunk)

    def data_received(self, data: bytes) -> None:
        """Called by asyncio for each piece of output."""
        if self.about_all or len(self._logs) <= 1:
            self.last_heard = time.monotonic()
        for task_log in self._logs.values():
            task_log.keep(data)
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()[-_LONGEST_LINE * 4 :]
        for line in lines:
            self._line(line)

    def _line(self, line: bytes) -> None:
        line = line.rstrip(b"\r")
        if not line:
            return
        for task_log in self._logs.values():
            task_log.tail.append(line)
        now = time.monotonic()
        self._allowance = min(self._allowance + (now - self._allowance_at) * _FORWARD_PER_SEC, _FORWARD_BURST)
        self._allowance_at = now
        if self._allowance >= 1:
            self._allowance -= 1
            text = line.decode(errors="replace")[:_LONGEST_LINE]
            log.info(text, action="engine_output", task_id=",".join(self._logs) or None)
