"""The last lines that processes started by this one have printed: the cause of a child's death stands only there.

A process of its own, `python -m executors.output_tail SOCKET`, copies them to where they would have gone. This process
keeps its own descriptors 1 and 2, so that even its last words before a crash need nobody to pass them on.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_LINES: Final = 400
_LONGEST_LINE: Final = 2000
_LONGEST_MESSAGE: Final = 65536
_ANSWER_SEC: Final = 5.0
_QUIET_SEC: Final = 0.1
_DRAIN_SEC: Final = 1.0
_ERROR: Final = re.compile(r"(?P<kind>(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Exit))(?:: (?P<text>.+))?$")
_FOLLOWS: Final = ("Engine core initialization failed", "EngineCore encountered an issue", "WorkerProc initialization")
"""Texts of errors that only tell of another one before them."""
_SHARE_TOO_SMALL: Final = re.compile(
    r"No available memory for the cache blocks|To serve at least one request with the model|"
    r"larger than the available KV cache memory"
)
_NO_MEMORY: Final = re.compile(
    rf"OutOfMemoryError|out of memory|less than desired GPU memory|{_SHARE_TOO_SMALL.pattern}|"
    r"DefaultCPUAllocator: can't allocate memory|Available memory on node .* is less than"
)


class OutputTail:
    """Remembers the last lines of the processes that are started inside `watching`."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests = 0
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_ANSWER_SEC)
        os.register_at_fork(after_in_child=self._socket.close)  # its end tells the tee that this process is gone
        read_end, self._source = os.pipe()
        try:
            # In our process group, so that it is killed with it.
            self._tee = subprocess.Popen(
                [sys.executable, "-m", "executors.output_tail", str(theirs.fileno())],
                stdin=read_end,
                stdout=2,
                pass_fds=[theirs.fileno()],
            )
        finally:
            theirs.close()
            os.close(read_end)  # who writes must not wait for a reader that is dead

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Processes that are started inside are listened to as long as they live.

        They inherit descriptors 1 and 2 as these are at their start, so meanwhile what this process prints goes the
        same way.
        """
        _flush()
        own = [(os.dup(number), number) for number in (1, 2)]
        for _, number in own:
            os.dup2(self._source, number)
        try:
            yield
        finally:
            _flush()
            for kept, number in own:
                os.dup2(kept, number)
                os.close(kept)
            self._ask("pass on")  # before anything that this process prints from now on

    def clear(self) -> None:
        """Forget what was printed so far."""
        self._ask("clear")

    def cause(self) -> str:
        """The last error that was printed and does not just follow from another; empty if there is none."""
        return self._ask("cause")

    def _ask(self, request: str) -> str:
        """Return the tee's answer; nothing if it is dead, or held up by whoever reads what it passes on."""
        with self._lock, contextlib.suppress(OSError):
            self._requests += 1
            number = str(self._requests)
            self._socket.send(f"{number} {request}".encode())
            while message := self._socket.recv(_LONGEST_MESSAGE).decode():
                answered, _, answer = message.partition(" ")
                if answered == number:  # else one that came too late
                    return answer
        return ""


class _Tee:
    """Copies descriptor 0 to 1, and answers the process that started it until that one is gone."""

    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._partial = b""
        self._has_reader = True

    def serve(self) -> None:
        requests = self._requests.fileno()
        while True:
            ready, _, _ = select.select([0, requests], [], [])
            if requests not in ready:
                self._copy()
                continue
            message = self._requests.recv(_LONGEST_MESSAGE).decode()
            self._drain()
            if not message:
                return
            number, _, request = message.partition(" ")
            if request == "clear":
                self._lines.clear()
                self._partial = b""
            answer = self._cause() if request == "cause" else ""
            self._requests.send(f"{number} {answer}".encode())

    def _drain(self) -> None:
        """Copy what is there, and what comes at once behind it."""
        deadline = time.monotonic() + _DRAIN_SEC
        while time.monotonic() < deadline and select.select([0], [], [], _QUIET_SEC)[0] and self._copy():
            pass

    def _copy(self) -> bool:
        """Copy one piece; false at the end."""
        chunk = os.read(0, 65536)
        view = memoryview(chunk)
        while view and self._has_reader:
            try:
                view = view[os.write(1, view) :]
            except OSError:  # nobody reads any more; whoever prints must not wait for that
                self._has_reader = False
        *lines, partial = (self._partial + chunk).split(b"\n")
        self._partial = partial[-_LONGEST_LINE:]
        self._lines.extend(map(_text, lines))
        return bool(chunk)

    def _cause(self) -> str:
        found = [error_in(line) for line in (*self._lines, _text(self._partial))]
        causes = [cause for cause in found if cause and not any(mark in cause for mark in _FOLLOWS)]
        memory = [cause for cause in causes if means_no_memory(cause)]
        return (memory or causes or [""])[-1]


def _text(line: bytes) -> str:
    return line.decode(errors="replace")[:_LONGEST_LINE]


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it is closed; then nothing of it is lost here
            stream.flush()


def error_in(line: str) -> str:
    """The exception at the end of a printed line, as "Kind: text"; empty if there is none."""
    found = _ERROR.search(line.rstrip())
    if found is None:
        return ""
    kind = found["kind"].rpartition(".")[2]
    return f"{kind}: {found['text']}" if found["text"] else kind


def means_no_memory(cause: str) -> bool:
    """Whether an error's text tells of a device, or of a host, without enough memory."""
    return _NO_MEMORY.search(cause) is not None


def means_small_share(cause: str) -> bool:
    """Whether vLLM's share of the memory is too small for the model, so that an even smaller one cannot help."""
    return _SHARE_TOO_SMALL.search(cause) is not None


def _main() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # meant for the process that started this one, which ends it too
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as requests, contextlib.suppress(ConnectionError):
        _Tee(requests).serve()


if __name__ == "__main__":
    _main()
