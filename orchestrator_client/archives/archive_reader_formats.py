"""What archives there are, how they are told apart, and how much may come out of one. Light: the daemon imports it."""

from __future__ import annotations

import bz2
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from orchestrator_client.errors import ArchiveError

ArchiveFormat = Literal["auto", "zip", "tar", "tar.gz", "tgz", "tar.bz2", "tar.xz", "none"]
"""`archive_format` of a spec (WIRE 4.9); `tgz` is `tar.gz`."""
ContentFormat = Literal["zip", "tar", "tar.gz", "tar.bz2", "tar.xz"]

_ZIP_MAGIC: Final = (b"PK\x03\x04", b"PK\x05\x06")  # a first member; the end of an archive without members
_GZIP_MAGIC: Final = b"\x1f\x8b"
_BZIP2_MAGIC: Final = b"BZh"
_XZ_MAGIC: Final = b"\xfd7zXZ\0"
_ZIP_HEADER: Final = 30
_TAR_BLOCK: Final = 512
_NO_TAR: Final = "compressed data that holds no tar, or is broken or cut off"
_MOST_PEEKED: Final = 2 * 1024**2
"""Compressed bytes that are looked at; a bzip2 block of 900 kB has to be there whole before it gives anything."""


@dataclass(frozen=True)
class UnpackLimits:
    """How much may come out of one archive.

    Attributes:
        total_bytes: sum of the sizes of all unpacked files.
        files: members of any kind, and folders that only members' names mention.
        ratio: unpacked size divided by the archive's; counts once more than `RATIO_FREE_BYTES` are unpacked.
        seconds: how long it may take.
        room_bytes: how much of the disk it may take; None: all that is free.
    """

    total_bytes: int = 256 * 1024**3
    files: int = 100_000
    ratio: float = 200.0
    seconds: float = 3600.0
    room_bytes: int | None = None


RATIO_FREE_BYTES: Final = 256 * 1024**2
"""As long as no more than this is unpacked, no ratio is too high: an honest small archive may hold a file of zeros."""

MEMBER_BYTES: Final = 4096
"""What a member takes on the disk besides its content, about: file systems use whole blocks."""


class _Decompressor(Protocol):
    def decompress(self, data: bytes, max_length: int, /) -> bytes: ...


def looks_like_archive(path: Path) -> bool:
    """Whether a file's content, not its name, is an archive that `unpack` reads.

    A PyTorch file (`.pt`, `.bin`) is a zip too, but one model and no archive of files: it counts as none. So does gzip
    or bzip2 data that holds no tar.

    Raises:
        OSError: the file cannot be read.
    """
    found, _ = content_format(path)
    return found is not None and not (found == "zip" and _is_torch_file(path))


def choose_format(path: Path, wanted: ArchiveFormat) -> ContentFormat:
    """Say how a file is to be unpacked.

    Raises:
        ArchiveError: it is no archive, or not the kind that was asked for.
        OSError: the file cannot be read.
    """
    if wanted == "none":
        raise ArchiveError("archive_format 'none' means that the file is used as it is; it is not unpacked")
    found, words = content_format(path)
    known = "tar.gz" if wanted == "tgz" else wanted
    if found is None or known not in {"auto", found}:
        asked = "zip, tar, tar.gz, tar.bz2 or tar.xz" if wanted == "auto" else f"archive_format {wanted!r}"
        raise ArchiveError(f"{asked} was expected, but the content looks like {words}")
    return found


def content_format(path: Path) -> tuple[ContentFormat | None, str]:
    """Tell a file's format by its first bytes; the second value says in words what it looks like.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_MOST_PEEKED)
    if head.startswith(_ZIP_MAGIC):
        return "zip", "zip"
    if _is_tar(head):
        return "tar", "tar"
    if head.startswith(_XZ_MAGIC):  # not looked into: it may ask for gigabytes of memory
        return "tar.xz", "tar.xz"
    if head.startswith(_GZIP_MAGIC) and _holds_tar(zlib.decompressobj(wbits=31), head):
        return "tar.gz", "tar.gz"
    if head.startswith(_BZIP2_MAGIC) and _holds_tar(bz2.BZ2Decompressor(), head):
        return "tar.bz2", "tar.bz2"
    compressed = head.startswith((_GZIP_MAGIC, _BZIP2_MAGIC))
    return None, _NO_TAR if compressed else "no archive" if head else "an empty file"


def _holds_tar(decompressor: _Decompressor, head: bytes) -> bool:
    try:
        return _is_tar(decompressor.decompress(head, _TAR_BLOCK))
    except (zlib.error, OSError):  # OSError is what bz2 raises
        return False


def _is_tar(head: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(head[:_TAR_BLOCK], "utf-8", "surrogateescape")
    except (tarfile.TarError, ValueError, OverflowError):
        return False
    return True


def _is_torch_file(path: Path) -> bool:
    """`torch.save` writes the member `<name>/data.pkl` first."""
    with path.open("rb") as file:
        head = file.read(_ZIP_HEADER)
        name = file.read(int.from_bytes(head[26:28], "little"))
    return name.endswith(b"/data.pkl")
