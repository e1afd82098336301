"""Tars whose headers and sizes lie: refused or broken, and nothing changes around the folder."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hostile_archives import Member, broken, header, pax_with, refused, tar_of

from orchestrator_client.archives.archive_reader import UnpackLimits


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_header_that_claims_gigabytes_is_not_read(tmp_path: Path, kind: bytes):
    archive = tar_of(Member("first"))[:512] + header("huge", kind, 7 * 1024**3) + bytes(4096)
    refused(tmp_path, archive, "refused after member 'first': a header there has 7516192768 bytes")


def test_headers_in_headers_end(tmp_path: Path):
    one = header("././@LongLink", tarfile.GNUTYPE_LONGNAME, 2) + b"x".ljust(512, b"\0")
    refused(
        tmp_path, tar_of(Member("first"))[:512] + one * 3000 + tar_of(Member("x")), "after member 'first': .* nested"
    )


@pytest.mark.parametrize("claim", [-512, -(2**40)])
def test_a_negative_size_is_broken(tmp_path: Path, claim: int):
    archive = tar_of(Member("first"))[:512] + header("back", tarfile.REGTYPE, claim) + bytes(1024)
    broken(tmp_path, archive, "the archive is broken: member 'back' has a size of -")


def test_a_negative_size_of_something_without_content_is_broken(tmp_path: Path):
    archive = pax_with({"size": "-4096"}) + header("back", b"Z", 0) + bytes(1024)
    broken(tmp_path, archive, "refused at member 'back': it is of the unknown type")


def test_a_size_that_is_not_there_is_cut_off(tmp_path: Path):
    broken(tmp_path, header("big", tarfile.REGTYPE, 2**40) + bytes(1024), "cut off in member 'big': 10995116\\d+ bytes")


@pytest.mark.parametrize("pieces", ["0,9,4,9", "5,-3", "90,20", "-5,5", "9,1,0,1", "x,y", "0,99999999999"])
def test_a_wrong_map_of_a_sparse_file_is_broken(tmp_path: Path, pieces: str):
    sized = pax_with({"GNU.sparse.map": pieces, "GNU.sparse.size": "100", "GNU.sparse.realsize": "100"})
    broken(tmp_path, sized + header("holes", tarfile.REGTYPE, 100) + bytes(2048), "is broken")


def test_a_map_of_more_than_the_member_holds_is_broken(tmp_path: Path):
    records = pax_with({"GNU.sparse.map": "0,5000", "GNU.sparse.size": "5000"})
    archive = records + header("greedy", tarfile.REGTYPE, 10) + bytes(512) + tar_of(Member("x" * 5000))
    broken(tmp_path, archive, "broken after member 'greedy': a header there points backwards")


def test_a_sparse_file_of_a_petabyte_is_refused(tmp_path: Path):
    records = pax_with({"GNU.sparse.map": "0,0", "GNU.sparse.size": str(2**50)})
    archive = records + header("holes", tarfile.REGTYPE, 0) + bytes(1024)
    refused(tmp_path, archive, "'holes': the archive unpacks to more than the 5000000 bytes", UnpackLimits(5_000_000))
