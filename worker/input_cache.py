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
from typing import Final

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
from worker.input_threads import InputThreads
from worker.results_folder import write_whole

_NEW: Final = ".new-"
_OLD: Final = ".old-"
_ENTRY_NAME: Final = re.compile(r"[0-9a-f]{64}")
_LOOK_AGAIN_SEC: Final = 0.2
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_RESERVE_BYTES: Final = 1024**3
_RESERVE_SHARE: Final = 0.02
"""What inputs leave free for results and logs of tasks: so much, or on a smaller disk this share of it."""

log = structlog.get_logger()


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
        self._threads = InputThreads("input-cache")

    async def start(self) -> None:
        """Delete what killed processes left half-made, and what the cache has no room for.

        Raises:
            OSError: the folder cannot be read or written.
        """
        await self._threads.to_its_end(self._sweep)
        await self.trim()

    async def find(self, wanted: Wanted) -> Pin | None:
        """Return the entry that fits and was used last, pinned. A damaged entry counts as none and is deleted.

        Raises:
            OSError: the folder cannot be read.
        """
        return await self._threads.to_its_end(lambda: self._find(wanted), _release)

    @contextlib.asynccontextmanager
    async def workspace(self, wanted: Wanted) -> AsyncIterator[Workspace]:
        """A folder to make an entry in, once nobody else makes the same one. Look for the entry again inside.

        Raises:
            OSError: it cannot be made.
        """
        while (made := await self._threads.to_its_end(lambda: self._new(wanted), self._leave)) is None:  # noqa: ASYNC110 - see below
            await asyncio.sleep(_LOOK_AGAIN_SEC)  # another process tells nothing when it is done
        try:
            yield made
        finally:
            await self._threads.to_its_end(lambda: self._leave(made))

    async def add(self, made: Workspace, record: CacheRecord) -> Pin:
        """Turn a workspace, whose `content` is ready and synced, into an entry; delete others if there is no room.

        Raises:
            OSError: it cannot be written.
        """
        pin = await self._threads.to_its_end(lambda: self._publish(made, record), _release)
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
        await self._threads.to_its_end(lambda: self._evict(lambda kept, _: kept - self._max_bytes))

    async def make_room(self, needed_bytes: int) -> None:
        """Delete entries that nobody uses until so much room is on the disk; none if all of them are not enough.

        Raises:
            OSError: with ENOSPC: they are not enough.
        """

        def missing(_: int, unused: int) -> int:
            bytes_missing = needed_bytes - self.room_bytes()
            return bytes_missing if bytes_missing <= unused else 0

        await self._threads.to_its_end(lambda: self._evict(missing))
        if (room := self.room_bytes()) < needed_bytes:
            text = f"{needed_bytes} bytes are needed and {room} are free, besides a reserve"
            raise OSError(errno.ENOSPC, text, str(self._folder))

    async def drop_unused(self) -> int:
        """Delete every entry that nobody uses, and return how many those were.

        Raises:
            OSError: one cannot be deleted.
        """
        return await self._threads.to_its_end(lambda: self._evict(lambda _, unused: unused + 1))

    def room_bytes(self) -> int:
        """What may be taken of the cache's disk: what is free, but for a reserve."""
        place = self._folder
        while not place.exists():
            place = place.parent
        disk = shutil.disk_usage(place)
        return max(disk.free - min(_RESERVE_BYTES, int(disk.total * _RESERVE_SHARE)), 0)

    def close(self) -> None:
        """Take no more calls."""
        self._threads.close()

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
            for entry in sorted(fitting, key=lambda each: each.used_ns, reverse=True):
                with _unusable_is_passed_over(entry.folder):
                    return entry.pinned()
            return None

    def _new(self, wanted: Wanted) -> Workspace | None:
        folder = self._folder / f"{_NEW}{wanted.name}"
        with self._guard() as doomed:
            if folder.exists() and not self._put_away(folder, doomed):
                return None
            folder.mkdir()
            return Workspace(folder, lock(folder, fcntl.LOCK_EX, os.O_CREAT))

    def _leave(self, made: Workspace | None) -> None:
        """End the work in a workspace, and delete it unless it has become an entry.

        It raises nothing, because that would hide why the work has ended; what is left is deleted at the next start.
        """
        if made is None:
            return
        try:
            if not made.published:
                with self._guard() as doomed:
                    self._rename_away(made.folder, doomed)
        except OSError as error:
            log.warning("cannot be deleted", action="cache_delete", folder=str(made.folder), error=str(error))
        finally:
            os.close(made.descriptor)

    def _publish(self, made: Workspace, record: CacheRecord) -> Pin:
        for file in made.folder.iterdir():
            if file.name not in {LOCK, CONTENT}:
                file.unlink()
        write_whole(made.folder / RECORD, record.model_dump_json(indent=2).encode())
        folder = self._folder / digest_of(record.source, record.validator, record.sha256, record.form)
        with self._guard() as doomed:
            with _unusable_is_passed_over(folder):
                if (there := read_entry(folder)) is not None:  # it was here before, or another process was quicker
                    pin = there.pinned()
                    pin.touch()  # it is what the server has now, so it is to be found before newer ones
                    return pin
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

    def _evict(self, wanted_bytes: Callable[[int, int], int]) -> int:
        """Delete unused entries, those unused for longest first, and return how many.

        Args:
            wanted_bytes: how much has to go, given what all entries take and what the unused ones take; they go until
                it is reached.
        """
        if not self._folder.exists():
            return 0
        with self._guard() as doomed:
            entries = sorted(self._entries(doomed), key=lambda each: each.used_ns)
            unused = [entry for entry in entries if self._is_unused(entry.folder)]
            wanted, gone, deleted = wanted_bytes(_sum(entries), _sum(unused)), 0, 0
            for entry in unused:
                if gone >= wanted:
                    break
                with _unusable_is_passed_over(entry.folder):
                    self._rename_away(entry.folder, doomed)
                    gone, deleted = gone + entry.record.kept_bytes, deleted + 1
                    log.info("cached input deleted", action="cache_evict", url=entry.record.url)
            return deleted

    def _entries(self, doomed: list[Path]) -> list[Entry]:
        """All whole entries; damaged ones are put away."""
        entries = []
        for folder in self._folder.iterdir():
            if not _ENTRY_NAME.fullmatch(folder.name):
                continue
            with _unusable_is_passed_over(folder):
                entry = read_entry(folder)
                if entry is not None:
                    entries.append(entry)
                elif self._put_away(folder, doomed):
                    log.warning("a damaged entry of the cache is deleted", action="cache_damaged", folder=str(folder))
        return entries

    def _is_unused(self, folder: Path) -> bool:
        """Whether nobody has an entry in use; as long as the guard is held it stays so."""
        with _unusable_is_passed_over(folder), contextlib.suppress(BlockingIOError):
            os.close(lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB))
            return True
        return False

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
        with contextlib.suppress(FileNotFoundError):  # nothing is there, or somebody has emptied the cache by hand
            folder.rename(gone)
            doomed.append(gone)


@contextlib.contextmanager
def _unusable_is_passed_over(folder: Path) -> Iterator[None]:
    """One entry that cannot be read or locked here is no reason to do without all others."""
    try:
        yield
    except OSError as error:
        text = "an entry of the cache cannot be used"
        log.warning(text, action="cache_unusable", folder=str(folder), error=str(error))


def _sum(entries: list[Entry]) -> int:
    return sum(entry.record.kept_bytes for entry in entries)


def _release(pin: Pin | None) -> None:
    if pin is not None:
        pin.release()


def _delete(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # another process may be deleting it too
    if folder.exists():
        log.warning("cannot be deleted; remove it by hand", action="cache_delete", folder=str(folder))
