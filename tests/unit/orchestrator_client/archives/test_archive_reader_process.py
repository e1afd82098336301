"""The process that unpacks: it ends in time and with its parent, and leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from packed_trees import many_files, names, pack, temporaries
from waiting_until import wait_until

from orchestrator_client.archives import archive_reader, archive_unpacking
from orchestrator_client.archives.archive_reader import UnpackLimits, unpack
from orchestrator_client.archives.archive_unpacking import unpack_here
from orchestrator_client.errors import UnsafeArchiveError

REPO = Path(__file__).resolve().parents[4]


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


async def test_the_time_limit_holds(tmp_path: Path):
    archive = many_files(tmp_path / "many.tar")
    before = children()
    with pytest.raises(UnsafeArchiveError, match=r"not unpacked after the 0\.3 s that are allowed"):
        await unpack(archive, tmp_path / "out", limits=UnpackLimits(seconds=0.3))
    assert names(tmp_path) == ["many.tar"]
    assert children() == before


async def test_cancelling_ends_the_process_and_removes_what_it_wrote(tmp_path: Path):
    archive = many_files(tmp_path / "many.tar")
    before = children()
    unpacking = asyncio.create_task(unpack(archive, tmp_path / "out"))
    async with asyncio.timeout(20):
        while not temporaries(tmp_path):
            await asyncio.sleep(0.005)
    assert len(children() - before) == 1
    unpacking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await unpacking
    assert children() == before
    assert names(tmp_path) == ["many.tar"]


def test_a_killed_parent_takes_the_process_with_it(tmp_path: Path):
    archive = many_files(tmp_path / "many.tar")
    script = f"""
        import asyncio
        from pathlib import Path
        from orchestrator_client.archives.archive_reader import unpack
        asyncio.run(unpack(Path({str(archive)!r}), Path({str(tmp_path / "out")!r})))
    """
    parent = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)], cwd=REPO)
    wait_until(lambda: temporaries(tmp_path), "the unpacking has begun")
    (child,) = psutil.Process(parent.pid).children()
    parent.send_signal(signal.SIGKILL)
    parent.wait()

    def gone() -> bool:
        try:
            return child.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    wait_until(gone, "the unpacking process has ended with its parent", within_sec=5)
    assert not (tmp_path / "out").exists()
    assert len(temporaries(tmp_path)) == 1
    (tmp_path / ".out.unpack-notes").mkdir()  # looks alike, but is not ours
    asyncio.run(unpack(pack(tmp_path, "tar"), tmp_path / "out"))
    assert [path.name for path in temporaries(tmp_path)] == [".out.unpack-notes"]


def test_only_left_folders_of_the_same_target_are_removed(tmp_path: Path):
    left, other, used = (
        tmp_path / name for name in (".out.unpack-01234567", ".out2.unpack-01234567", ".out.unpack-76543210")
    )
    for folder in (left, other, used):
        (folder / "sub").mkdir(parents=True)
    lock = archive_unpacking._lock(used)
    assert lock is not None
    try:
        unpack_here(pack(tmp_path, "tar"), tmp_path / "out")
    finally:
        os.close(lock)
    assert sorted(temporaries(tmp_path)) == sorted([other, used])


@pytest.mark.parametrize(
    ("status", "output", "error", "text"),
    [
        (-9, b"", "unsafe", "SIGKILL, most likely for lack of memory"),
        (-11, b'{"kind": "unp', "unsafe", "SIGSEGV"),
        (1, b"Traceback\nImportError: no isal\n", "archive", "status 1 and no answer: ImportError: no isal"),
        (0, b"", "archive", "status 0 and no answer"),
        (0, b'noise\n{"kind": "unsafe", "text": "why"}\n', "unsafe", "why"),
    ],
)
def test_a_process_without_an_answer_is_an_error(status: int, output: bytes, error: str, text: str):
    answer = archive_reader._read(status, output)
    assert answer.kind == error
    assert text in answer.text
