"""Hostile archives for tests, a place with something to spoil, and how a refusal is seen."""

from __future__ import annotations

import asyncio
import io
import stat
import tarfile
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator_client.archives.archive_reader import UnpackLimits, unpack
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import ArchiveError, UnsafeArchiveError

SECRET = "do not touch"
FOLDER, LINK, HARD = tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE


@dataclass(frozen=True)
class Member:
    """One member, for either kind of archive."""

    name: str
    kind: bytes = tarfile.REGTYPE
    content: bytes = b""
    to: str = ""
    mode: int = 0o644


def tar_of(*members: Member, dialect: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=dialect) as tar:
        for member in members:
            info = tarfile.TarInfo(member.name)
            info.type, info.linkname, info.mode, info.size = member.kind, member.to, member.mode, len(member.content)
            tar.addfile(info, io.BytesIO(member.content))
    return out.getvalue()


def pax_of(*members: Member) -> bytes:
    return tar_of(*members, dialect=tarfile.PAX_FORMAT)


def zip_of(*members: Member) -> bytes:
    modes = {FOLDER: stat.S_IFDIR, LINK: stat.S_IFLNK, tarfile.FIFOTYPE: stat.S_IFIFO, tarfile.CHRTYPE: stat.S_IFCHR}
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
        warnings.filterwarnings("ignore", message="Duplicate name")
        for member in members:
            info = zipfile.ZipInfo("placeholder")
            info.filename = member.name  # the constructor would cut it at a NUL
            info.external_attr = (modes.get(member.kind, stat.S_IFREG) | member.mode) << 16
            info.compress_type = zipfile.ZIP_DEFLATED
            zipped.writestr(info, member.to if member.kind == LINK else member.content)
    return out.getvalue()


def header(name: str, kind: bytes, size: int) -> bytes:
    """Make a bare tar header; the size is a claim."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax_with(records: dict[str, str]) -> bytes:
    """Make the headers that give the next member some pax records."""
    body = b""
    for key, value in records.items():
        record, length = b"", 0
        while len(record) != length or not length:
            length = len(record) or 1
            record = f"{length} {key}={value}\n".encode()
        body += record
    return header("pax", tarfile.XHDTYPE, len(body)) + body.ljust(-len(body) // 512 * -512, b"\0")


def around(folder: Path) -> dict[str, tuple[int, int, bytes | str]]:
    """Everything in a folder: mode, time of a file's last change, content."""
    seen: dict[str, tuple[int, int, bytes | str]] = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        facts = path.lstat()
        if stat.S_ISREG(facts.st_mode):
            seen[str(path)] = (facts.st_mode, facts.st_mtime_ns, path.read_bytes())
        else:
            seen[str(path)] = (facts.st_mode, 0, str(path.readlink()) if path.is_symlink() else "")
    return seen


def place(base: Path, archive: bytes) -> Path:
    """Put an archive where there is something to spoil: a file and a folder beside it, and links to them."""
    inside = base / "inside"
    inside.mkdir()
    for folder in (base, inside):
        (folder / "secret").write_text(SECRET)
        (folder / "a").mkdir()
    (inside / "archive").write_bytes(archive)
    return inside


def refused(base: Path, archive: bytes, text: str, limits: UnpackLimits | None = None) -> None:
    """Unpack in this process, and see that only the error comes of it."""
    inside = place(base, archive)
    before = around(base)
    with pytest.raises(UnsafeArchiveError, match=text):
        unpack_here(inside / "archive", inside / "out", limits=limits)
    assert around(base) == before


def refused_by_the_child(base: Path, archive: bytes, text: str) -> None:
    inside = place(base, archive)
    before = around(base)
    with pytest.raises(UnsafeArchiveError, match=text):
        asyncio.run(unpack(inside / "archive", inside / "out"))
    assert around(base) == before


def broken(base: Path, archive: bytes, text: str) -> None:
    inside = place(base, archive)
    before = around(base)
    with pytest.raises(ArchiveError, match=text):
        unpack_here(inside / "archive", inside / "out", limits=UnpackLimits(total_bytes=10**6))
    assert around(base) == before
