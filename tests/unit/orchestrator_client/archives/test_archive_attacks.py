"""Hostile archives: each is refused by name and reason, and nothing changes around the folder."""

from __future__ import annotations

import asyncio
import gzip
import io
import lzma
import os
import shutil
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator_client.archives import archive_reader_folder
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
    work = base / "work"
    work.mkdir()
    for folder in (base, work):
        (folder / "secret").write_text(SECRET)
        (folder / "a").mkdir()
    (work / "archive").write_bytes(archive)
    return work


ESCAPES = {
    "dots": ([Member("../secret")], "'../secret': the path holds '..'"),
    "dots inside": ([Member("a/../../secret")], "'a/../../secret': the path holds '..'"),
    "dots that come back": ([Member("a/../b")], "'a/../b': the path holds '..'"),
    "folder dots": ([Member("../a/", FOLDER)], "'../a/?': the path holds '..'"),
    "absolute": ([Member("/srv/flowmesh-x")], "'/srv/flowmesh-x': the path is absolute"),
    "two slashes": ([Member("//srv/flowmesh-x")], "the path is absolute"),
    "backslash": ([Member("..\\secret")], r"secret': the name holds a backslash"),
    "drive": ([Member("C:secret")], "'C:secret': the path begins with a drive letter"),
    "drive inside": ([Member("./c:/secret")], "the path begins with a drive letter"),
    "long part": ([Member("x" * 256)], "the name is longer than 2000 bytes in all or 255 between slashes"),
    "long name": ([Member("/".join(["y" * 250] * 9))], "the name is longer than 2000 bytes"),
    "deep": ([Member("/".join("d" * 101))], "it lies more than 100 folders deep"),
    "the root": ([Member("./.", content=b"x")], r"'\./\.': it is a file with the name of a folder"),
    "file as parent": (
        [Member("a"), Member("a/b")],
        "'a/b': it needs a folder where an earlier member has made a file",
    ),
    "file over folder": ([Member("a/b"), Member("a")], "'a': it is a file, but an earlier member has made a folder"),
    "file twice": ([Member("a"), Member("./a", content=b"2")], r"'\./a': it is a file, but an earlier .* made a file"),
    "link up": ([Member("l", LINK, to="../secret")], r"'l': it is a symbolic link to '\.\./secret', outside"),
    "link absolute": (
        [Member("l", LINK, to="/etc/passwd")],
        "'l': it is a symbolic link to '/etc/passwd', which is no",
    ),
    "link backslash": ([Member("l", LINK, to="..\\x")], "which is no relative path"),
    "link to nothing": ([Member("l", LINK, to="")], "which is no relative path"),
    "link to itself": ([Member("l", LINK, to="l")], "'l': .* which leads nowhere"),
    "links in a ring": ([Member("l", LINK, to="m/x"), Member("m", LINK, to="l/y")], "which leads nowhere"),
    "long link": ([Member("l", LINK, to="x/" * 1500)], "'l': it is a symbolic link to something with too long a name"),
    "by its own folder": ([Member("l", LINK, to="../work/secret")], "'l': .* outside the archive"),
    "a link as parent": ([Member("l", LINK, to="a"), Member("l/f")], "'l/f': it needs a folder where .* symbolic link"),
    "the classic": ([Member("l", LINK, to=".."), Member("l/secret", content=b"!")], "'l/secret': it needs a folder"),
    "folder over link": ([Member("l", LINK, to="a"), Member("l/", FOLDER)], "it needs a folder where .* symbolic link"),
    "file over link": (
        [Member("l", LINK, to="a"), Member("l", content=b"!")],
        "'l': it is a file, but .* symbolic link",
    ),
    "link over folder": (
        [Member("d/f"), Member("d", LINK, to="a")],
        "'d': it is a symbolic link, but .* made a folder",
    ),
    # Read as text, y leads to p and then to the root; the kernel goes from the root up.
    "links that add up": ([Member("p/q", LINK, to=".."), Member("y", LINK, to="p/q/..")], "'y': .*outside the archive"),
    "links over three": (
        [Member("a/b/c", LINK, to="../.."), Member("d", LINK, to="a/b/c/a/b/c"), Member("e", LINK, to="d/..")],
        "'e': .*outside the archive",
    ),
    "a fifo": ([Member("pipe", tarfile.FIFOTYPE)], "'pipe': it is a device.* or a named pipe"),
    "a device": ([Member("null", tarfile.CHRTYPE)], "'null': it is a device"),
}
TAR_ESCAPES = {
    "no name": ([Member("")], "member '': it has no name"),
    "hard link up": (
        [Member("h", HARD, to="../secret")],
        r"'h': it is a hard link to '\.\./secret': the path holds '..'",
    ),
    "hard link absolute": ([Member("h", HARD, to="/etc/passwd")], "'h': .*'/etc/passwd': the path is absolute"),
    "hard link to a later file": ([Member("h", HARD, to="a"), Member("a")], "'h': .* which is no earlier file"),
    "hard link to a link": ([Member("l", LINK, to="x"), Member("h", HARD, to="l")], "'h': .* which is no earlier file"),
    "hard link to a folder": ([Member("d/", FOLDER), Member("h", HARD, to="d")], "'h': .* which is no earlier file"),
    "hard link over a link": (
        [Member("f"), Member("l", LINK, to="f"), Member("l", HARD, to="f")],
        "'l': it is a file, but an earlier member has made a symbolic link",
    ),
    "block device": ([Member("sda", tarfile.BLKTYPE)], "'sda': it is a device"),
    "unknown type": ([Member("odd", b"Z")], "'odd': it is of the unknown type b'Z'"),
    "file like a folder": ([Member("a/", b"0")], "'a/': it is a file with the name of a folder"),
}


CASES = [
    pytest.param(pack(*members), text, id=f"{kind} {title}")
    for title, (members, text) in ESCAPES.items()
    for kind, pack in (("tar", tar_of), ("pax", pax_of), ("zip", zip_of))
] + [pytest.param(tar_of(*members), text, id=f"tar {title}") for title, (members, text) in TAR_ESCAPES.items()]


def refused(base: Path, archive: bytes, text: str, limits: UnpackLimits | None = None) -> None:
    """Unpack in this process, and see that only the error comes of it."""
    work = place(base, archive)
    before = around(base)
    with pytest.raises(UnsafeArchiveError, match=text):
        unpack_here(work / "archive", work / "out", limits=limits)
    assert around(base) == before


def refused_by_the_child(base: Path, archive: bytes, text: str) -> None:
    work = place(base, archive)
    before = around(base)
    with pytest.raises(UnsafeArchiveError, match=text):
        asyncio.run(unpack(work / "archive", work / "out"))
    assert around(base) == before


def broken(base: Path, archive: bytes, text: str) -> None:
    work = place(base, archive)
    before = around(base)
    with pytest.raises(ArchiveError, match=text):
        unpack_here(work / "archive", work / "out", limits=UnpackLimits(total_bytes=10**6))
    assert around(base) == before


@pytest.mark.parametrize(("archive", "text"), CASES)
def test_an_archive_that_wants_out_is_refused(tmp_path: Path, archive: bytes, text: str):
    refused(tmp_path, archive, text)


@pytest.mark.parametrize("name", ["dots", "the classic", "links that add up", "a device"])
def test_the_process_refuses_it_too(tmp_path: Path, name: str):
    members, text = ESCAPES[name]
    refused_by_the_child(tmp_path, tar_of(*members), text)


def test_links_that_stay_inside_are_kept(tmp_path: Path):
    work = place(
        tmp_path,
        tar_of(
            Member("blobs/1", content=b"one"),
            Member("snap/model", LINK, to="../blobs/1"),
            Member("snap/again", LINK, to="./model"),
            Member("snap/later", LINK, to="../x/../blobs/2"),
            Member("snap/dangling", LINK, to="nothing"),
            Member("blobs/2", content=b"two"),
            Member("hard", HARD, to="./blobs/1"),
            Member("top", LINK, to="."),
        ),
    )
    assert unpack_here(work / "archive", work / "out") == 6
    out = work / "out"
    assert (
        (out / "snap/model").read_bytes() == (out / "snap/again").read_bytes() == (out / "hard").read_bytes() == b"one"
    )
    assert (out / "snap/later").readlink() == Path("../x/../blobs/2")
    assert (out / "snap/dangling").is_symlink()
    assert (out / "top").resolve() == out


def test_a_long_name_is_shown_in_part(tmp_path: Path):
    work = place(tmp_path, tar_of(Member("../" + "x" * 1500)))
    with pytest.raises(UnsafeArchiveError) as caught:
        unpack_here(work / "archive", work / "out")
    assert "'../xxx" in str(caught.value)
    assert len(str(caught.value)) < 300


def test_a_nul_in_a_name_is_refused(tmp_path: Path):
    (tmp_path / "tar").mkdir()
    (tmp_path / "zip").mkdir()
    text = r"'a\\x00\.\./b': the name holds a NUL"
    refused(tmp_path / "tar", pax_with({"path": "a\0../b"}) + tar_of(Member("x")), text)
    refused(tmp_path / "zip", zip_of(Member("a\0../b")), text)


def test_a_nul_in_a_link_is_refused(tmp_path: Path):
    refused(tmp_path, pax_with({"linkpath": "a\0b"}) + tar_of(Member("l", LINK, to="x")), "'l': .* no relative path")


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


@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_the_size_limit_counts_all_files(tmp_path: Path, make: Callable[..., bytes]):
    archive = make(Member("a", content=b"1" * 600), Member("b", content=b"2" * 401))
    refused(tmp_path, archive, "'b': the archive unpacks to more than the 1000 bytes", UnpackLimits(total_bytes=1000))
    assert unpack_here(tmp_path / "work/archive", tmp_path / "out", limits=UnpackLimits(total_bytes=1001)) == 1001


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


PARTS = st.sampled_from(["a", "b", "c", "..", ".", "", "A", "secret", "work", "out"])
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
    work = place(base, archive)
    out = work / "out"
    before = around(base)
    try:
        size = run(work / "archive", out)
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
