"""Archives that go wrong: nothing half-made is left, no process lives on, and the error names the culprit."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import psutil
import pytest
from waiting_until import wait_until

from orchestrator_client.archives import archive_writer
from orchestrator_client.archives.archive_children import ChildProcess
from orchestrator_client.archives.archive_wiring import Sink
from orchestrator_client.archives.archive_writer import ArchiveTools, remove_leftovers, write_archive
from orchestrator_client.errors import ArchiveError

REPO: Final = Path(__file__).resolve().parents[3]
MIB: Final = 1024**2
LARGE: Final = 64 * 1024 * MIB
"""More than any machine archives before a test ends it."""
TOOLS = {
    "tar and pigz": ArchiveTools(level=9, pigz_threads=1),
    "tar and isal": ArchiveTools(level=9, pigz_threads=1, use_pigz=False),
    "Python and pigz": ArchiveTools(level=9, pigz_threads=1, tar_bin="no-such-tar"),
    "Python and isal": ArchiveTools(level=9, pigz_threads=1, tar_bin="no-such-tar", use_pigz=False),
}
all_combinations = pytest.mark.parametrize("tools", TOOLS.values(), ids=TOOLS)
both_sources = pytest.mark.parametrize(
    "tools", [TOOLS["tar and pigz"], TOOLS["Python and isal"]], ids=["tar", "Python"]
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that takes minutes to archive and no room on the disk: its file is one large hole."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=2 * LARGE))
    folder = tmp_path / "place" / "m"
    folder.mkdir(parents=True)
    with (folder / "weights").open("wb") as file:
        file.truncate(LARGE)
    return folder


def ignore_progress(_done: int, _total: int) -> None:
    pass


def archive(folder: Path, tools: ArchiveTools, on_progress: Callable[[int, int], None] = ignore_progress) -> None:
    asyncio.run(write_archive(folder, tools, on_progress))


def once(action: Callable[[], object]) -> Callable[[int, int], None]:
    """A listener to progress that acts the first time."""
    calls: list[object] = []

    def heard(_done: int, _total: int) -> None:
        if not calls:
            calls.append(None)
            action()

    return heard


def children(process: psutil.Process | None = None) -> list[psutil.Process]:
    """Living and dead tar and pigz processes."""
    return [one for one in (process or psutil.Process()).children() if one.name() in {"tar", "pigz"}]


def kill(name: str) -> None:
    for child in children():
        if child.name() == name:
            child.kill()


def assert_nothing_left(folder: Path) -> None:
    assert list(folder.parent.iterdir()) == [folder]
    assert children() == []
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("archive")] == []


@all_combinations
async def test_cancelling_ends_everything(folder: Path, tools: ArchiveTools):
    begun = asyncio.Event()
    writing = asyncio.create_task(write_archive(folder, tools, once(begun.set)))
    await begun.wait()
    assert len(children()) == tools.use_pigz + (tools.tar_bin == "tar")

    writing.cancel()
    await asyncio.sleep(0)
    writing.cancel()  # also when somebody is impatient
    with pytest.raises(asyncio.CancelledError):
        await writing

    assert_nothing_left(folder)


@all_combinations
async def test_cancelling_before_it_has_begun(folder: Path, tools: ArchiveTools):
    writing = asyncio.create_task(write_archive(folder, tools, ignore_progress))
    await asyncio.sleep(0)

    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing

    assert_nothing_left(folder)


@all_combinations
def test_a_listener_that_fails_ends_it(folder: Path, tools: ArchiveTools):
    def fail(_done: int, _total: int) -> None:
        raise LookupError("from the listener")

    with pytest.raises(LookupError, match="from the listener"):
        archive(folder, tools, fail)

    assert_nothing_left(folder)


@pytest.mark.parametrize(
    ("program", "tools"),
    [
        ("tar", TOOLS["tar and pigz"]),
        ("tar", TOOLS["tar and isal"]),
        ("pigz", TOOLS["tar and pigz"]),
        ("pigz", TOOLS["Python and pigz"]),
    ],
)
def test_a_program_that_is_killed_is_named(folder: Path, program: str, tools: ArchiveTools):
    with pytest.raises(ArchiveError, match=rf"{program} was ended by signal 9 \(SIGKILL\)") as caught:
        archive(folder, tools, once(lambda: kill(program)))

    assert str(folder) in str(caught.value)
    assert_nothing_left(folder)


def test_an_archive_that_is_not_whole_is_found_out_by_its_size(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """When somebody else reaps our children, their exit statuses are lost and read as success."""
    monkeypatch.setattr(ChildProcess, "complaint", lambda _child: "")

    with pytest.raises(ArchiveError, match="not whole"):
        archive(folder, TOOLS["tar and isal"], once(lambda: kill("tar")))

    assert_nothing_left(folder)


@both_sources
def test_a_file_that_vanishes_is_named(folder: Path, tools: ArchiveTools, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive_writer, "_require_room", lambda *_: (folder / "weights").unlink())

    with pytest.raises(ArchiveError, match=r"m/weights.*No such file"):
        archive(folder, tools)

    assert_nothing_left(folder)


@both_sources
def test_a_file_that_a_link_replaces_does_not_lead_out(
    folder: Path, tools: ArchiveTools, monkeypatch: pytest.MonkeyPatch
):
    def put_a_link(*_: object) -> None:
        (folder / "weights").unlink()
        (folder / "weights").symlink_to("/proc/version")

    monkeypatch.setattr(archive_writer, "_require_room", put_a_link)

    with pytest.raises(ArchiveError):
        archive(folder, tools)

    assert_nothing_left(folder)


def write_into(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"changed")


CHANGES: dict[str, Callable[[Path], None]] = {
    "shrinks": lambda path: os.truncate(path, 10),
    "grows": lambda path: os.truncate(path, 33 * MIB),
    "changes": write_into,
}


@both_sources
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_meanwhile_is_named(
    folder: Path, tools: ArchiveTools, change: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
):
    (folder / "weights").write_bytes(os.urandom(32 * MIB))
    write, changed = Sink.write, threading.Event()

    def change_and_write(sink: Sink, data: bytes) -> int:
        # After the first piece; the pipes are too small for the source to be at its end by then.
        if len(data) > 1000 and not changed.is_set():
            changed.set()
            change(folder / "weights")
        return write(sink, data)

    monkeypatch.setattr(Sink, "write", change_and_write)

    with pytest.raises(ArchiveError, match=r"m/weights.*(changed|shrank)"):
        archive(folder, replace(tools, level=1))

    assert_nothing_left(folder)


@both_sources
def test_a_file_that_grows_before_it_is_read_is_noticed(
    folder: Path, tools: ArchiveTools, monkeypatch: pytest.MonkeyPatch
):
    (folder / "weights").write_bytes(b"few")
    monkeypatch.setattr(archive_writer, "_require_room", lambda *_: (folder / "weights").write_bytes(bytes(MIB)))

    with pytest.raises(ArchiveError, match=r"changed|not whole"):
        archive(folder, tools)

    assert_nothing_left(folder)


@both_sources
@pytest.mark.parametrize("name", ["weights", "new"])
def test_what_changes_without_tar_noticing_is_noticed(
    folder: Path, tools: ArchiveTools, name: str, monkeypatch: pytest.MonkeyPatch
):
    (folder / "weights").write_bytes(b"old")
    monkeypatch.setattr(archive_writer, "_require_room", lambda *_: (folder / name).write_bytes(b"new"))

    with pytest.raises(ArchiveError, match="changed"):
        archive(folder, tools)

    assert_nothing_left(folder)


def test_too_little_room_is_seen_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=123_456))

    with pytest.raises(OSError, match=r"\d{11} bytes needed, 123456 bytes free") as caught:
        archive(folder, ArchiveTools(level=1))

    assert caught.value.errno == errno.ENOSPC
    assert str(folder) in str(caught.value)
    assert_nothing_left(folder)


def test_samples_tell_how_much_room_is_needed(folder: Path):
    """Of a hole, next to nothing remains."""
    os.truncate(folder / "weights", 64 * MIB)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _path: SimpleNamespace(free=3 * MIB))
        archive(folder, ArchiveTools())
        with pytest.raises(OSError, match="bytes needed"):
            archive(folder, ArchiveTools(level=6))


SCRIPT: Final = """
import asyncio, json, resource, shutil, sys
from pathlib import Path
from types import SimpleNamespace
from orchestrator_client.archives.archive_writer import ArchiveTools, write_archive
limit, tools = json.loads(sys.argv[2])
shutil.disk_usage = lambda _path: SimpleNamespace(free=2**60)
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def heard(done, total):
    print("progress", flush=True)
try:
    asyncio.run(write_archive(Path(sys.argv[1]), ArchiveTools(**tools), heard))
except OSError as error:
    print(error.errno, error)
"""


def script(folder: Path, limit: int, tools: dict[str, object]) -> list[str]:
    return [sys.executable, "-W", "error", "-c", SCRIPT, str(folder), json.dumps([limit, tools])]


@pytest.mark.parametrize("limit", [5, MIB, 3 * MIB])
@pytest.mark.parametrize(
    "tools",
    [
        {"level": 1},
        {"level": 1, "use_pigz": False},
        {"level": 0, "use_pigz": False},
        {"level": 1, "tar_bin": "no-such-tar"},
        {"level": 1, "tar_bin": "no-such-tar", "use_pigz": False, "pigz_threads": 1},
    ],
    ids=str,
)
def test_a_disk_that_is_full_while_writing(tmp_path: Path, tools: dict[str, object], limit: int):
    """The limit on the size of a file stands for the disk: it fails the same system call, with another number."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "weights").write_bytes(os.urandom(4 * MIB))

    result = subprocess.run(script(folder, limit, tools), cwd=REPO, capture_output=True, text=True, check=True)

    answer = result.stdout.splitlines()[-1]
    assert answer.startswith(f"{errno.EFBIG} ")
    assert str(tmp_path / "m.tar.gz") in answer
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("tools", [{}, {"use_pigz": False}, {"tar_bin": "no-such-tar"}], ids=str)
def test_nothing_survives_a_killed_daemon_but_a_file_that_is_cleaned_up(folder: Path, tools: dict[str, object]):
    expected = {"tar", "pigz"} - ({"pigz"} if "use_pigz" in tools else {"tar"} if tools else set())
    command = script(folder, 0, {"level": 9, "pigz_threads": 1, **tools})
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "progress\n"
        programs = children(psutil.Process(daemon.pid))
        assert {one.name() for one in programs} == expected
        daemon.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(one.is_running() for one in programs), f"{programs} are gone")

    (left,) = set(folder.parent.iterdir()) - {folder}
    others = [folder.parent / name for name in (".m.tar.gz", ".m2.tar.gz.1.part", "m.tar.gz", "x.part")]
    for path in others:
        path.write_text("somebody else's")
    remove_leftovers(folder)
    assert not left.exists()
    assert set(folder.parent.iterdir()) == {folder, *others}


def test_no_leftovers_and_no_folder_are_fine(tmp_path: Path):
    remove_leftovers(tmp_path / "missing" / "m")
    remove_leftovers(tmp_path / "m")
    assert list(tmp_path.iterdir()) == []
