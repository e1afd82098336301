"""Reads tar and zip archives that nobody vouches for, into a folder that is there whole or not at all.

Runs in a process of its own (archive_reader_child), which bounds the memory of the libraries used here.
"""

from __future__ import annotations

import bz2
import contextlib
import errno
import fcntl
import lzma
import os
import re
import secrets
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Final, Protocol, cast

from orchestrator_client.archives.archive_reader_folder import Allowance, ConfinedFolder, fsync, refusal, shown
from orchestrator_client.archives.archive_reader_formats import (
    ArchiveFormat,
    ContentFormat,
    UnpackLimits,
    choose_format,
)
from orchestrator_client.errors import ArchiveError, UnsafeArchiveError, WireError

_CHUNK: Final = 1024**2
_ZEROS: Final = bytes(_CHUNK)
_LONGEST_HEADER: Final = 64 * 1024
"""Bytes of an extended tar header, which tarfile reads into memory whole and searches with slow patterns."""
_LONGEST_LINK: Final = 4096
_ZIP_LOCAL_HEADER: Final = 30
_ZIP_ENCRYPTED: Final = 0x41  # the old kind, and the strong kind
_TEMPORARY: Final = re.compile(r"\.unpack-[0-9a-f]{8}")


class Stream(Protocol):
    """What can be read from front to back."""

    def read(self, size: int, /) -> bytes:
        """Return that many bytes; fewer only at the end."""
        ...


def unpack_here(
    archive: Path, target: Path, archive_format: ArchiveFormat = "auto", limits: UnpackLimits | None = None
) -> int:
    """Unpack in this process; see `archive_reader.unpack`, which bounds memory and time as well.

    Returns:
        The bytes of all files.

    Raises:
        ArchiveError: no archive, broken, cut off, or not of the format that was asked for.
        UnsafeArchiveError: a member, or how much comes out of it, is not allowed.
        OSError: the disk, or the target exists.
    """
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, "the folder to unpack into exists", str(target))
    found = choose_format(archive, archive_format)
    remove_leftovers(target)
    temporary = target.parent / f".{target.name}.unpack-{secrets.token_hex(4)}"
    temporary.mkdir(mode=0o755)
    lock = _lock(temporary)
    try:
        temporary.chmod(0o755)  # whatever the umask is
        allowance = Allowance(limits or UnpackLimits(), archive.stat().st_size)
        folder = ConfinedFolder(temporary, allowance)
        if found == "zip":
            _unpack_zip(archive, folder)
        else:
            with _decompressed(archive, found) as stream:
                _unpack_tar(_ForwardReader(stream, allowance), folder)
        size = folder.finish()
        temporary.rename(target)
        fsync(target.parent)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    return size


def remove_leftovers(target: Path) -> None:
    """Remove what unpackings of this target have left that did not live to the end.

    Raises:
        OSError: something cannot be removed.
    """
    with os.scandir(target.parent) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.startswith(f".{target.name}.unpack-")]
    for folder in left:
        if _TEMPORARY.fullmatch(folder.name.removeprefix(f".{target.name}")):
            try:
                lock = _lock(folder)
            except (BlockingIOError, FileNotFoundError):  # somebody is unpacking, or has just finished
                continue
            try:
                shutil.rmtree(folder)
            finally:
                if lock is not None:
                    os.close(lock)


def _lock(folder: Path) -> int | None:
    """Mark a folder as in use until the descriptor is closed, or this process ends.

    Returns:
        The descriptor; None where the file system has no locks for folders, as NFS.

    Raises:
        BlockingIOError: another one has it.
        OSError: it is no folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


@contextlib.contextmanager
def _fault_of_the_archive(where: str) -> Iterator[None]:
    """Turn what a library raises over an archive's bytes into our errors; the disk's errors stay what they are."""
    try:
        yield
    except (WireError, MemoryError):
        raise
    except RecursionError as error:
        raise UnsafeArchiveError(f"archive refused {where}: its headers are nested too deeply") from error
    except Exception as error:  # tarfile, zipfile and the decompressors raise some twenty classes over broken bytes
        if isinstance(error, OSError) and error.errno not in {None, errno.EINVAL}:  # EINVAL: a seek to nonsense
            raise
        raise ArchiveError(f"the archive is broken or cut off {where}: {str(error) or type(error).__name__}") from error


@contextlib.contextmanager
def _decompressed(archive: Path, found: ContentFormat) -> Iterator[Stream]:
    if found == "tar.gz":
        from isal import igzip_threaded  # noqa: PLC0415 - only the child process needs it

        with igzip_threaded.open(archive, "rb") as stream:  # type: ignore[no-untyped-call]
            yield stream
    elif found == "tar.bz2":
        with bz2.open(archive, "rb") as stream:
            yield stream
    elif found == "tar.xz":
        with lzma.open(archive, "rb") as stream:
            yield stream
    else:
        with archive.open("rb") as stream:
            yield stream


class _ForwardReader:
    """The tar stream as tarfile sees it: headers only, and never backwards.

    tarfile reads headers through `read`; contents are taken with `content`. `member` is the last member's name, for
    errors.
    """

    def __init__(self, stream: Stream, allowance: Allowance) -> None:
        self._stream = stream
        self._allowance = allowance
        self._position = 0
        self.member = ""
        self.last_header = b""

    @property
    def where(self) -> str:
        return f"after member {shown(self.member)}" if self.member else "at its beginning"

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> int:
        if position < self._position:
            raise ArchiveError(f"the archive is broken {self.where}: a header there points backwards")
        for _ in self.content(position - self._position, whole=False):
            pass
        return self._position

    def read(self, size: int) -> bytes:
        if not 0 <= size <= _LONGEST_HEADER:
            text = f"a header there has {size} bytes, more than the {_LONGEST_HEADER} that are allowed"
            raise UnsafeArchiveError(f"archive refused {self.where}: {text}")
        self.last_header = self._take(size)
        return self.last_header

    def content(self, size: int, *, whole: bool = True) -> Iterator[bytes]:
        """Yield the next `size` bytes.

        Raises:
            ArchiveError: they are not there, unless not `whole`.
        """
        while size > 0:
            chunk = self._take(min(size, _CHUNK))
            if not chunk:
                if whole:
                    raise ArchiveError(
                        f"the archive is cut off in member {shown(self.member)}: {size} bytes are missing"
                    )
                return
            size -= len(chunk)
            yield chunk

    def drain(self) -> None:
        """Read to the end: checksums come last."""
        while self._take(_CHUNK):
            pass

    def _take(self, size: int) -> bytes:
        with _fault_of_the_archive(self.where):
            data = self._stream.read(size)
        self._position += len(data)
        self._allowance.decompress(len(data), self.member)
        return data


def _unpack_tar(reader: _ForwardReader, folder: ConfinedFolder) -> None:
    with _fault_of_the_archive(reader.where):
        # Opened without a compression: what tarfile needs of a file is read, seek and tell.
        tar = tarfile.TarFile(fileobj=reader, mode="r", encoding="utf-8", errors="surrogateescape")  # type: ignore[arg-type]
    while True:
        with _fault_of_the_archive(reader.where):
            member = tar.next()
        if member is None:
            break
        reader.member = member.name
        _unpack_tar_member(member, reader, folder)
        member.pax_headers = {}  # tarfile keeps all members
    # tarfile takes a broken header, and a missing one, for the end.
    if reader.last_header != tarfile.NUL * tarfile.BLOCKSIZE:
        raise ArchiveError(f"the archive is broken or cut off {reader.where}: there is neither a header nor an end")
    reader.drain()


def _unpack_tar_member(member: tarfile.TarInfo, reader: _ForwardReader, folder: ConfinedFolder) -> None:
    name = member.name
    if member.isdir():
        folder.add_folder(name)
    elif member.issym():
        folder.add_symbolic_link(name, member.linkname)
    elif member.islnk():
        folder.add_hard_link(name, member.linkname)
    elif member.isreg():
        content = _sparse_content(member, reader) if member.issparse() else reader.content(member.size)
        if member.size < 0:
            raise ArchiveError(f"the archive is broken: member {shown(name)} has a size of {member.size} bytes")
        folder.add_file(name, content, executable=bool(member.mode & stat.S_IXUSR))
    elif member.isdev():
        raise refusal(name, "it is a device or a named pipe")
    else:
        raise refusal(name, f"it is of the unknown type {member.type!r}")


def _sparse_content(member: tarfile.TarInfo, reader: _ForwardReader) -> Iterator[bytes]:
    """Yield a sparse file with its holes, which count like everything else."""
    position = 0
    parts = cast("list[tuple[int, int]]", member.sparse or [])  # typeshed has it otherwise
    for offset, size in parts:
        if offset < position or size < 0 or offset + size > member.size:
            raise ArchiveError(f"the archive is broken: the map of the sparse member {shown(member.name)} is wrong")
        yield from _hole(offset - position)
        yield from reader.content(size)
        position = offset + size
    yield from _hole(member.size - position)


def _hole(size: int) -> Iterator[bytes]:
    while size > 0:
        yield _ZEROS[: min(size, _CHUNK)]
        size -= _CHUNK


def _unpack_zip(archive: Path, folder: ConfinedFolder) -> None:
    with contextlib.ExitStack() as stack:
        with _fault_of_the_archive("in its list of members"):
            zipped = stack.enter_context(zipfile.ZipFile(archive))
        members = zipped.infolist()
        _check_overlaps(members, zipped.start_dir)
        for member in members:
            _unpack_zip_member(zipped, member, folder)


def _check_overlaps(members: list[zipfile.ZipInfo], end: int) -> None:
    """Refuse members that share bytes of the archive: that is how a small zip holds petabytes without nesting."""
    for member in sorted(members, key=lambda member: member.header_offset, reverse=True):
        if member.header_offset + _ZIP_LOCAL_HEADER + member.compress_size > end:
            raise refusal(member.orig_filename, "it overlaps another member")
        end = member.header_offset


def _unpack_zip_member(zipped: zipfile.ZipFile, member: zipfile.ZipInfo, folder: ConfinedFolder) -> None:
    name = member.orig_filename  # `filename` ends at the first NUL
    mode = member.external_attr >> 16  # what Unix tools put there; else 0
    kind = stat.S_IFMT(mode)
    if member.flag_bits & _ZIP_ENCRYPTED:
        raise ArchiveError(f"member {shown(name)} of the archive is encrypted; pack it without a password")
    if member.compress_type not in {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}:
        text = f"compressed with method {member.compress_type}; only stored and deflated members are read"
        raise ArchiveError(f"member {shown(name)} of the archive is {text}")
    if kind not in {0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}:
        raise refusal(name, "it is a device, a socket or a named pipe")
    if name.endswith("/") or kind == stat.S_IFDIR:
        if member.file_size or kind not in {0, stat.S_IFDIR}:
            raise refusal(name, "it has the name of a folder, but is none")
        folder.add_folder(name)
    elif kind == stat.S_IFLNK:
        to = b"".join(_zip_content(zipped, member, _LONGEST_LINK))
        folder.add_symbolic_link(name, os.fsdecode(to))
    else:
        with contextlib.closing(_zip_content(zipped, member)) as content:
            folder.add_file(name, content, executable=bool(mode & stat.S_IXUSR))


def _zip_content(
    zipped: zipfile.ZipFile, member: zipfile.ZipInfo, most: int | None = None
) -> Generator[bytes, None, None]:
    where = f"in member {shown(member.orig_filename)}"
    size = 0
    with contextlib.ExitStack() as stack:
        with _fault_of_the_archive(where):
            file = stack.enter_context(zipped.open(member))
        while True:
            with _fault_of_the_archive(where):
                chunk = file.read(_CHUNK)
            if not chunk:
                break
            size += len(chunk)
            if most is not None and size > most:
                raise refusal(member.orig_filename, f"it is a symbolic link of more than {most} bytes")
            yield chunk
    if size != member.file_size:
        raise ArchiveError(f"the archive is broken {where}: {size} bytes came of {member.file_size}")
