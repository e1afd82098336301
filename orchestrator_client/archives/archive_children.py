"""The programs that make an archive, GNU tar and pigz, as processes whose end and errors are known."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import io
import os
import shutil
import signal
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final, cast

import psutil

from orchestrator_client.errors import ArchiveError

_ENVIRONMENT: Final = {"LC_ALL": "C", "PATH": os.defpath}
"""Nothing of ours: TAR_OPTIONS, GZIP and PIGZ would change what an archive looks like, and secrets are nobody's."""
_UNKNOWN: Final = 255
_PIPE_BYTES: Final = 1024**2
_STDERR_TAIL: Final = 4096
_VERSION_WITHIN_SEC: Final = 10.0


async def find_program(name: str, sign: bytes) -> str | None:
    """Full path of a program whose `--version` works and contains `sign`, or None."""
    path = shutil.which(name)
    if path is None:
        return None
    try:
        asked = await asyncio.create_subprocess_exec(
            path, "--version", env=_ENVIRONMENT, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError:  # it cannot be run: as good as missing
        return None
    try:
        async with asyncio.timeout(_VERSION_WITHIN_SEC):
            answer, _ = await asked.communicate()
    except TimeoutError:  # as good as missing too
        return None
    finally:
        if asked.returncode is None:
            with contextlib.suppress(ProcessLookupError):  # it is just ending
                asked.kill()
            await asked.wait()
    return path if asked.returncode == 0 and sign in answer else None


def make_pipe() -> tuple[io.FileIO, io.FileIO]:
    """A pipe, enlarged where the system allows it: fewer switches between its two ends."""
    read_end, write_end = os.pipe()
    with contextlib.suppress(OSError):  # the user's share of pipe memory is used up; a small one works too
        fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    return io.FileIO(read_end, "rb"), io.FileIO(write_end, "wb")


class ChildProcess(asyncio.SubprocessProtocol):
    """A program between two descriptors; what it is asked is thread-safe, but for `start` and `kill`.

    It has a session of its own, so a Ctrl-C meant for the daemon does not reach it, and no lifeline: when we are
    killed, its pipes break, which ends it.
    """

    def __init__(self, name: str) -> None:
        """Not started yet: use `start`."""
        self.name = name
        # In memory: nothing to read meanwhile, and nothing on a disk that may be full.
        self._stderr = os.memfd_create("stderr", os.MFD_CLOEXEC)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.SubprocessTransport | None = None
        self._ended: Future[int] = Future()
        self._read = 0

    @classmethod
    async def start(cls, command: Sequence[str], stdin: io.FileIO, stdout: io.FileIO) -> ChildProcess:
        """Start a program.

        Args:
            command: full path and arguments.
            stdin: what it reads; stays the caller's.
            stdout: what it writes; stays the caller's.

        Raises:
            ArchiveError: it cannot be started.
        """
        child = cls(os.path.basename(command[0]))  # noqa: PTH119 - no Path is meant
        try:
            await child._loop.subprocess_exec(
                lambda: child, *command, env=_ENVIRONMENT, stdin=stdin, stdout=stdout, stderr=child._stderr,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            os.close(child._stderr)
            raise ArchiveError(f"cannot start {command[0]}: {error.strerror}") from error
        except asyncio.CancelledError:
            os.close(child._stderr)
            raise
        return child

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It was started."""
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def process_exited(self) -> None:
        """It has ended and was reaped. Had somebody else reaped it, its status would be asyncio's 255."""
        if self._transport is not None:
            status = self._transport.get_returncode()
            self._transport.close()
            self._ended.set_result(_UNKNOWN if status is None else status)

    def kill(self) -> None:
        """End it at once, if it lives. Only for the event loop's thread."""
        if self._transport is not None and not self._ended.done():
            # The transport's own `kill` may reap it first, and then asyncio does not find it.
            with contextlib.suppress(ProcessLookupError):  # it is just ending
                os.kill(self._transport.get_pid(), signal.SIGKILL)

    def wait(self) -> int:
        """Wait for its end; returns its status, negative for a signal. Not for the event loop's thread."""
        return self._ended.result()

    def close(self) -> None:
        """Kill it if it lives, wait until it is reaped, forget its stderr. Not for the event loop's thread."""
        self._loop.call_soon_threadsafe(self.kill)
        self.wait()
        os.close(self._stderr)

    def bytes_read(self) -> int:
        """Bytes that it has read so far, from wherever; after its end the last value."""
        if self._transport is not None and not self._ended.done():
            with contextlib.suppress(psutil.Error):  # it is just ending
                self._read = max(self._read, psutil.Process(self._transport.get_pid()).io_counters().read_chars)
        return self._read

    @property
    def lost_its_reader(self) -> bool:
        """Wait for its end. Returns whether it ended because nobody wanted its output any more."""
        return self.wait() == -signal.SIGPIPE

    def complaint(self) -> str:
        """Wait for its end. Returns why it failed: the signal or its last line on stderr; empty if it did not."""
        status = self.wait()
        if status == 0:
            return ""
        if status < 0:
            return f"{self.name} was ended by signal {-status} ({signal.Signals(-status).name})"
        size = os.fstat(self._stderr).st_size
        tail = os.pread(self._stderr, _STDERR_TAIL, max(size - _STDERR_TAIL, 0)).decode("utf-8", "replace")
        # GNU tar's very last line only says that there was an error above.
        lines = [line for line in tail.splitlines() if line.strip() and "Exiting with failure status" not in line]
        return f"{self.name} ended with status {status}: {lines[-1].strip() if lines else 'it said nothing'}"
