"""Zips whose records lie: refused or broken, and nothing changes around the folder."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from hostile_archives import FOLDER, LINK, Member, broken, refused, zip_of


@pytest.mark.parametrize("change", [-1000, 1000])
def test_a_zip_that_lies_about_a_size_is_broken(tmp_path: Path, change: int):
    archive = zip_of(Member("liar", content=bytes(5000)))
    claimed = struct.pack("<I", 5000 + change)
    assert archive.count(struct.pack("<I", 5000)) == 2
    broken(
        tmp_path, archive.replace(struct.pack("<I", 5000), claimed), "is broken or cut off in member 'liar'|is broken"
    )


def test_members_of_a_zip_that_share_bytes_are_refused(tmp_path: Path):
    one = zip_of(Member("kernel", content=os.urandom(1000)))
    end = one.rindex(b"PK\x05\x06")
    start = one.index(b"PK\x01\x02")
    record = one[start:end]
    records = record + record.replace(b"kernel", b"quoted")
    tail = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 2, 2, len(records), start, 0)
    refused(tmp_path, one[:start] + records + tail, "member '(kernel|quoted)': it overlaps another member")


def test_a_member_of_a_zip_that_reaches_into_the_list_is_refused(tmp_path: Path):
    archive = bytearray(zip_of(Member("reach", content=os.urandom(1000))))
    record = archive.index(b"PK\x01\x02")
    archive[record + 20 : record + 24] = struct.pack("<I", 1100)  # the packed size
    refused(tmp_path, bytes(archive), "'reach': it overlaps another member")


def test_what_a_zip_may_not_be(tmp_path: Path):
    for number, (offset, value, text) in enumerate(
        [
            (8, 1, "'x' of the archive is encrypted; pack it without"),
            (10, 12, "is compressed with method 12; only stored"),
        ]
    ):
        archive = bytearray(zip_of(Member("x", content=b"x")))
        archive[archive.index(b"PK\x01\x02") + offset] = value
        (tmp_path / str(number)).mkdir()
        broken(tmp_path / str(number), bytes(archive), text)


def test_a_folder_of_a_zip_has_no_content(tmp_path: Path):
    refused(tmp_path, zip_of(Member("d/", FOLDER, content=b"x")), "'d/': it has the name of a folder, but is none")


def test_a_long_link_of_a_zip_is_not_read_whole(tmp_path: Path):
    refused(tmp_path, zip_of(Member("l", LINK, to="x" * 10**6)), "'l': it is a symbolic link of more than 4096 bytes")
