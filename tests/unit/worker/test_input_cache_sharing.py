"""The cache of fetched files, used by several daemons at once, and by ones that are cancelled or killed."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cache_entries import add, digest, hidden, places, wanted
from waiting_until import wait_until

from worker.cache_entry import Wanted
from worker.input_cache import InputCache


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".cache"


@pytest.fixture
def cache(folder: Path) -> InputCache:
    return InputCache(folder, max_bytes=10_000)


# Two caches in one folder hold their locks apart, like two processes.


async def test_another_daemon_does_not_delete_what_is_used_here(cache: InputCache, folder: Path):
    other = InputCache(folder, max_bytes=0)
    pin = await add(cache)
    await other.start()
    assert await other.drop_unused() == 0
    assert pin.path.exists()
    pin.release()
    assert await other.drop_unused() == 1
    assert not pin.path.exists()


async def test_an_entry_is_made_by_one_at_a_time(cache: InputCache, folder: Path):
    other = InputCache(folder, max_bytes=10_000)
    inside = asyncio.Event()
    order: list[str] = []

    async def second() -> None:
        inside.set()
        async with other.workspace(wanted()):
            order.append("second")

    async with cache.workspace(wanted()) as made:
        running = asyncio.create_task(second())
        await inside.wait()
        async with other.workspace(wanted("http://h/another")):
            order.append("another entry is free")
        await other.start()
        assert made.folder.exists(), "a sweep leaves alone what is being made"
        order.append("first")
    await running
    assert order == ["another entry is free", "first", "second"]
    assert hidden(folder) == []


async def test_waiting_for_another_maker_can_be_cancelled(
    cache: InputCache, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    other = InputCache(folder, max_bytes=10_000)
    looks: list[object] = []
    look = other._new

    def counted(want: Wanted) -> object:
        looks.append(look(want))
        return looks[-1]

    monkeypatch.setattr(other, "_new", counted)
    async with cache.workspace(wanted()):
        waiting = asyncio.create_task(add(other))
        await asyncio.to_thread(wait_until, lambda: len(looks) >= 2, "it has looked twice")
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not any(looks)
    assert hidden(folder) == []
    (await add(cache)).release()


MAKER = """
import asyncio, sys
from pathlib import Path
from worker.cache_entry import Wanted
from worker.input_cache import InputCache

async def main():
    async with InputCache(Path(sys.argv[1]), 10_000).workspace(Wanted("http://h/a", "auto:.gz")) as made:
        (made.folder / "download").write_text("half")
        await asyncio.sleep(600)

asyncio.run(main())
"""


@contextlib.contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that inherits what is inheritable."""
    with subprocess.Popen(command, close_fds=False) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_what_a_killed_process_left_is_swept(cache: InputCache, folder: Path):
    (await add(cache, "http://h/kept")).release()
    for way in ("start", "make"):
        with started([sys.executable, "-c", MAKER, str(folder)]) as maker:
            await asyncio.to_thread(wait_until, lambda: hidden(folder), "it makes an entry")
            await cache.start()
            assert len(hidden(folder)) == 1, "its maker lives"
            maker.send_signal(signal.SIGKILL)
        if way == "start":
            (folder / ".old-0011223344556677").mkdir()
            (folder / f".new-{digest('without a lock')}").mkdir()
            await cache.start()
        else:
            (await add(cache)).release()
        assert hidden(folder) == []
    assert await places(cache, "http://h/a", "http://h/kept") == ["http://h/a", "http://h/kept"]


async def test_a_cancelled_search_pins_nothing(cache: InputCache):
    (await add(cache)).release()
    for _ in range(20):
        searching = asyncio.create_task(cache.find(wanted()))
        await asyncio.sleep(0)
        searching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await searching
    assert await cache.drop_unused() == 1


async def test_pins_do_not_reach_child_processes(cache: InputCache):
    pin = await add(cache)
    with started(["/bin/sleep", "600"]) as child:
        comm = Path(f"/proc/{child.pid}/comm")
        await asyncio.to_thread(wait_until, lambda: comm.read_text() == "sleep\n", "the child runs")
        pin.release()
        assert await cache.drop_unused() == 1
