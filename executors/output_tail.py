"""The last lines that this process and those it starts have printed: the cause of a child's death stands only there."""

from __future__ import annotations

import os
import re
import threading
from collections import deque
from typing import Final

_LINES: Final = 400
_LONGEST_LINE: Final = 2000
_ERROR: Final = re.compile(r"(?P<kind>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit))(?:: (?P<text>.+))?$")
_FOLLOWS: Final = ("Engine core initialization failed", "EngineCore encountered an issue", "WorkerProc initialization")
"""Texts of errors that only tell of another one before them."""


class OutputTail:
    """Takes over descriptors 1 and 2, passes on what is printed to where they led, and remembers the last lines."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._lock = threading.Lock()
        read_end, write_end = os.pipe()
        passed_on = os.dup(2)
        os.set_inheritable(passed_on, False)  # noqa: FBT003 - or those who read it would wait for our children too
        os.dup2(write_end, 1)
        os.dup2(write_end, 2)
        os.close(write_end)
        threading.Thread(target=self._copy, args=(read_end, passed_on), name="output", daemon=True).start()

    def clear(self) -> None:
        """Forget what was printed so far."""
        with self._lock:
            self._lines.clear()

    def cause(self) -> str:
        """The last error that was printed and does not just follow from another; empty if there is none."""
        with self._lock:
            lines = list(self._lines)
        found = [error_in(line) for line in lines]
        causes = [cause for cause in found if cause and not any(mark in cause for mark in _FOLLOWS)]
        memory = [cause for cause in causes if means_no_memory(cause)]
        return (memory or causes or [""])[-1]

    def _copy(self, source: int, target: int) -> None:
        partial = b""
        while chunk := os.read(source, 65536):
            try:
                view = memoryview(chunk)
                while view:
                    view = view[os.write(target, view) :]
            except OSError:  # nobody reads any more: the daemon is gone, and this process goes too
                return
            *lines, partial = (partial + chunk).split(b"\n")
            partial = partial[-_LONGEST_LINE:]
            with self._lock:
                self._lines.extend(line.decode(errors="replace")[:_LONGEST_LINE] for line in lines)


def error_in(line: str) -> str:
    """The exception at the end of a printed line, as "Kind: text"; empty if there is none."""
    found = _ERROR.search(line.rstrip())
    if found is None:
        return ""
    kind = found["kind"].rpartition(".")[2]
    return f"{kind}: {found['text']}" if found["text"] else kind


def means_no_memory(cause: str) -> bool:
    """Whether an error's text tells of a device without enough memory."""
    return "OutOfMemoryError" in cause or "out of memory" in cause or "less than desired GPU memory" in cause
