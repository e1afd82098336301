"""Honest archives come out as they went in, and a file is known for what it is."""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
import zipfile
from pathlib import Path

import pytest
from packed_trees import FORMATS, NOISE, TREE, Seen, names, pack, snapshot

from orchestrator_client.archives.archive_reader import ArchiveFormat, UnpackLimits, looks_like_archive, unpack
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import ArchiveError, UnsafeArchiveError


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
