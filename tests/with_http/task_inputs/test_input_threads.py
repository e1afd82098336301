"""Large local files: they are read in threads of the inputs' own, which end when nobody waits any more."""

from __future__ import annotations

import asyncio
import hashlib
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from input_world import World, archive, checkpoint, tar_of
from waiting_until import wait_until

HUGE = 2**42
"""Bytes of a sparse file: hours of reading."""


def huge_archive(world: World) -> Path:
    file = world.results / "big.tar"
    file.write_bytes(b"")
    with file.open("r+b") as writing:
        writing.write(plain_tar())
        writing.truncate(HUGE)
    return file


def plain_tar() -> bytes:
    import gzip  # noqa: PLC0415

    return gzip.decompress(tar_of({"m/config.json": b"{}"}))


def readers(file: Path) -> list[int]:
    """Descriptors of this process that lead to a file."""
    return [int(descriptor.name) for descriptor in Path("/proc/self/fd").iterdir() if leads_to(descriptor, file)]


def leads_to(descriptor: Path, file: Path) -> bool:
    try:
        return descriptor.readlink() == file
    except FileNotFoundError:
        return False


async def test_cancelled_digests_leave_no_thread_behind(world: World):
    file = huge_archive(world)
    for _ in range(8):
        fetching = asyncio.create_task(world.checkpoint(path=str(file), sha256="0" * 64))
        await asyncio.to_thread(wait_until, lambda: readers(file), "it is being read")
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    await asyncio.to_thread(wait_until, lambda: not readers(file), "nobody reads it any more")


async def test_without_a_digest_a_local_archive_is_not_read_before_it_is_unpacked(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    file = huge_archive(world)
    monkeypatch.setattr(world.cache, "room_bytes", lambda: 2 * HUGE)
    me = psutil.Process()
    before = set(me.children())  # other tests' brokers

    def unpacking() -> set[psutil.Process]:
        return set(me.children()) - before

    fetching = asyncio.create_task(world.checkpoint(path=str(file)))
    await asyncio.to_thread(wait_until, unpacking, "it is being unpacked")
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert unpacking() == set()
    assert world.leftovers == []


PROGRAM = """
import asyncio, sys
from pathlib import Path
from worker.input_threads import InputThreads
from worker.local_inputs import LocalInputs
from executors.input_spec import InputRequest

async def main():
    threads = InputThreads("inputs")
    looking = LocalInputs(Path(sys.argv[1]), (Path(sys.argv[1]),))
    request = InputRequest(name="x", kind="checkpoint", sha256="0" * 64)
    look = lambda check: looking.at_path(request, "big.tar", Path(sys.argv[1]), check)
    running = asyncio.create_task(threads.stoppable(look))
    await asyncio.sleep(0.2)
    running.cancel()
    await asyncio.wait({running})
    threads.close()

asyncio.run(main())
"""


def test_a_cancelled_digest_does_not_hold_up_the_end_of_the_process(tmp_path: Path):
    with (tmp_path / "big.tar").open("wb") as file:
        file.truncate(HUGE)
    subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], check=True, timeout=60)


async def test_digests_of_many_blocks_are_right(world: World):
    file = world.results / "big.gguf"
    file.write_bytes(bytes(range(256)) * 20_000 + archive())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert await world.checkpoint(path=str(file), sha256=digest) == file
    assert "SHA-256" in (await world.failure(checkpoint(path=str(file), sha256="0" * 64))).message
