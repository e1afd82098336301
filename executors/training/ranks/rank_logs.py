"""What the ranks of a training print: read for errors, and kept within bounds. Like files that grow, a sign of life."""

from __future__ import annotations

import contextlib
import os
import re
import time
from pathlib import Path
from typing import Final

_TAIL_LINES: Final = 20
_LONGEST_LINE: Final = 400
_TAIL_BYTES: Final = 64 * 1024
_NEWS_SEC: Final = 10.0
_MOST_BYTES: Final = 64 * 1024**2
"""Of what one group prints to one file."""
_SHARED: Final = frozenset({"logs", "artifacts"})
"""Folders in which the daemon and trackers write, who live whatever the ranks do."""
_CUT: Final = b"\n[too much was printed: what stood here is dropped]\n"
_RANK_ENDED: Final = re.compile(rb"failed \(exitcode: (-?\d+)\) local_rank: (\d+) ")
"""What torchrun writes of the rank that ended first."""

LAUNCHER_LOG: Final = "torchrun.log"


def log_name(rank: int) -> str:
    """The file in a task's `logs/` with what a rank prints."""
    return f"rank{rank}.log"


class RankLogs:
    """The log files of one group of ranks. What earlier groups wrote to them does not count.

    Args:
        folder: where they lie.
        ranks: how many there are; one is started directly, more by torchrun.
        task_dir: to which they write everything else.

    Attributes:
        started: where the process that is started prints: the only rank, or torchrun.
    """

    def __init__(self, folder: Path, ranks: int, task_dir: Path) -> None:
        self._files = [folder / log_name(rank) for rank in range(ranks)]
        self.started = self._files[0] if ranks == 1 else folder / LAUNCHER_LOG
        self._began = {file: _size(file) for file in (*self._files, self.started)}
        self._seen = {file: self._began[file] for file in self._files}
        self._task_dir = task_dir
        self._written = _state_of(task_dir)
        self._looked = time.monotonic()

    def tail(self, rank: int | None) -> tuple[str, ...]:
        """The last lines of one rank, or, where nobody knows which it is, of what was started."""
        file = self.started if rank is None else self._files[rank]
        lines = [line.strip() for line in self._read(file).decode(errors="replace").splitlines()]
        return tuple(line[:_LONGEST_LINE] for line in lines if line)[-_TAIL_LINES:]

    def news(self) -> str | None:
        """Now and then, whether somebody has printed or written something: a sentence that says so."""
        if time.monotonic() - self._looked < _NEWS_SEC:
            return None
        self._looked = time.monotonic()
        for rank, file in enumerate(self._files):
            size = _size(file)
            if size != self._seen[file]:
                self._seen[file] = size
                last = self.tail(rank)[-1:]
                return f"rank {rank} prints: {last[0] if last else ''}"
        written = _state_of(self._task_dir)
        if written != self._written:  # a checkpoint, the rows: that takes long, and nobody prints meanwhile
            self._written = written
            return "the ranks write files"
        return None

    def cut(self) -> None:
        """Drop the middle of a file that has become too long, so that a flood cannot fill the disk."""
        for file, began in self._began.items():
            if _size(file) > began + _MOST_BYTES:
                last = self._read(file)
                with contextlib.suppress(OSError):  # it is gone, or the disk is full
                    os.truncate(file, began + _MOST_BYTES // 2)
                    with file.open("ab") as stream:
                        stream.write(_CUT + last)

    def torchrun_says(self) -> tuple[int, int] | None:
        """The rank that failed first and its exit status, as torchrun tells; None if it tells nothing."""
        found = _RANK_ENDED.search(self._read(self.started))
        return (int(found[2]), int(found[1])) if found is not None else None

    def _read(self, file: Path) -> bytes:
        """The end of what was written since the group began."""
        try:
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(max(self._began[file], size - _TAIL_BYTES))
                return stream.read(_TAIL_BYTES)  # not to the end: a rank may print faster than it is read
        except OSError:  # it was never made, or is gone
            return b""


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:
        return 0


def _state_of(task_dir: Path) -> int:
    """A number that is another one when the ranks have written to a file."""
    state = 0
    for inner, folders, names in os.walk(task_dir):
        if inner == str(task_dir):
            folders[:] = set(folders) - _SHARED
        for name in names:
            with contextlib.suppress(OSError):  # it has vanished meanwhile
                facts = os.lstat(os.path.join(inner, name))  # noqa: PTH118 - there may be thousands
                state += facts.st_size + facts.st_mtime_ns
    return state
