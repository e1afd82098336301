"""What goes into an archive: the scan of a folder, and a tar stream of it where there is no GNU tar."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from orchestrator_client.errors import ArchiveError

MTIME: Final = 0
"""The time that every member carries; real times would make equal folders unequal archives."""
RECORD_BYTES: Final = 64 * 1024
"""What a tar stream is padded to; both sources pad alike."""
_BLOCK: Final = 512
_NAME_FIELD: Final = 100
_PIECE: Final = 1024**2


@dataclass(frozen=True)
class Member:
    """One entry of an archive.

    Attributes:
        name: its path in the archive, without a trailing slash; bytes that are no UTF-8 are surrogates.
        source: the file or folder that it is read from; links are resolved.
        size: bytes of a file; 0 for a folder.
        is_folder: whether it is a folder.
        executable: whether anybody may execute it.
        mtime_ns: when a file was last written; only for noticing changes.
    """

    name: str
    source: Path
    size: int
    is_folder: bool
    executable: bool = False
    mtime_ns: int = 0

    @property
    def tar_bytes(self) -> int:
        """What it takes in a GNU tar stream: header, long name, content; padded."""
        length = len(os.fsencode(self.name)) + self.is_folder  # a folder's name ends with a slash there
        long_name = _BLOCK + _padded(length + 1, _BLOCK) if length > _NAME_FIELD else 0
        return long_name + _BLOCK + _padded(self.size, _BLOCK)


@dataclass(frozen=True)
class Content:
    """A scanned folder.

    Attributes:
        folder: the scanned folder.
        members: all entries in the order of the archive: sorted by the bytes of their names, so folders come first.
        has_links: whether some of them are symbolic links.
    """

    folder: Path
    members: tuple[Member, ...]
    has_links: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(member.size for member in self.members)

    @property
    def tar_bytes(self) -> int:
        """Exact size of the tar stream."""
        return _padded(sum(member.tar_bytes for member in self.members) + 2 * _BLOCK, RECORD_BYTES)


def scan(folder: Path) -> Content:
    """Look at everything in a folder. A link to a file inside it stands for that file.

    Raises:
        ArchiveError: there is no such folder, or it holds something that does not belong into an archive: a link that
            leads out, to a folder or nowhere, a device, a pipe, a socket, or something unreadable.
    """
    if folder.name in {"", ".."} or folder.is_symlink() or not folder.is_dir():
        raise ArchiveError(f"cannot archive {str(folder)!r}: it is no folder with a name of its own")
    real = folder.resolve()
    members = [Member(folder.name, folder, 0, is_folder=True)]
    waiting, links = [members[0]], False
    while waiting:
        parent = waiting.pop()
        try:
            with os.scandir(parent.source) as entries:
                for entry in entries:
                    member = _member(entry, f"{parent.name}/{entry.name}", real)
                    members.append(member)
                    links = links or entry.is_symlink()
                    if member.is_folder:
                        waiting.append(member)
        except OSError as error:
            raise ArchiveError(f"cannot archive {str(parent.source)!r}: {error.strerror}") from error
    members.sort(key=lambda member: os.fsencode(member.name))
    return Content(folder, tuple(members), links)


def tar_stream(content: Content) -> Iterator[bytes]:
    """The folder as a tar stream, by the rules that GNU tar is given by `tar_command`; in pieces of up to 1 MiB.

    Raises:
        ArchiveError: a file vanished, cannot be read, or changed since the scan or while it was read.
    """
    import tarfile  # noqa: PLC0415 - needed only where GNU tar is missing

    done = 0
    for member in content.members:
        info = tarfile.TarInfo(member.name)
        info.mtime = MTIME
        info.size = member.size
        info.type = tarfile.DIRTYPE if member.is_folder else tarfile.REGTYPE
        info.mode = 0o755 if member.is_folder or member.executable else 0o644
        yield info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
        if not member.is_folder:
            yield from _file_bytes(member)
            yield bytes(_padded(member.size, _BLOCK) - member.size)
        done += member.tar_bytes
    yield bytes(content.tar_bytes - done)


def tar_command(program: str, content: Content) -> list[str]:
    """How GNU tar writes the folder to its stdout; `name_list` belongs on its stdin."""
    return [
        program, "--create", "--file=-", "--format=gnu", f"--blocking-factor={RECORD_BYTES // _BLOCK}",
        f"--directory={content.folder.parent}",
        f"--mtime=@{MTIME}", "--owner=0", "--group=0", "--numeric-owner", "--mode=ug-s,o-t,u=rwX,go=rX",
        "--hard-dereference", *(["--dereference"] if content.has_links else []),
        "--no-recursion", "--null", "--verbatim-files-from", "--no-unquote", "--files-from=-",
    ]  # fmt: skip


def name_list(content: Content) -> bytes:
    """The names of all members, each ended by a NUL."""
    return b"".join(os.fsencode(member.name) + b"\0" for member in content.members)


def _member(entry: os.DirEntry[str], name: str, root: Path) -> Member:
    source = Path(entry.path)
    if entry.is_symlink():
        try:
            source = source.resolve(strict=True)
        except (OSError, RuntimeError) as error:  # RuntimeError: links that go round in a circle
            raise ArchiveError(f"cannot archive the link {entry.path!r}: it leads nowhere; remove it") from error
        if not source.is_relative_to(root):
            raise ArchiveError(f"cannot archive the link {entry.path!r}: it leads out of the folder; put a copy there")
        if source.is_dir():
            raise ArchiveError(f"cannot archive the link {entry.path!r}: it leads to a folder; put a copy there")
    facts = source.lstat()
    if stat.S_ISDIR(facts.st_mode):
        return Member(name, source, 0, is_folder=True)
    if not stat.S_ISREG(facts.st_mode):
        raise ArchiveError(f"cannot archive {entry.path!r}: it is neither a file nor a folder; remove it")
    executable = bool(facts.st_mode & 0o111)
    return Member(name, source, facts.st_size, is_folder=False, executable=executable, mtime_ns=facts.st_mtime_ns)


def _file_bytes(member: Member) -> Iterator[bytes]:
    path = str(member.source)
    try:
        with open(path, "rb", buffering=0, opener=_no_link) as file:
            before = os.fstat(file.fileno())
            left = member.size
            while left and (data := file.read(min(left, _PIECE))):
                left -= len(data)
                yield data
            after = os.fstat(file.fileno())
    except OSError as error:
        raise ArchiveError(f"cannot archive {path!r}: {error.strerror}") from error
    seen = {(facts.st_size, facts.st_mtime_ns) for facts in (before, after)}
    if left or seen != {(member.size, member.mtime_ns)}:
        raise ArchiveError(f"cannot archive {path!r}: it changed while it was archived; archive it again")


def _no_link(path: str, flags: int) -> int:
    # Not blocking, so that a pipe that took the file's place is not waited for; for files it means nothing.
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
