"""What a long generation has finished so far, on disk, so that it survives a kill.

The first line says whose the file is, `{"format": 1, "identity": …}`; each other line is one finished thing,
`{"key": …, "value": …}`. The lines go to the operating system one by one, so a kill can only cut the last one.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, JsonValue

PARTIAL_FILE: Final = "responses.partial.jsonl"

_FORMAT: Final = 1
_OPEN: Final = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
_SYNC_EVERY_SEC: Final = 1.0
_UNREADABLE: Final = frozenset({errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENXIO, errno.EIO})
"""The file itself is at fault. Other errors, such as too many open files, say nothing about what it holds."""


class _Header(BaseModel):
    format: Literal[1]
    identity: str


class _Entry(BaseModel):
    key: str
    value: dict[str, JsonValue]


class _UnusableError(Exception):
    """A file that cannot be taken up; the text says why, as the rest of a sentence."""


def json_text(value: JsonValue | Mapping[str, JsonValue]) -> str:
    """Return a value as JSON text on one line. NaN and infinity become null, because JSON does not know them."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        known = json.loads(json.dumps(value), parse_constant=lambda _: None)
        return json.dumps(known, ensure_ascii=False)


class PartialResults:
    """Results by key, in a file that grows by one line for each. Made by `begin`.

    Args:
        path: the file, `…/responses.partial.jsonl`.
        identity: digest of everything that decides the outputs.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._path = path
        self._identity = identity
        self._descriptor = -1
        self._size = 0
        self._earlier: dict[str, dict[str, JsonValue]] = {}
        self._note = ""
        self._lock = threading.Lock()
        self._synced = time.monotonic()

    @classmethod
    def begin(cls, out_dir: Path, identity: str, *, resume: bool) -> PartialResults:
        """Open the file of a task.

        Args:
            out_dir: the task's existing folder.
            identity: digest of everything that decides the outputs.
            resume: whether to keep what an earlier run with the same identity has finished. Its lines are kept up to
                the last whole one. A file that cannot be taken up is replaced, and `note` says why.

        Raises:
            OSError: the file cannot be made.
        """
        partial = cls(out_dir / PARTIAL_FILE, identity)
        try:
            if not (resume and partial._take_up()):
                partial._start_anew()
        except BaseException:
            partial._close_file()
            raise
        return partial

    @property
    def note(self) -> str:
        """One sentence for a warning: why an earlier run's lines were not kept; empty if all were."""
        return self._note

    def finished(self, key: str) -> dict[str, JsonValue] | None:
        """Return what an earlier run stored under this key, the last if there are several; None if it did not."""
        return self._earlier.get(key)

    def add(self, key: str, value: dict[str, JsonValue]) -> None:
        """Append one line. It survives a kill of this process at once, and a power cut about a second later.

        May be called from several threads. The line goes into the next run's `finished`, not into this one's.

        Raises:
            OSError: it cannot be written, for instance because the disk is full. No half of a line stays.
            ValueError: `close` was called.
        """
        line = _line({"key": key, "value": value})
        with self._lock:
            if self._descriptor < 0:
                raise ValueError(f"{self._path} is closed; expected no result after that, got {key!r}")
            self._append(line)
            if time.monotonic() - self._synced >= _SYNC_EVERY_SEC:
                self._sync()

    def close(self) -> None:
        """Bring everything to the disk and close the file; a second call does nothing.

        Raises:
            OSError: the disk did not take it.
        """
        with self._lock:
            if self._descriptor >= 0:
                try:
                    self._sync()
                finally:
                    self._close_file()

    def _take_up(self) -> bool:
        """Open an earlier run's file and read it; false if there is nothing to take up."""
        try:
            self._descriptor = os.open(self._path, _OPEN)
            self._read()
        except FileNotFoundError:
            return False
        except _UnusableError as error:
            problem = str(error)
        except OSError as error:
            if error.errno not in _UNREADABLE:
                raise
            problem = f"cannot be read: {os.strerror(error.errno)}"
        else:
            return True
        self._close_file()
        self._earlier.clear()
        self._size = 0
        if problem:
            self._note = f"the earlier {PARTIAL_FILE} {problem}, so everything is generated anew"
        return False

    def _read(self) -> None:
        """Read all whole lines and cut the file behind the last one that is sound."""
        if not stat.S_ISREG(os.fstat(self._descriptor).st_mode):
            raise _UnusableError("is no ordinary file")
        with open(self._descriptor, "rb", closefd=False) as file:
            header = file.readline()
            if not header:  # nothing in it that could be lost
                raise _UnusableError
            self._check(header)
            self._size = len(header)
            for number, line in enumerate(file, start=2):
                if not line.endswith(b"\n"):  # cut by a kill
                    break
                try:
                    entry = _Entry.model_validate(_parsed(line))
                except ValueError:
                    # A power cut can leave blocks of zeros, and nothing says where the next sound line begins.
                    self._note = f"line {number} of the earlier {PARTIAL_FILE} is damaged; the rest is generated again"
                    break
                self._earlier[entry.key] = entry.value
                self._size += len(line)
        os.ftruncate(self._descriptor, self._size)

    def _check(self, line: bytes) -> None:
        try:
            header = _Header.model_validate(_parsed(line) if line.endswith(b"\n") else None)
        except ValueError as error:
            raise _UnusableError("does not begin with a line that says what it belongs to") from error
        if header.identity != self._identity:
            raise _UnusableError("belongs to other data, settings or another model")

    def _start_anew(self) -> None:
        # A new file instead of an emptied one: what a link points to is none of ours.
        self._path.unlink(missing_ok=True)
        self._descriptor = os.open(self._path, _OPEN | os.O_CREAT | os.O_EXCL, 0o644)
        self._append(_line({"format": _FORMAT, "identity": self._identity}))

    def _append(self, line: bytes) -> None:
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        except OSError:
            os.ftruncate(self._descriptor, self._size)  # half a line would spoil all that follow
            raise
        self._size += len(line)

    def _sync(self) -> None:
        os.fsync(self._descriptor)
        self._synced = time.monotonic()

    def _close_file(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _line(content: Mapping[str, JsonValue]) -> bytes:
    # Broken tokenizers give lone surrogates; `json.loads` of bytes takes them back as they were.
    return json_text(content).encode(errors="surrogatepass") + b"\n"


def _parsed(line: bytes) -> object:
    """Parse one line.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        parsed: object = json.loads(line)
    except RecursionError as error:  # hundreds of brackets
        raise ValueError("is nested too deep") from error
    return parsed
