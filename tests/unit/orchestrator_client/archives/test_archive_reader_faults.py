"""Broken archives and failing disks: an error that says so, and nothing is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from packed_trees import FORMATS, names, pack, snapshot

from orchestrator_client.archives import archive_reader_folder
from orchestrator_client.archives.archive_reader import ArchiveFormat, unpack
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import ArchiveError


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
