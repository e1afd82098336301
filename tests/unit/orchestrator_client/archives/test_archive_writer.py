"""Archives of model folders: what is in them, that equal folders give equal archives, and how they are compressed."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import os
import random
import shutil
import struct
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from orchestrator_client.archives.archive_choice import SAMPLED_FROM_BYTES
from orchestrator_client.archives.archive_writer import ArchiveFacts, ArchiveTools, write_archive
from orchestrator_client.errors import ArchiveError

MIB = 1024**2
TAR, PIGZ = shutil.which("tar") or "no tar", shutil.which("pigz") or "no pigz"
COMBINATIONS = {
    "tar and pigz": ArchiveTools(level=6, pigz_threads=2),
    "tar and isal": ArchiveTools(level=6, pigz_threads=2, pigz_bin="no-such-pigz"),
    "Python and pigz": ArchiveTools(level=6, pigz_threads=2, tar_bin="no-such-tar"),
    "Python and isal": ArchiveTools(level=6, pigz_threads=2, tar_bin="no-such-tar", use_pigz=False),
    "tar, stored": ArchiveTools(level=0, use_pigz=False),
}
all_combinations = pytest.mark.parametrize("tools", COMBINATIONS.values(), ids=COMBINATIONS)

NAMES = [
    b"config.json",
    b".hidden",
    b"-rf",
    b"--checkpoint-action=exec=true",
    b"two\nlines",
    b"back\\nslash",
    b"caf\xe9",
    "größe".encode(),
    b" spaces ",
    b"*?[a]",
    b"@at",
    b"n" * 255,
    b"a" * 87,  # with `final_model/` in front: 99 bytes, and so on around the 100 of a tar header
    b"b" * 88,
    b"c" * 89,
    b"folder/" + b"d" * 200 + b"/" + b"e" * 200 + b"/file",
    b"f" * 87 + b"/file",
    b"g" * 88 + b"/file",
]


def ignore_progress(_done: int, _total: int) -> None:
    pass


def archive(folder: Path, tools: ArchiveTools) -> ArchiveFacts:
    return asyncio.run(write_archive(folder, tools, ignore_progress))


def seeded(number: int) -> random.Random:
    return random.Random(number)  # noqa: S311 - the same data each time


def make_model(folder: Path) -> Path:
    """A folder with awkward names; contents are seeded."""
    chance = seeded(7)
    for name in NAMES:
        path = Path(os.fsdecode(os.fsencode(folder) + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name + chance.randbytes(chance.randrange(3000)))
    (folder / "weights.bin").write_bytes(chance.randbytes(MIB) + bytes(2 * MIB) + b"x")
    (folder / "none").write_bytes(b"")
    (folder / "block").write_bytes(b"b" * 512)
    (folder / "empty").mkdir()
    return folder


def tree(folder: Path) -> dict[bytes, bytes | None]:
    """Everything below a folder: bytes of files, None for folders."""
    return {
        os.fsencode(path.relative_to(folder)): None if path.is_dir() else path.read_bytes()
        for path in folder.rglob("*")
    }


def unpack(path: Path, place: Path) -> Path:
    place.mkdir()
    result = subprocess.run([TAR, "-xzf", path, "-C", place], capture_output=True, check=True)
    assert result.stderr == b""
    (top,) = place.iterdir()
    return top


@contextmanager
def masked(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@all_combinations
def test_everything_in_the_folder_comes_back_out(tmp_path: Path, tools: ArchiveTools):
    folder = make_model(tmp_path / "final_model")

    facts = archive(folder, tools)

    assert facts.path == tmp_path / "final_model.tar.gz"
    content = facts.path.read_bytes()
    assert (facts.size_bytes, facts.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["final_model", "final_model.tar.gz"]
    top = unpack(facts.path, tmp_path / "out")
    assert top.name == "final_model"
    assert tree(top) == tree(folder)


@all_combinations
def test_members_are_sorted_and_carry_neither_times_nor_owners(tmp_path: Path, tools: ArchiveTools):
    folder = make_model(tmp_path / "final_model")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o4711)
    (folder / "config.json").chmod(0o600)
    (folder / "empty").chmod(0o3700)

    facts = archive(folder, tools)

    head = facts.path.read_bytes()[:10]
    assert head[3:8] == bytes(5)  # the gzip header: no name, no time
    with tarfile.open(facts.path) as packed:
        members = packed.getmembers()
    names = [os.fsencode(member.name) for member in members]
    assert names == sorted(names)
    assert names[0] == b"final_model"
    assert {member.mtime for member in members} == {0}
    assert {(member.uid, member.gid, member.uname, member.gname) for member in members} == {(0, 0, "", "")}
    modes = {member.name.removeprefix("final_model/"): oct(member.mode) for member in members}
    assert (modes["run.sh"], modes["config.json"], modes["empty"]) == ("0o755", "0o644", "0o755")


@all_combinations
def test_equal_content_gives_equal_archives(tmp_path: Path, tools: ArchiveTools):
    first = make_model(tmp_path / "one" / "final_model")
    with masked(0o077):
        second = tmp_path / "two" / "final_model"
        second.mkdir(parents=True)
        for name, content in sorted(tree(first).items(), reverse=True):
            path = Path(os.fsdecode(os.fsencode(second) + b"/" + name))
            if content is None:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                os.utime(path, (5, 5))
    second.chmod(0o2770)

    assert (archive(first, tools)).sha256 == (archive(second, tools)).sha256
    os.utime(first / "config.json")
    assert (archive(first, tools)).sha256 == (archive(second, tools)).sha256


@all_combinations
def test_links_inside_stand_for_their_files(tmp_path: Path, tools: ArchiveTools):
    plain, linked = tmp_path / "plain" / "m", tmp_path / "linked" / "m"
    for folder in (plain, linked):
        (folder / "sub").mkdir(parents=True)
        (folder / "a.bin").write_bytes(b"weights" * 1000)
    for name in ("b.bin", "sub/c.bin", "sub/d.bin"):
        (plain / name).write_bytes(b"weights" * 1000)
    (linked / "b.bin").hardlink_to(linked / "a.bin")
    (linked / "sub" / "c.bin").symlink_to("../a.bin")
    (linked / "sub" / "d.bin").symlink_to(linked / "sub" / "c.bin")

    assert (archive(plain, tools)).sha256 == (archive(linked, tools)).sha256


def link_out(folder: Path) -> None:
    (folder.parent / "secret").write_text("x")
    (folder / "odd").symlink_to("../secret")


def link_to_sibling(folder: Path) -> None:
    (folder.parent / f"{folder.name}-2").mkdir()
    (folder.parent / f"{folder.name}-2" / "file").write_text("x")
    (folder / "odd").symlink_to(f"../{folder.name}-2/file")


ODDITIES: dict[str, Callable[[Path], None]] = {
    "out": link_out,
    "out of": link_to_sibling,
    "nowhere": lambda folder: (folder / "odd").symlink_to("missing"),
    " nowhere": lambda folder: (folder / "odd").symlink_to("odd"),
    "to a folder": lambda folder: (folder / "odd").symlink_to("."),
    "neither a file nor a folder": lambda folder: os.mkfifo(folder / "odd"),
}


@pytest.mark.parametrize(("reason", "spoil"), ODDITIES.items(), ids=ODDITIES)
def test_what_does_not_belong_into_an_archive_is_named(tmp_path: Path, reason: str, spoil: Callable[[Path], None]):
    folder = tmp_path / "m"
    folder.mkdir()
    spoil(folder)
    before = set(tmp_path.iterdir())

    with pytest.raises(ArchiveError, match=reason) as caught:
        archive(folder, ArchiveTools())

    assert str(folder / "odd") in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["missing", "file", "link", ".."])
def test_only_a_real_folder_is_archived(tmp_path: Path, name: str):
    (tmp_path / "file").write_text("x")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")

    with pytest.raises(ArchiveError, match="no folder"):
        archive(tmp_path / name, ArchiveTools())


def test_an_empty_folder_and_an_archive_that_is_there_already(tmp_path: Path):
    folder = tmp_path / "m"
    folder.mkdir()
    (tmp_path / "m.tar.gz").write_text("old")
    heard: list[tuple[int, int]] = []

    facts = asyncio.run(write_archive(folder, ArchiveTools(), lambda done, total: heard.append((done, total))))

    assert tree(unpack(facts.path, tmp_path / "out")) == {}
    assert heard[-1] == (0, 0)


@all_combinations
def test_progress_grows_to_the_size_of_the_content(tmp_path: Path, tools: ArchiveTools):
    folder = tmp_path / "m"
    folder.mkdir()
    size = 120 * MIB
    with (folder / "zeros").open("wb") as file:
        file.truncate(size)
    heard: list[tuple[int, int]] = []

    asyncio.run(write_archive(folder, tools, lambda done, total: heard.append((done, total))))

    assert {total for _, total in heard} == {size}
    assert [done for done, _ in heard] == sorted(done for done, _ in heard)
    assert heard[-1] == (size, size)


@pytest.mark.parametrize("said", ["bsdtar 3.7.2", "tar (busybox) 1.36"])
def test_a_tar_that_is_not_gnu_is_only_asked_for_its_version(tmp_path: Path, said: str):
    folder, other = make_model(tmp_path / "m"), tmp_path / "othertar"
    other.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\necho "{said}"\n')
    other.chmod(0o755)

    facts = archive(folder, ArchiveTools(tar_bin=str(other)))

    assert (tmp_path / "calls").read_text() == "--version\n"
    assert tree(unpack(facts.path, tmp_path / "out")) == tree(folder)


@pytest.mark.parametrize("content", ["no program at all", "#!/bin/sh\nexit 1\n", "#!/no/such/shell\n"])
def test_a_pigz_that_cannot_be_run_is_done_without(tmp_path: Path, content: str):
    folder, broken = make_model(tmp_path / "m"), tmp_path / "pigz"
    broken.write_text(content)
    broken.chmod(0o755)

    facts = archive(folder, ArchiveTools(pigz_bin=str(broken), level=1, pigz_threads=1))

    assert facts.method == "isal level 1, 1 thread"


def test_variables_for_tar_and_pigz_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = make_model(tmp_path / "m")
    before = archive(folder, ArchiveTools())

    monkeypatch.setenv("TAR_OPTIONS", "--mtime=2020-01-01 --exclude=config.json")
    monkeypatch.setenv("GZIP", "-1")
    monkeypatch.setenv("PIGZ", "-1")

    assert (archive(folder, ArchiveTools())).sha256 == before.sha256


@pytest.mark.parametrize("level", range(10))
def test_a_level_that_is_set_is_obeyed(tmp_path: Path, level: int):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "data").write_bytes(weights(SAMPLED_FROM_BYTES))
    stored, fast, middle, best = "stored", "isal level 1", "isal level 2", "isal level 3"
    expected = [stored, fast, fast, fast, middle, middle, best, best, best, best][level]

    in_process = archive(folder, ArchiveTools(level=level, use_pigz=False))
    assert in_process.method.startswith(expected)
    if level < 2:  # the slow ones do not get better by being run on this much data
        assert (archive(folder, ArchiveTools(level=level))).method.startswith(f"pigz -{level},")


def test_all_of_pigz_levels_reach_pigz(tmp_path: Path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "data").write_bytes(text(MIB))
    for level in range(10):
        facts = archive(folder, ArchiveTools(level=level, pigz_threads=2))
        plain = subprocess.run(
            [PIGZ, "-n", "-m", "-p", "2", f"-{level}"], input=gzip.decompress(facts.path.read_bytes()),
            capture_output=True, check=True,
        )  # fmt: skip
        assert facts.path.read_bytes() == plain.stdout


@cache
def weights(size: int) -> bytes:
    """bf16 numbers like those of a model: their upper bytes repeat, their lower ones are noise."""
    chance = seeded(3)
    block = b"".join(struct.pack("<f", chance.gauss(0, 0.02))[2:] for _ in range(MIB // 4))
    return (block * (size // len(block) + 1))[:size]


def text(size: int) -> bytes:
    chance = seeded(4)
    words = [chance.randbytes(chance.randrange(2, 9)).hex() for _ in range(2000)]
    block = " ".join(chance.choices(words, k=100_000)).encode()
    return (block * (size // len(block) + 1))[:size]


def noise(size: int) -> bytes:
    return seeded(5).randbytes(size)


WITH_PIGZ, WITHOUT_PIGZ = ArchiveTools(pigz_threads=2), ArchiveTools(pigz_threads=2, use_pigz=False)
CHOICES: dict[str, tuple[Callable[[int], bytes], int, ArchiveTools, str]] = {
    "weights": (weights, SAMPLED_FROM_BYTES, WITH_PIGZ, "isal level 1,"),
    "weights, no pigz": (weights, SAMPLED_FROM_BYTES, WITHOUT_PIGZ, "isal level 1,"),
    "noise": (noise, SAMPLED_FROM_BYTES, WITH_PIGZ, "isal level 1,"),
    "text": (text, SAMPLED_FROM_BYTES, WITH_PIGZ, "pigz -6,"),
    "text, no pigz": (text, SAMPLED_FROM_BYTES, WITHOUT_PIGZ, "isal level 3,"),
    "little": (weights, MIB, WITH_PIGZ, "pigz -6,"),
    "little, no pigz": (weights, MIB, WITHOUT_PIGZ, "isal level 3,"),
}


@pytest.mark.parametrize(("make", "size", "tools", "expected"), CHOICES.values(), ids=CHOICES)
def test_the_data_decides_when_no_level_is_set(
    tmp_path: Path, make: Callable[[int], bytes], size: int, tools: ArchiveTools, expected: str
):
    folder = tmp_path / "m"
    (folder / "more").mkdir(parents=True)
    content = make(size)
    (folder / "config.json").write_text("{}")
    (folder / "a.safetensors").write_bytes(content[: size // 3])
    (folder / "more" / "b.safetensors").write_bytes(content[size // 3 :])

    facts = archive(folder, tools)

    assert facts.method.startswith(expected)
    if tools.use_pigz:
        usual = archive(folder, ArchiveTools(level=6, pigz_threads=2))
        assert facts.size_bytes <= usual.size_bytes * 1.001


def test_many_threads_and_one_make_the_same_archive_in_process(tmp_path: Path):
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "data").write_bytes(weights(9 * MIB + 1))

    one, many = [archive(folder, ArchiveTools(use_pigz=False, pigz_threads=threads)) for threads in (1, 64)]

    assert one.sha256 == many.sha256
    assert (one.method, many.method) == ("isal level 3, 1 thread", "isal level 3, 8 threads")
