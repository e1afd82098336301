"""Honest archives for tests, and what a folder holds once they are unpacked."""

from __future__ import annotations

import io
import os
import stat
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from orchestrator_client.archives.archive_reader import ArchiveFormat

FORMATS: list[ArchiveFormat] = ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"]
NOISE = bytes(os.urandom(300_000))
TREE: dict[str, bytes] = {
    "final_model/config.json": b'{"a": 1}',
    "final_model/deep/er/weights.safetensors": NOISE,
    "final_model/nothing": b"",
    "final_model/Größe 模型.bin": b"unicode",
    "final_model/-rf *\n'\" $(x)": b"weird",
    "final_model/readme": b"lower case",
    "final_model/README": b"upper case",
    "final_model/cafe\u0301": b"two code points",
    "final_model/caf\u00e9": b"one code point",
}


@dataclass(frozen=True)
class Seen:
    """What a path is: the mode, and the content of a file or the target of a link."""

    mode: int
    content: bytes | str = ""


def snapshot(folder: Path) -> dict[str, Seen]:
    seen = {}
    for path in sorted(folder.rglob("*")):
        mode = path.lstat().st_mode
        content: bytes | str = ""
        if stat.S_ISLNK(mode):
            content = str(path.readlink())
        elif stat.S_ISREG(mode):
            content = path.read_bytes()
        seen[path.relative_to(folder).as_posix()] = Seen(mode, content)
    return seen


def pack(folder: Path, archive_format: ArchiveFormat, tree: dict[str, bytes] | None = None) -> Path:
    """Write an archive of TREE, an empty folder, a program and a link."""
    path = folder / "packed"
    tree = TREE if tree is None else tree
    if archive_format == "zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as zipped:
            for name, content in tree.items():
                zipped.writestr(name, content)
            zipped.mkdir("final_model/empty")
            for name, content, mode in (("run", "#!", 0o100700), ("link", "deep/er", 0o120777)):
                info = zipfile.ZipInfo(f"final_model/{name}")
                info.external_attr = mode << 16
                zipped.writestr(info, content)
        return path
    compression = archive_format.removeprefix("tar").removeprefix(".")
    with tarfile.open(path, f"w:{compression}") as tar:  # type: ignore[call-overload]
        for name, content in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind, mode in (("empty", tarfile.DIRTYPE, 0o700), ("run", tarfile.REGTYPE, 0o6711)):
            info = tarfile.TarInfo(f"final_model/{name}")
            info.type, info.mode, info.size, info.uid = kind, mode, 2 if name == "run" else 0, 12345
            tar.addfile(info, io.BytesIO(b"#!"))
        info = tarfile.TarInfo("final_model/link")
        info.type, info.linkname = tarfile.SYMTYPE, "deep/er"
        tar.addfile(info)
    return path


def many_files(path: Path, count: int = 30_000) -> Path:
    """Write a tar that takes seconds to unpack, and little time to make."""
    with path.open("wb") as file:
        for number in range(count):
            file.write(tarfile.TarInfo(f"f{number}").tobuf())
        file.write(bytes(1024))
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".unpack-" in path.name]
