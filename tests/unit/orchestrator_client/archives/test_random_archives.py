"""Random and damaged archives: all stays inside the folder, or an error of ours and no trace."""

from __future__ import annotations

import asyncio
import gzip
import lzma
import shutil
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hostile_archives import FOLDER, HARD, LINK, Member, around, pax_of, place, tar_of, zip_of
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_client.archives.archive_reader import unpack
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import ArchiveError

PARTS = st.sampled_from(["a", "b", "c", "..", ".", "", "A", "secret", "inside", "out"])
NAMES = st.lists(PARTS, min_size=1, max_size=4).map("/".join)
KINDS = st.sampled_from([tarfile.REGTYPE, tarfile.REGTYPE, FOLDER, LINK, LINK, HARD, tarfile.FIFOTYPE, b"Z"])
MEMBERS = st.builds(
    Member, name=NAMES, kind=KINDS, content=st.binary(max_size=3), to=NAMES, mode=st.integers(0, 0o7777)
)
TAME_PARTS = st.sampled_from(["a", "b", "c", "d"])
TAME = st.builds(
    Member,
    name=st.lists(TAME_PARTS, min_size=1, max_size=3).map("/".join),
    kind=st.sampled_from([tarfile.REGTYPE, FOLDER, LINK]),
    to=st.lists(TAME_PARTS | st.just(".."), min_size=1, max_size=4).map("/".join),
)


def holds(base: Path, archive: bytes, run: Callable[[Path, Path], int]) -> None:
    """Unpacking succeeds with everything inside, or fails with an error of ours and no trace."""
    inside = place(base, archive)
    out = inside / "out"
    before = around(base)
    try:
        size = run(inside / "archive", out)
    except ArchiveError:
        assert around(base) == before
        return
    files = 0
    for path in out.rglob("*"):
        assert path.resolve().is_relative_to(out)
        mode = path.lstat().st_mode
        assert stat.S_ISLNK(mode) or stat.S_IMODE(mode) in {0o644, 0o755}
        assert stat.S_IFMT(mode) in {stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK}
        files += stat.S_ISREG(mode)
    after = around(base)
    assert {path: seen for path, seen in after.items() if not Path(path).is_relative_to(out)} == before
    assert size <= 3 * files


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random").resolve()


def in_a_new_folder(scratch: Path, archive: bytes, run: Callable[[Path, Path], int] = unpack_here) -> None:
    base = scratch / "base"
    base.mkdir()
    try:
        holds(base, archive, run)
    finally:
        shutil.rmtree(base)


@settings(max_examples=200, deadline=None)
@given(members=st.lists(MEMBERS, max_size=6) | st.lists(TAME, max_size=6), packed=st.sampled_from([tar_of, zip_of]))
def test_random_archives_stay_inside(scratch: Path, members: list[Member], packed: Callable[..., bytes]):
    in_a_new_folder(scratch, packed(*members))


@settings(max_examples=8, deadline=None)
@given(members=st.lists(MEMBERS, min_size=1, max_size=6) | st.lists(TAME, min_size=1, max_size=6))
def test_random_archives_stay_inside_through_the_process(scratch: Path, members: list[Member]):
    in_a_new_folder(scratch, tar_of(*members), lambda archive, out: asyncio.run(unpack(archive, out)))


HONEST = [Member("a/", FOLDER), Member("a/b", content=b"xyz"), Member("l", LINK, to="a/b"), Member("n" * 120)]
PACKED = {
    "tar": tar_of(*HONEST),
    "pax": pax_of(*HONEST),
    "tar.gz": gzip.compress(tar_of(*HONEST)),
    "tar.xz": lzma.compress(tar_of(*HONEST)),
    "zip": zip_of(*HONEST),
}


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(sorted(PACKED)), changes=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4)
)
def test_damaged_archives_raise_our_errors_only(scratch: Path, kind: str, changes: list[tuple[int, int]]):
    archive = bytearray(PACKED[kind])
    for position, value in changes:
        archive[position % len(archive)] = value
    in_a_new_folder(scratch, bytes(archive))
