"""Names and links that lead out of the folder: refused by name and reason, and nothing changes around it."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from hostile_archives import (
    FOLDER,
    HARD,
    LINK,
    Member,
    pax_of,
    pax_with,
    place,
    refused,
    refused_by_the_child,
    tar_of,
    zip_of,
)

from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import UnsafeArchiveError

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
    "by its own folder": ([Member("l", LINK, to="../inside/secret")], "'l': .* outside the archive"),
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


@pytest.mark.parametrize(("archive", "text"), CASES)
def test_an_archive_that_wants_out_is_refused(tmp_path: Path, archive: bytes, text: str):
    refused(tmp_path, archive, text)


@pytest.mark.parametrize("name", ["dots", "the classic", "links that add up", "a device"])
def test_the_process_refuses_it_too(tmp_path: Path, name: str):
    members, text = ESCAPES[name]
    refused_by_the_child(tmp_path, tar_of(*members), text)


def test_links_that_stay_inside_are_kept(tmp_path: Path):
    inside = place(
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
    assert unpack_here(inside / "archive", inside / "out") == 6
    out = inside / "out"
    assert (
        (out / "snap/model").read_bytes() == (out / "snap/again").read_bytes() == (out / "hard").read_bytes() == b"one"
    )
    assert (out / "snap/later").readlink() == Path("../x/../blobs/2")
    assert (out / "snap/dangling").is_symlink()
    assert (out / "top").resolve() == out


def test_a_long_name_is_shown_in_part(tmp_path: Path):
    inside = place(tmp_path, tar_of(Member("../" + "x" * 1500)))
    with pytest.raises(UnsafeArchiveError) as caught:
        unpack_here(inside / "archive", inside / "out")
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
