"""One entry of the cache of fetched files: what stands in its record, and how it is held in use."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pydantic import BaseModel, Field, ValidationError

CONTENT: Final = "content"
RECORD: Final = "entry.json"
LOCK: Final = "lock"
_BLOCK: Final = 4096


class CacheRecord(BaseModel):
    """`entry.json`; the time of its last change is when the entry was last used.

    Attributes:
        url: where the file came from, for people: without secrets.
        source: digest of the exact place, to find the entry by.
        form: what was done with the file; the same file unpacked and as it is are two entries.
        validator: ETag or Last-Modified; empty: the server gave none.
        sha256: digest of the fetched file; empty: nobody has asked for one, and a local archive was not read for it.
        fetched_bytes: its size.
        kept_bytes: what the content takes on the disk, at least 4096 for each file.
        payload: `content` for an unpacked archive, else `content/<file name>`.
    """

    url: str
    source: str
    form: str
    validator: str = ""
    sha256: str
    fetched_bytes: int = Field(ge=0)
    kept_bytes: int = Field(ge=0)
    payload: str = Field(pattern=rf"^{CONTENT}(/[^/\x00]+)?$")


@dataclass(frozen=True)
class Wanted:
    """What an entry is looked up by.

    Attributes:
        place: URL without userinfo, or path; may hold secrets, so only its digest is stored.
        form: see `CacheRecord`.
        sha256: digest that was asked for; it alone then decides, wherever the file came from. Empty: none was.
    """

    place: str
    form: str
    sha256: str = ""

    @property
    def source(self) -> str:
        """Digest of the place."""
        return hashlib.sha256(self.place.encode(errors="surrogatepass")).hexdigest()

    @property
    def name(self) -> str:
        """Name under which it is being made."""
        return digest_of(self.sha256 or self.source, self.form)

    def fits(self, record: CacheRecord) -> bool:
        """Whether an entry is what is wanted, or was and may be still."""
        if self.form != record.form:
            return False
        return self.sha256 == record.sha256 if self.sha256 else self.source == record.source and bool(record.validator)


class Pin:
    """An entry in use: it is not deleted before `release`."""

    def __init__(self, folder: Path, record: CacheRecord, descriptor: int) -> None:
        self.record = record
        self.path = folder / record.payload
        self._folder = folder
        self._descriptor = descriptor

    @property
    def unpacked(self) -> bool:
        """Whether it is the content of an archive."""
        return self.record.payload == CONTENT

    def again(self) -> Pin:
        """One more pin on the same entry."""
        return Pin(self._folder, self.record, os.dup(self._descriptor))

    def touch(self) -> None:
        """Note that it is used now."""
        # Somebody has emptied the cache by hand; or it is another user's entry, and only its order is ours to lose.
        with contextlib.suppress(FileNotFoundError, PermissionError):
            os.utime(self._folder / RECORD)

    def release(self) -> None:
        """Let it go. A second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


@dataclass
class Workspace:
    """A folder in which one entry is being made, by us alone.

    Attributes:
        folder: the entry will be what lies in its `content`; all else in it is left out.
        descriptor: holds its lock.
        published: whether it has become an entry.
    """

    folder: Path
    descriptor: int
    published: bool = False


@dataclass(frozen=True)
class Entry:
    """An entry as it was found; not pinned.

    Attributes:
        folder: where it lies.
        record: what it is.
        used_ns: when it was last used, nanoseconds since the epoch.
    """

    folder: Path
    record: CacheRecord
    used_ns: int

    def pinned(self) -> Pin:
        """Pin it. Only under the cache's guard: nobody can delete it then."""
        return Pin(self.folder, self.record, lock(self.folder, fcntl.LOCK_SH))


def bytes_taken(content: Path) -> int:
    """What a folder takes on the disk, files and folders counted with at least a block each.

    Raises:
        OSError: something cannot be looked at.
    """
    return sum(
        max(Path(parent, name).lstat().st_size, _BLOCK)
        for parent, folders, files in os.walk(content)
        for name in (*folders, *files)
    )


def read_entry(folder: Path) -> Entry | None:
    """Read one entry; None if it is damaged.

    Raises:
        OSError: it cannot be read here and now, for instance because another user has made it.
    """
    try:
        record = CacheRecord.model_validate_json((folder / RECORD).read_bytes())
        used_ns = (folder / RECORD).stat().st_mtime_ns
        payload = (folder / record.payload).stat()
        locked = (folder / LOCK).is_file()
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    if record.payload == CONTENT:
        whole = stat.S_ISDIR(payload.st_mode)
    else:
        whole = stat.S_ISREG(payload.st_mode) and payload.st_size == record.fetched_bytes
    return Entry(folder, record, used_ns) if whole and locked else None


def lock(folder: Path, how: int, flags: int = 0) -> int:
    """Lock an entry or a workspace.

    Args:
        folder: which.
        how: LOCK_SH or LOCK_EX, with LOCK_NB not to wait.
        flags: O_CREAT if the lock may have to be made.

    Returns:
        The descriptor that holds the lock.

    Raises:
        BlockingIOError: somebody else holds it.
        FileNotFoundError: it has no lock.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | flags, 0o644)
    try:
        fcntl.flock(descriptor, how)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def digest_of(*parts: str) -> str:
    """Digest of several texts, as a folder's name."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
