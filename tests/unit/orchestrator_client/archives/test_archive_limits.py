"""Archives that want too much of the disk, the memory or the number of files: refused in time."""

from __future__ import annotations

import errno
import gzip
import lzma
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_archives import FOLDER, LINK, Member, header, refused, refused_by_the_child, tar_of, zip_of

from orchestrator_client.archives import archive_reader_folder
from orchestrator_client.archives.archive_reader import UnpackLimits
from orchestrator_client.archives.archive_unpacking import unpack_here


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_the_size_limit_counts_all_files(tmp_path: Path, make: Callable[..., bytes]):
    archive = make(Member("a", content=b"1" * 600), Member("b", content=b"2" * 401))
    refused(tmp_path, archive, "'b': the archive unpacks to more than the 1000 bytes", UnpackLimits(total_bytes=1000))
    assert unpack_here(tmp_path / "inside/archive", tmp_path / "out", limits=UnpackLimits(total_bytes=1001)) == 1001


@pytest.mark.parametrize("make", [tar_of, zip_of])
@pytest.mark.parametrize("what", ["files", "folders", "folders in names", "one folder", "the root", "links"])
def test_the_count_limit_counts_everything(tmp_path: Path, make: Callable[..., bytes], what: str):
    members = {
        "files": [Member(f"f{number}") for number in range(51)],
        "folders": [Member(f"f{number}/", FOLDER) for number in range(51)],
        "folders in names": [Member(f"f{number}/x") for number in range(26)],
        "one folder": [Member("d/", FOLDER)] * 51,
        "the root": [Member("./", FOLDER)] * 51,
        "links": [Member(f"l{number}", LINK, to="x") for number in range(51)],
    }[what]
    refused(tmp_path, make(*members), "the archive holds more than 50 members", UnpackLimits(files=50))
    (tmp_path / "honest").write_bytes(make(*members[:25]))
    unpack_here(tmp_path / "honest", tmp_path / "out", limits=UnpackLimits(files=50))


def test_links_that_take_long_to_follow_are_refused(tmp_path: Path):
    detour = "a/../" * 380
    members = [Member(f"l{at}", LINK, to=detour + (f"l{at + 1}" if at % 39 < 38 else "x")) for at in range(2000)]
    refused(tmp_path, tar_of(*members), "its symbolic links have more than 1000000 parts to follow")


def test_many_honest_links_are_kept(tmp_path: Path):
    members = [Member(f"models/x/snapshots/0/f{at}", LINK, to=f"../../blobs/f{at}") for at in range(5000)]
    (tmp_path / "a").write_bytes(tar_of(*members))
    assert unpack_here(tmp_path / "a", tmp_path / "out") == 0
    assert len(list((tmp_path / "out/models/x/snapshots/0").iterdir())) == 5000


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_no_more_room_is_taken_than_there_is(tmp_path: Path, make: Callable[..., bytes]):
    archive = tmp_path / "a"
    archive.write_bytes(make(*(Member(f"f{at}", content=b"x" * 100) for at in range(10))))
    needed = 10 * (4096 + 100)
    with pytest.raises(OSError, match=f"more than the {needed - 1} bytes that are free") as caught:
        unpack_here(archive, tmp_path / "out", limits=UnpackLimits(room_bytes=needed - 1))
    assert caught.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert unpack_here(archive, tmp_path / "out", limits=UnpackLimits(room_bytes=needed)) == 1000


def test_a_bomb_is_stopped_at_the_ratio(tmp_path: Path):
    packed = gzip.compress(header("zeros", tarfile.REGTYPE, 2**30) + bytes(300 * 1024**2), compresslevel=1)
    refused_by_the_child(tmp_path, packed, r"'zeros': the archive of \d+ bytes unpacks to more than 200 times its size")


def test_zeros_after_the_end_count_too(tmp_path: Path):
    packed = gzip.compress(tar_of(Member("first")) + bytes(300 * 1024**2), compresslevel=1)
    refused_by_the_child(tmp_path, packed, "'first': the archive of .* 200 times its size")


def test_a_zip_bomb_is_stopped_at_the_ratio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive_reader_folder, "RATIO_FREE_BYTES", 10**6)
    refused(tmp_path, zip_of(Member("zeros", content=bytes(3 * 10**6))), "'zeros': the archive .* 200 times its size")


def test_a_small_archive_of_zeros_is_no_bomb(tmp_path: Path):
    (tmp_path / "a").write_bytes(zip_of(Member("zeros", content=bytes(3 * 10**6))))
    assert unpack_here(tmp_path / "a", tmp_path / "out") == 3 * 10**6


def test_an_archive_that_wants_all_memory_is_refused(tmp_path: Path):
    """An xz stream says how large its dictionary is: here 4 GiB."""
    packed = bytearray(lzma.compress(tar_of(Member("a", content=b"x" * 5000))))
    length = (packed[12] + 1) * 4  # of the block header, right after the stream header
    filters = packed.index(b"\x21\x01", 12)
    packed[filters + 2] = 40
    packed[12 + length - 4 : 12 + length] = struct.pack("<I", zlib.crc32(packed[12 : 12 + length - 4]))
    refused_by_the_child(tmp_path, bytes(packed), "archive refused: it needs more than 1073741824 bytes of memory")
