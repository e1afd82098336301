"""Honest archives come out as they went in, broken ones not at all; and the process that does it leaves nothing."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import textwrap
import zipfile
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from waiting_until import wait_until

from orchestrator_client.archives import archive_reader, archive_reader_folder, archive_unpacking
from orchestrator_client.archives.archive_reader import (
    ArchiveFormat,
    UnpackLimits,
    content_root,
    looks_like_archive,
    unpack,
)
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import ArchiveError, UnsafeArchiveError

REPO = Path(__file__).resolve().parents[3]
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


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def temporaries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if ".unpack-" in path.name]


@pytest.mark.parametrize("asked", ["named", "auto"])
@pytest.mark.parametrize("archive_format", FORMATS)
async def test_every_format_comes_out_as_it_went_in(tmp_path: Path, archive_format: ArchiveFormat, asked: str):
    archive = pack(tmp_path, archive_format)
    assert looks_like_archive(archive)
    before = os.umask(0o077)  # the modes must not depend on it
    try:
        size = await unpack(archive, tmp_path / "out", archive_format if asked == "named" else "auto")
    finally:
        os.umask(before)
    seen = snapshot(tmp_path / "out")
    file, folder = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
    expected = {name: Seen(file, content) for name, content in TREE.items()}
    for name in ("final_model", "final_model/deep", "final_model/deep/er", "final_model/empty"):
        expected[name] = Seen(folder)
    expected["final_model/run"] = Seen(stat.S_IFREG | 0o755, b"#!")
    expected["final_model/link"] = Seen(stat.S_IFLNK | 0o777, "deep/er")
    assert seen == expected
    assert size == sum(len(content) for content in TREE.values()) + 2
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755
    assert names(tmp_path) == ["out", "packed"]


async def test_tgz_is_another_name_of_tar_gz(tmp_path: Path):
    await unpack(pack(tmp_path, "tar.gz"), tmp_path / "out", "tgz")
    assert (tmp_path / "out/final_model/config.json").read_bytes() == TREE["final_model/config.json"]


@pytest.mark.parametrize("dialect", ["gnu", "oldgnu", "ustar", "v7", "pax"])
def test_what_the_tar_command_makes_is_read(tmp_path: Path, dialect: str):
    source = tmp_path / "model"
    (source / "sub").mkdir(parents=True)
    (source / "sub" / "weights").write_bytes(NOISE)
    (source / "hard").hardlink_to(source / "sub" / "weights")
    os.mkfifo(source / "skipped")
    command = ["tar", f"--format={dialect}", "--exclude=skipped", "-cf", tmp_path / "m.tar", "-C", source, "."]
    subprocess.run(command, check=True)
    unpack_here(tmp_path / "m.tar", tmp_path / "out")
    assert {path: seen.content for path, seen in snapshot(tmp_path / "out").items() if seen.content} == {
        "sub/weights": NOISE,
        "hard": NOISE,
    }


@pytest.mark.parametrize(
    "dialect", ["--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"]
)
def test_sparse_files_come_out_whole_and_count_whole(tmp_path: Path, dialect: str):
    with (tmp_path / "holes").open("wb") as file:
        for offset in range(1, 8):
            file.seek(offset * 1_000_000)
            file.write(NOISE[:5000])
        file.truncate(9_000_000)
    options = [dialect] if "format" in dialect else ["--format=pax", dialect]
    command = ["tar", *options, "-S", "-cf", tmp_path / "s.tar", "-C", tmp_path, "holes"]
    subprocess.run(command, check=True)
    assert (tmp_path / "s.tar").stat().st_size < 1_000_000, "the command has stored the holes"
    assert unpack_here(tmp_path / "s.tar", tmp_path / "out") == 9_000_000
    assert (tmp_path / "out/holes").read_bytes() == (tmp_path / "holes").read_bytes()
    with pytest.raises(UnsafeArchiveError, match="'holes': the archive unpacks to more than the 8999999 bytes"):
        unpack_here(tmp_path / "s.tar", tmp_path / "again", limits=UnpackLimits(total_bytes=8_999_999))


def test_names_that_are_no_utf8_are_kept(tmp_path: Path):
    with tarfile.open(tmp_path / "a.tar", "w", encoding="utf-8", errors="surrogateescape") as tar:
        tar.addfile(tarfile.TarInfo(os.fsdecode(b"\xff\xfe")))
    unpack_here(tmp_path / "a.tar", tmp_path / "out")
    assert os.listdir(os.fsencode(tmp_path / "out")) == [b"\xff\xfe"]  # noqa: PTH208 - bytes are the point


@pytest.mark.parametrize("content", FORMATS)
@pytest.mark.parametrize("asked", [*FORMATS, "tgz"])
async def test_an_explicit_format_must_fit(tmp_path: Path, asked: ArchiveFormat, content: ArchiveFormat):
    if asked == content or (asked == "tgz" and content == "tar.gz"):
        return  # that it works is tested above
    archive = pack(tmp_path, content, {"a": b"b"})
    with pytest.raises(ArchiveError, match=f"'{asked}' was expected, but the content looks like {content}"):
        await unpack(archive, tmp_path / "out", asked)
    assert names(tmp_path) == ["packed"]


@pytest.mark.parametrize(
    ("content", "looks"),
    [
        (b"", "an empty file"),
        (b"{}\n" * 400, "no archive"),
        ((8).to_bytes(8, "little") + b'{"a":{}}' + bytes(4096), "no archive"),  # safetensors
        (b"\x1f\x8b\x08\0\0\0\0\0{" + bytes(4096), "compressed data that holds no tar"),
        (b"BZh9" + bytes(4096), "compressed data that holds no tar"),
        (bytes(10240), "no archive"),
    ],
)
async def test_what_is_no_archive_is_said_to_be_none(tmp_path: Path, content: bytes, looks: str):
    (tmp_path / "file.tar.gz").write_bytes(content)
    assert not looks_like_archive(tmp_path / "file.tar.gz")
    with pytest.raises(ArchiveError, match=f"was expected, but the content looks like {looks}"):
        await unpack(tmp_path / "file.tar.gz", tmp_path / "out")
    assert names(tmp_path) == ["file.tar.gz"]


def test_a_torch_file_is_no_archive_although_it_is_a_zip(tmp_path: Path):
    for first, expected in (("pytorch_model/data.pkl", False), ("pytorch_model/config.json", True)):
        with zipfile.ZipFile(tmp_path / "file", "w") as zipped:
            zipped.writestr(first, b"")
            zipped.writestr("pytorch_model/data/0", b"")
        assert looks_like_archive(tmp_path / "file") is expected


async def test_none_is_not_unpacked(tmp_path: Path):
    with pytest.raises(ArchiveError, match="'none' means that the file is used as it is"):
        await unpack(pack(tmp_path, "tar"), tmp_path / "out", "none")


@pytest.mark.parametrize("archive_format", FORMATS)
def test_a_cut_off_archive_leaves_nothing(tmp_path: Path, archive_format: ArchiveFormat):
    whole = pack(tmp_path, archive_format).read_bytes()
    end = len(whole)
    if archive_format == "tar":
        end = len(whole.rstrip(b"\0")) // 512 * 512 + 512  # a cut in the zeros after the end is harmless
    cuts = {1, 3, 100, 511, 512, 513, 1024, 2048, end // 3, end // 2, end * 9 // 10, end - 600, end - 9, end - 1}
    for cut in sorted(cuts):
        (tmp_path / "packed").write_bytes(whole[:cut])
        with pytest.raises(ArchiveError):
            unpack_here(tmp_path / "packed", tmp_path / "out")
        assert names(tmp_path) == ["packed"], cut


def test_a_tar_cut_between_two_members_is_cut_off(tmp_path: Path):
    whole = pack(tmp_path, "tar", {"one": b"1" * 512, "two": b"2" * 512}).read_bytes()
    (tmp_path / "packed").write_bytes(whole[:1024])
    with pytest.raises(ArchiveError, match="cut off after member 'one': there is neither a header nor an end"):
        unpack_here(tmp_path / "packed", tmp_path / "out")


@pytest.mark.parametrize("archive_format", ["tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_a_changed_byte_is_noticed(tmp_path: Path, archive_format: ArchiveFormat):
    content = bytearray(pack(tmp_path, archive_format).read_bytes())
    content[len(content) // 2] ^= 1  # in the noise, which cannot be compressed
    (tmp_path / "packed").write_bytes(content)
    with pytest.raises(ArchiveError, match="broken or cut off"):
        unpack_here(tmp_path / "packed", tmp_path / "out")
    assert names(tmp_path) == ["packed"]


async def test_an_existing_target_is_left_alone(tmp_path: Path):
    archive = pack(tmp_path, "tar")
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError):
        await unpack(archive, tmp_path / "out")
    assert snapshot(tmp_path / "out") == {}
    (tmp_path / "dangling").symlink_to("nowhere")
    with pytest.raises(FileExistsError):
        await unpack(archive, tmp_path / "dangling")


async def test_errors_of_the_disk_stay_what_they_are(tmp_path: Path):
    archive = pack(tmp_path, "tar")
    with pytest.raises(FileNotFoundError, match="missing"):
        await unpack(archive, tmp_path / "missing" / "out")
    with pytest.raises(FileNotFoundError):
        await unpack(tmp_path / "no.tar", tmp_path / "out")


def test_a_full_disk_is_an_os_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    archive = pack(tmp_path, "tar.gz")
    write, written = os.write, 0

    def fills_up(descriptor: int, data: memoryview) -> int:
        nonlocal written
        written += len(data)
        if written > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data[:70_000])  # and writes less than it was given

    monkeypatch.setattr(archive_reader_folder.os, "write", fills_up)
    with pytest.raises(OSError, match="No space left") as caught:
        unpack_here(archive, tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["packed"]


async def test_the_time_limit_holds(tmp_path: Path):
    archive = many_files(tmp_path / "many.tar")
    before = children()
    with pytest.raises(UnsafeArchiveError, match=r"not unpacked after the 0\.3 s that are allowed"):
        await unpack(archive, tmp_path / "out", limits=UnpackLimits(seconds=0.3))
    assert names(tmp_path) == ["many.tar"]
    assert children() == before


async def test_cancelling_ends_the_process_and_removes_what_it_wrote(tmp_path: Path):
    archive = many_files(tmp_path / "many.tar")
    before = children()
    unpacking = asyncio.create_task(unpack(archive, tmp_path / "out"))
    async with asyncio.timeout(20):
        while not temporaries(tmp_path):
            await asyncio.sleep(0.005)
    assert len(children() - before) == 1
    unpacking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unpacking
    assert children() == before
    assert names(tmp_path) == ["many.tar"]


def test_a_killed_parent_takes_the_process_with_it(tmp_path: Path):
    archive = many_files(tmp_path / "many.tar")
    script = f"""
        import asyncio
        from pathlib import Path
        from orchestrator_client.archives.archive_reader import unpack
        asyncio.run(unpack(Path({str(archive)!r}), Path({str(tmp_path / "out")!r})))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=REPO)
    wait_until(lambda: temporaries(tmp_path), "the unpacking has begun")
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def gone() -> bool:
        try:
            return child.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(gone, "the unpacking process has ended with its parent", within_sec=5)
    assert not (tmp_path / "out").exists()
    assert len(temporaries(tmp_path)) == 1
    (tmp_path / ".out.unpack-notes").mkdir()  # looks alike, but is not ours
    asyncio.run(unpack(pack(tmp_path, "tar"), tmp_path / "out"))
    assert [path.name for path in temporaries(tmp_path)] == [".out.unpack-notes"]


def test_only_left_folders_of_the_same_target_are_removed(tmp_path: Path):
    left, other, used = (
        tmp_path / name for name in (".out.unpack-01234567", ".out2.unpack-01234567", ".out.unpack-76543210")
    )
    for folder in (left, other, used):
        (folder / "sub").mkdir(parents=True)
    lock = archive_unpacking._lock(used)
    assert lock is not None
    try:
        unpack_here(pack(tmp_path, "tar"), tmp_path / "out")
    finally:
        os.close(lock)
    assert sorted(temporaries(tmp_path)) == sorted([other, used])


@pytest.mark.parametrize(
    ("status", "output", "error", "text"),
    [
        (-9, b"", "unsafe", "SIGKILL, most likely for lack of memory"),
        (-11, b'{"kind": "unp', "unsafe", "SIGSEGV"),
        (1, b"Traceback\nImportError: no isal\n", "archive", "status 1 and no answer: ImportError: no isal"),
        (0, b"", "archive", "status 0 and no answer"),
        (0, b'noise\n{"kind": "unsafe", "text": "why"}\n', "unsafe", "why"),
    ],
)
def test_a_process_without_an_answer_is_an_error(status: int, output: bytes, error: str, text: str):
    answer = archive_reader._read(status, output)
    assert answer.kind == error
    assert text in answer.text


def test_the_root_is_the_only_folder_at_the_top(tmp_path: Path):
    assert content_root(tmp_path, None) == tmp_path
    model = tmp_path / "final_model"
    (model / "sub").mkdir(parents=True)
    assert content_root(tmp_path, None) == model
    assert content_root(tmp_path, " ") == model
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "._final_model").touch()
    assert content_root(tmp_path, None) == model
    (tmp_path / "config.json").touch()
    assert content_root(tmp_path, None) == tmp_path


def test_one_file_at_the_top_is_no_root(tmp_path: Path):
    (tmp_path / "model.safetensors").touch()
    assert content_root(tmp_path, None) == tmp_path
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "link").symlink_to(".")
    assert content_root(tmp_path, None) == tmp_path


def test_subdir_is_inside(tmp_path: Path):
    unpacked = tmp_path / "unpacked"
    (unpacked / "a" / "b").mkdir(parents=True)
    (unpacked / "a" / "file").touch()
    (unpacked / "in").symlink_to("a")
    (unpacked / "out").symlink_to("..")
    assert content_root(unpacked, "a/b") == unpacked / "a" / "b"
    assert content_root(unpacked, "a/b/") == unpacked / "a" / "b"
    assert content_root(unpacked, "in/b") == unpacked / "a" / "b"
    for subdir in ("missing", "..", "a/../..", "/", str(tmp_path), "out", "a/file", "a\0b"):
        with pytest.raises(
            ArchiveError, match=r"is no folder inside the archive; at the top it holds 'a', 'in', 'out'"
        ):
            content_root(unpacked, subdir)
