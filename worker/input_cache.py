"""Fetched files on this worker's disk: `RESULTS_DIR/.cache`, one folder an entry, whole or not there at all.

| in the cache's folder | |
|---|---|
| `<64 hex digits>/` | an entry: `entry.json`, `content/`, and `lock`, which everybody who uses it holds shared |
| `.new-<64 hex digits>/` | an entry that is being made; its maker holds its `lock` alone |
| `.old-<16 hex digits>/` | on its way to deletion |
| `.guard` | held alone for the moments in which any of these appears, is taken or goes |

Several daemons may share the folder. All locks are flocks, so they end with the process that holds them.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final, TypeVar

import structlog

from worker.cache_entry import (
    CONTENT,
    LOCK,
    RECORD,
    CacheRecord,
    Entry,
    Pin,
    Wanted,
    Workspace,
    digest_of,
    lock,
    read_entry,
)
from worker.results_folder import write_whole

_NEW: Final = ".new-"
_OLD: Final = ".old-"
_ENTRY_NAME: Final = re.compile(r"[0-9a-f]{64}")
_LOOK_AGAIN_SEC: Final = 0.2
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})

log = structlog.get_logger()

ResultT = TypeVar("ResultT")


def means_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    return error.errno in _NO_ROOM


class InputCache:
    """Finds, adds and deletes entries. Nothing is made on the disk before the first addition.

    Args:
        folder: the cache's own folder, on the disk of RESULTS_DIR.
        max_bytes: what unused entries may take together with used ones; used ones are never deleted.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    async def start(self) -> None:
        """Delete what killed processes left half-made, and what the cache has no room for.

        Raises:
            OSError: the folder cannot be read or written.
        """
        await _to_its_end(self._sweep)
        await self.trim()

    async def find(self, wanted: Wanted) -> Pin | None:
        """Return the entry that fits and was used last, pinned. A damaged entry counts as none and is deleted.

        Raises:
            OSError: the folder cannot be read.
        """
        return await _to_its_end(lambda: self._find(wanted), _release)

    @contextlib.asynccontextmanager
    async def workspace(self, wanted: Wanted) -> AsyncIterator[Workspace]:
        """A folder to make an entry in, once nobody else makes the same one. Look for the entry again inside.

        Raises:
            OSError: it cannot be made.
        """
        while (made := await _to_its_end(lambda: self._new(wanted), self._leave)) is None:  # noqa: ASYNC110 - see below
            await asyncio.sleep(_LOOK_AGAIN_SEC)  # another process tells nothing when it is done
        try:
            yield made
        finally:
            await _to_its_end(lambda: self._leave(made))

    async def add(self, made: Workspace, record: CacheRecord) -> Pin:
        """Turn a workspace, whose `content` is ready and synced, into an entry; delete others if there is no room.

        Raises:
            OSError: it cannot be written.
        """
        pin = await _to_its_end(lambda: self._publish(made, record), _release)
        try:
            await self.trim()
        except BaseException:
            pin.release()
            raise
        return pin

    async def trim(self) -> None:
        """Delete the entries that nobody uses, those unused for longest first, until all fit.

        Raises:
            OSError: one cannot be deleted.
        """
        await _to_its_end(lambda: self._evict(lambda kept, _: kept > self._max_bytes))

    async def make_room(self, needed_bytes: int) -> None:
        """Delete entries that nobody uses until so much of the disk is free, or none is left.

        Raises:
            OSError: with ENOSPC: it is not enough.
        """
        await _to_its_end(lambda: self._evict(lambda _, gone: self.free_bytes() + gone < needed_bytes))
        if (free := self.free_bytes()) < needed_bytes:
            raise OSError(errno.ENOSPC, f"{needed_bytes} bytes are needed and {free} are free", str(self._folder))

    async def drop_unused(self) -> int:
        """Delete every entry that nobody uses, and return how many those were.

        Raises:
            OSError: one cannot be deleted.
        """
        return await _to_its_end(lambda: self._evict(lambda _kept, _gone: True))

    def free_bytes(self) -> int:
        """What is free on the cache's disk."""
        place = self._folder
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    # What follows blocks, and runs in threads.

    @contextlib.contextmanager
    def _guard(self) -> Iterator[list[Path]]:
        """Keep everybody else from finding, adding or removing entries: for moments only.

        Yields:
            A list for folders to delete; they are deleted afterwards, which may take its time.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        doomed: list[Path] = []
        descriptor = os.open(self._folder / ".guard", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield doomed
        finally:
            os.close(descriptor)
            for folder in doomed:
                _delete(folder)

    def _find(self, wanted: Wanted) -> Pin | None:
        if not self._folder.exists():
            return None
        with self._guard() as doomed:
            fitting = [entry for entry in self._entries(doomed) if wanted.fits(entry.record)]
            if not fitting:
                return None
            entry = max(fitting, key=lambda each: each.used_ns)
            return entry.pinned()

    def _new(self, wanted: Wanted) -> Workspace | None:
        folder = self._folder / f"{_NEW}{wanted.name}"
        with self._guard() as doomed:
            if folder.exists() and not self._put_away(folder, doomed):
                return None
            folder.mkdir()
            return Workspace(folder, lock(folder, fcntl.LOCK_EX, os.O_CREAT))

    def _leave(self, made: Workspace | None) -> None:
        """End the work in a workspace, and delete it unless it has become an entry."""
        if made is None:
            return
        try:
            if not made.published:
                with self._guard() as doomed:
                    self._rename_away(made.folder, doomed)
        finally:
            os.close(made.descriptor)

    def _publish(self, made: Workspace, record: CacheRecord) -> Pin:
        for file in made.folder.iterdir():
            if file.name not in {LOCK, CONTENT}:
                file.unlink()
        write_whole(made.folder / RECORD, record.model_dump_json(indent=2).encode())
        folder = self._folder / digest_of(record.source, record.validator, record.sha256, record.form)
        with self._guard() as doomed:
            if folder.exists() and (there := read_entry(folder)) is not None:
                return there.pinned()  # another process was quicker
            if folder.exists():
                self._rename_away(folder, doomed)
            made.folder.rename(folder)
            made.published = True
            fcntl.flock(made.descriptor, fcntl.LOCK_SH)
            return Pin(folder, record, os.dup(made.descriptor))

    def _sweep(self) -> None:
        if not self._folder.exists():
            return
        with self._guard() as doomed:
            doomed.extend(self._folder.glob(f"{_OLD}*"))
            for folder in self._folder.glob(f"{_NEW}*"):
                self._put_away(folder, doomed)
            self._entries(doomed)

    def _evict(self, too_much: Callable[[int, int], bool]) -> int:
        """Delete unused entries while `too_much(bytes kept, bytes deleted here)`; return how many were deleted."""
        if not self._folder.exists():
            return 0
        with self._guard() as doomed:
            entries = sorted(self._entries(doomed), key=lambda each: each.used_ns)
            kept, gone, deleted = sum(each.record.kept_bytes for each in entries), 0, 0
            for entry in entries:
                if not too_much(kept, gone):
                    break
                if self._put_away(entry.folder, doomed):
                    kept, gone = kept - entry.record.kept_bytes, gone + entry.record.kept_bytes
                    deleted += 1
                    log.info("cached input deleted", action="cache_evict", url=entry.record.url)
            return deleted

    def _entries(self, doomed: list[Path]) -> list[Entry]:
        """All whole entries; damaged ones are put away."""
        entries = []
        for folder in self._folder.iterdir():
            if not _ENTRY_NAME.fullmatch(folder.name):
                continue
            entry = read_entry(folder)
            if entry is not None:
                entries.append(entry)
            elif self._put_away(folder, doomed):
                log.warning("a damaged entry of the cache is deleted", action="cache_damaged", folder=str(folder))
        return entries

    def _put_away(self, folder: Path, doomed: list[Path]) -> bool:
        """Rename for deletion, unless somebody uses it."""
        try:
            descriptor = lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except FileNotFoundError:  # its maker was killed before it could make the lock, or somebody deleted it
            descriptor = -1
        try:
            self._rename_away(folder, doomed)
        finally:
            if descriptor >= 0:
                os.close(descriptor)
        return True

    def _rename_away(self, folder: Path, doomed: list[Path]) -> None:
        gone = self._folder / f"{_OLD}{secrets.token_hex(8)}"
        folder.rename(gone)
        doomed.append(gone)


def _release(pin: Pin | None) -> None:
    if pin is not None:
        pin.release()


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another process may be deleting it too
    if folder.exists():
        log.warning("cannot be deleted; remove it by hand", action="cache_delete", folder=str(folder))


async def _to_its_end(call: Callable[[], ResultT], undo: Callable[[ResultT], object] | None = None) -> ResultT:
    """Run something short in a thread, and wait for its end also when cancelled.

    Args:
        call: what to do.
        undo: takes the result back if nobody is there any more to receive it.
    """
    running = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        await asyncio.wait({running})
    except asyncio.CancelledError:
        while not running.done():
            with contextlib.suppress(asyncio.CancelledError):  # the first one is passed on below
                await asyncio.wait({running})
        if running.exception() is None and undo is not None:
            await asyncio.shield(asyncio.to_thread(undo, running.result()))
        raise
    return running.result()
