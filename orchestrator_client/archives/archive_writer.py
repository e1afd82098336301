"""A folder becomes `<folder>.tar.gz` beside it: tar piped into a compressor, no temporary tar, digest on the way.

    GNU tar, or a thread with Python's tarfile ── pipe ──> pigz ── pipe ──> file, size and digest
                                                     └───> isal's threads in this process ──┘

The archive is the same for equal content: sorted, without times and owners, modes 644 and 755. It is not promised to be
the same across versions of tar, pigz, zlib and isal, with one thread of pigz and with several, or with other tools.
"""

from __future__ import annotations

import asyncio
import errno
import io
import os
import secrets
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator_client.archives.archive_children import ChildProcess, find_program, make_pipe
from orchestrator_client.archives.archive_choice import Choice, choose
from orchestrator_client.archives.archive_content import Content, name_list, scan, tar_command
from orchestrator_client.archives.archive_wiring import Sink, TarThread, compress_in_process, copy
from orchestrator_client.errors import ArchiveError

_TICK_SEC: Final = 0.3
_MARGIN: Final = 1.02
_MARGIN_BYTES: Final = 1024**2
_UNFINISHED: Final = ".part"


@dataclass(frozen=True)
class ArchiveTools:
    """What the operator says about archives (MODEL_ARCHIVE_*).

    Attributes:
        use_pigz: whether pigz may be used.
        level: 0 to 9, obeyed when set; None: samples of the data decide.
        pigz_threads: threads of pigz (and of isal, up to 8); None: one for each processor this process may use.
        pigz_bin: name or path of pigz.
        tar_bin: name or path of tar; one that is not GNU tar counts as missing.
    """

    use_pigz: bool = True
    level: int | None = None
    pigz_threads: int | None = None
    pigz_bin: str = "pigz"
    tar_bin: str = "tar"


@dataclass(frozen=True)
class ArchiveFacts:
    """A finished archive.

    Attributes:
        path: where it is.
        size_bytes: its size.
        sha256: its digest, hexadecimal.
        method: how it was compressed, for people.
    """

    path: Path
    size_bytes: int
    sha256: str
    method: str


async def write_archive(folder: Path, tools: ArchiveTools, on_progress: Callable[[int, int], None]) -> ArchiveFacts:
    """Write `folder.parent/<name>.tar.gz`, with one top-level folder of that name inside; whole or not at all.

    Cancelling it ends its processes and removes what was written.

    Args:
        folder: what to archive; nobody may write to it meanwhile.
        tools: the operator's wishes.
        on_progress: told bytes read so far and bytes in all, in the event loop, about three times a second.

    Raises:
        ArchiveError: the folder holds what does not belong into an archive, changed meanwhile, or a program failed.
        OSError: the archive cannot be written; ENOSPC also if there is too little room to begin with.
    """
    job = _Job(folder, tools.level, await _Programs.find(tools))
    with ThreadPoolExecutor(1, thread_name_prefix="archive") as pool:
        running = asyncio.get_running_loop().run_in_executor(pool, job.run)
        try:
            while not running.done():
                await asyncio.wait({running}, timeout=_TICK_SEC)
                if job.total_bytes is not None and not running.done():
                    on_progress(min(job.done_bytes(), job.total_bytes), job.total_bytes)
        finally:
            job.stop()
            await _settled(running)
    facts = running.result()
    if job.total_bytes is not None:
        on_progress(job.total_bytes, job.total_bytes)
    return facts


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed `write_archive` of this folder left; not while one is running.

    Raises:
        OSError: something cannot be removed.
    """
    if folder.parent.is_dir():
        for path in folder.parent.iterdir():
            if path.name.startswith(_temporary_prefix(folder)) and path.name.endswith(_UNFINISHED):
                path.unlink(missing_ok=True)


async def _settled(running: asyncio.Future[ArchiveFacts]) -> None:
    """Wait until the thread is done, however often we are cancelled: what it started must be gone when we return."""
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            cancelled = error
    running.exception()  # so that it counts as seen also when something else is raised
    if cancelled is not None:
        raise cancelled


def _temporary_prefix(folder: Path) -> str:
    return f".{folder.name}.tar.gz."


class _StoppedError(Exception):
    """Nobody wants the archive any more."""


@dataclass(frozen=True)
class _Programs:
    """What this machine has: full paths, or None for what is missing or switched off; and threads to use."""

    tar: str | None
    pigz: str | None
    threads: int

    @classmethod
    async def find(cls, tools: ArchiveTools) -> _Programs:
        return cls(
            await find_program(tools.tar_bin, b"GNU tar"),
            await find_program(tools.pigz_bin, b"pigz") if tools.use_pigz else None,
            tools.pigz_threads or len(os.sched_getaffinity(0)),
        )


class _Job:
    """One archive, written in a thread of its own; `stop` and `done_bytes` are for the event loop's thread."""

    def __init__(self, folder: Path, level: int | None, programs: _Programs) -> None:
        self.total_bytes: int | None = None
        """Bytes of the folder's files, once they are known."""
        self._folder = folder
        self._level = level
        self._programs = programs
        self._loop = asyncio.get_running_loop()
        self._stopped = threading.Event()
        self._children: list[ChildProcess] = []
        self._source: ChildProcess | TarThread | None = None

    def stop(self) -> None:
        """Make `run` end soon, with an error; nothing happens if it has ended."""
        self._stopped.set()
        for child in self._children:
            child.kill()

    def done_bytes(self) -> int:
        """Bytes of the folder that were read so far; headers of the archive may be among them."""
        return self._source.bytes_read() if self._source else 0

    def run(self) -> ArchiveFacts:
        content = scan(self._folder)
        self.total_bytes = content.size
        with_pigz, threads = self._programs.pigz is not None, self._programs.threads
        choice = choose(content, self._level, with_pigz=with_pigz, threads=threads, check=self._require_wanted)
        _require_room(content, choice)
        target = self._folder.parent / f"{self._folder.name}.tar.gz"
        temporary = target.parent / f"{_temporary_prefix(self._folder)}{secrets.token_hex(4)}{_UNFINISHED}"
        try:
            with Sink(temporary, self._require_wanted) as sink:
                self._fill(sink, content, choice)
                sink.require_whole(content.tar_bytes)
                _require_same(content)
                sink.sync()
            self._require_wanted()
            temporary.rename(target)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise OSError(error.errno, f"{error.strerror}, while writing {str(target)!r}") from error
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(target.parent)
        return ArchiveFacts(target, sink.size, sink.sha256, choice.describe(threads))

    def _fill(self, sink: Sink, content: Content, choice: Choice) -> None:
        """Run source and compressor until the archive is in the sink; leaves no process and no thread."""
        programs = self._programs
        # The stack is left from its end: the compressor dies, then the pipe to it breaks, then the source ends.
        with ThreadPoolExecutor(1, thread_name_prefix="archive-tar") as thread, ExitStack() as left:
            tar, tar_end = (left.enter_context(end) for end in make_pipe())
            source = self._start_source(content, tar_end, thread)
            left.callback(source.close)
            left.callback(tar.close)
            if choice.program != "pigz" or programs.pigz is None:
                compress_in_process(tar, sink, choice, programs.threads)
                compressor = None
            else:
                packed, pigz_end = (left.enter_context(end) for end in make_pipe())
                command = [programs.pigz, "--no-name", "--no-time", f"-{choice.level}", "-p", str(programs.threads)]
                compressor = self._start(command, tar, pigz_end)
                left.callback(compressor.close)
                tar.close()
                pigz_end.close()
                copy(packed, sink)
            self._judge(source, compressor)

    def _start_source(
        self, content: Content, target: io.FileIO, thread: ThreadPoolExecutor
    ) -> ChildProcess | TarThread:
        if self._programs.tar is None:
            self._source = TarThread(content, target, thread)
            return self._source
        with io.FileIO(os.memfd_create("names", os.MFD_CLOEXEC), "r+b") as names:
            names.write(name_list(content))
            names.seek(0)
            self._source = self._start(tar_command(self._programs.tar, content), names, target)
        target.close()
        return self._source

    def _start(self, command: list[str], stdin: io.FileIO, stdout: io.FileIO) -> ChildProcess:
        async def start() -> ChildProcess:
            self._require_wanted()
            child = await ChildProcess.start(command, stdin, stdout)
            self._children.append(child)
            if self._stopped.is_set():  # meanwhile; what reads from it finds its end
                child.kill()
            return child

        return asyncio.run_coroutine_threadsafe(start(), self._loop).result()

    def _judge(self, source: ChildProcess | TarThread, compressor: ChildProcess | None) -> None:
        """Name the culprit: a source that only lost its reader is none."""
        failed = source.complaint() if not source.lost_its_reader else ""
        failed = failed or (compressor.complaint() if compressor else "") or source.complaint()
        self._require_wanted()
        if failed:
            raise ArchiveError(f"cannot archive {str(self._folder)!r}: {failed}")

    def _require_wanted(self) -> None:
        if self._stopped.is_set():
            raise _StoppedError


def _require_room(content: Content, choice: Choice) -> None:
    needed = int(content.tar_bytes * (choice.ratio or 1.0) * _MARGIN) + _MARGIN_BYTES
    parent = content.folder.parent
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"no room for the archive of {str(content.folder)!r}: about {needed} bytes needed, {free} bytes free in "
            f"{str(parent)!r}; make room there, or let RESULTS_DIR be on a larger disk",
        )


def _require_same(content: Content) -> None:
    """What tar does not notice: files that came, went or changed before or after it read them."""
    if scan(content.folder) != content:
        raise ArchiveError(f"{str(content.folder)!r} changed while it was archived; archive it again")


def _sync_folder(folder: Path) -> None:
    """Make a rename in it last through a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
