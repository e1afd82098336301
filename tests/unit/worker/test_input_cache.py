"""The cache of fetched files on a real disk: whole entries, pins, room, several daemons in one folder."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from waiting_until import wait_until

from worker.cache_entry import CacheRecord, Pin, Wanted
from worker.input_cache import InputCache

FORM = "auto:.gz"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".cache"


@pytest.fixture
def cache(folder: Path) -> InputCache:
    return InputCache(folder, max_bytes=10_000)


def wanted(place: str = "http://h/a", sha256: str = "") -> Wanted:
    return Wanted(place, FORM, sha256)


def digest(text: str) -> str:
    return Wanted(text, "").source


async def add(
    cache: InputCache, place: str = "http://h/a", *, text: str = "x", validator: str = '"v1"', unpacked: bool = False
) -> Pin:
    """Make an entry; its digest is that of its text."""
    want = wanted(place)
    async with cache.workspace(want) as made:
        content = made.folder / "content"
        content.mkdir()
        (content / "f.bin").write_text(text)
        (made.folder / "download").write_text("left over from the making")
        record = CacheRecord(
            url="http://h/…",
            source=want.source,
            form=FORM,
            validator=validator,
            sha256=digest(text),
            fetched_bytes=len(text),
            kept_bytes=len(text),
            payload="content" if unpacked else "content/f.bin",
        )
        return await cache.add(made, record)


async def add_unused(cache: InputCache, place: str, text: str) -> None:
    (await add(cache, place, text=text)).release()


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if len(path.name) == 64)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith((".new-", ".old-")))


def grow_older(pin_or_entry: Path, seconds: float) -> None:
    record = pin_or_entry / "entry.json"
    was = record.stat().st_mtime
    os.utime(record, (was - seconds, was - seconds))


async def places(cache: InputCache, *names: str) -> list[str]:
    """Which of these are there; looking does not count as use."""
    there = []
    for name in names:
        if (pin := await cache.find(wanted(name))) is not None:
            pin.release()
            there.append(name)
    return there


async def test_nothing_is_made_before_it_is_needed(cache: InputCache, folder: Path):
    await cache.start()
    assert await cache.find(wanted()) is None
    await cache.trim()
    assert await cache.drop_unused() == 0
    assert names(folder.parent) == []


async def test_an_entry_is_found_by_its_place(cache: InputCache, folder: Path):
    made = await add(cache, text="hello")
    found = await cache.find(wanted())
    assert found is not None
    assert found.path == made.path
    assert found.path.read_text() == "hello"
    assert not found.unpacked
    assert await cache.find(wanted("http://h/b")) is None
    assert await cache.find(Wanted("http://h/a", "none:.gz")) is None
    (entry,) = entries(folder)
    assert sorted(path.name for path in entry.iterdir()) == ["content", "entry.json", "lock"]
    assert hidden(folder) == []
    found.release()
    made.release()


async def test_an_entry_is_found_by_its_digest_wherever_it_came_from(cache: InputCache):
    made = await add(cache, text="hello", validator="")
    assert await cache.find(wanted()) is None, "no validator, so nobody can know whether it is current"
    found = await cache.find(wanted("http://elsewhere/b", digest("hello")))
    assert found is not None
    assert found.path == made.path
    assert await cache.find(wanted(sha256=digest("other"))) is None
    found.release()
    made.release()


async def test_of_several_versions_the_last_used_is_found(cache: InputCache, folder: Path):
    old = await add(cache, text="old", validator='"v1"')
    new = await add(cache, text="new", validator='"v2"')
    assert len(entries(folder)) == 2
    grow_older(old.path.parents[1], 10)
    found = await cache.find(wanted())
    assert found is not None
    assert found.path.read_text() == "new"
    grow_older(new.path.parents[1], 20)
    old.touch()
    again = await cache.find(wanted())
    assert again is not None
    assert again.path.read_text() == "old"
    for pin in (old, new, found, again):
        pin.release()


async def test_the_same_content_twice_is_one_entry(cache: InputCache, folder: Path):
    first = await add(cache)
    second = await add(cache)
    assert first.path == second.path
    assert len(entries(folder)) == 1
    assert hidden(folder) == []
    first.release()
    second.release()


def lose_payload(entry: Path) -> None:
    shutil.rmtree(entry / "content")


def cut_payload(entry: Path) -> None:
    (entry / "content" / "f.bin").write_text("")


def break_json(entry: Path) -> None:
    (entry / "entry.json").write_text('{"url": ')


def lead_out(entry: Path) -> None:
    record = json.loads((entry / "entry.json").read_text())
    (entry / "entry.json").write_text(json.dumps({**record, "payload": "content/../../../secret"}))


def lose_record(entry: Path) -> None:
    (entry / "entry.json").unlink()


def lose_lock(entry: Path) -> None:
    (entry / "lock").unlink()


@pytest.mark.parametrize("damage", [lose_payload, cut_payload, break_json, lead_out, lose_record, lose_lock])
async def test_a_damaged_entry_counts_as_none_and_goes(cache: InputCache, folder: Path, damage: Callable[[Path], None]):
    (await add(cache)).release()
    (entry,) = entries(folder)
    damage(entry)
    assert await cache.find(wanted()) is None
    assert entries(folder) == []
    assert hidden(folder) == []
    again = await add(cache)
    assert again.path.read_text() == "x"
    again.release()


async def test_an_unpacked_folder(cache: InputCache):
    pin = await add(cache, unpacked=True)
    assert pin.unpacked
    assert [path.name for path in pin.path.iterdir()] == ["f.bin"]
    pin.release()


async def test_what_was_unused_for_longest_goes_first(cache: InputCache, folder: Path):
    for name in ("a", "b", "c"):
        await add_unused(cache, name, name * 3000)
    for entry in entries(folder):
        record = json.loads((entry / "entry.json").read_text())
        grow_older(entry, {digest("a"): 10, digest("b"): 30, digest("c"): 20}[record["source"]])
    await add_unused(cache, "d", "d" * 3000)
    assert await places(cache, "a", "b", "c", "d") == ["a", "c", "d"]
    assert hidden(folder) == []


async def test_use_makes_young(cache: InputCache, folder: Path):
    await add_unused(cache, "a", "a" * 4000)
    await add_unused(cache, "b", "b" * 4000)
    for entry in entries(folder):
        grow_older(entry, 50)
    used = await cache.find(wanted("a"))
    assert used is not None
    used.touch()
    used.release()
    await add_unused(cache, "c", "c" * 4000)
    assert await places(cache, "a", "b", "c") == ["a", "c"]


async def test_what_is_in_use_stays_however_full_it_is(cache: InputCache, folder: Path):
    pins = [await add(cache, name, text=name * 6000) for name in ("a", "b", "c")]
    assert len(entries(folder)) == 3
    second = pins[1].again()
    for pin in pins:
        pin.release()
    await cache.trim()
    assert await places(cache, "a", "b", "c") == ["b"]
    second.release()


async def test_one_that_is_larger_than_the_cache_lives_while_it_is_used(cache: InputCache, folder: Path):
    pin = await add(cache, text="x" * 20_000)
    await cache.trim()
    assert pin.path.exists()
    pin.release()
    pin.release()
    await cache.trim()
    assert entries(folder) == []


async def test_what_does_not_fit_goes_at_the_start(cache: InputCache, folder: Path):
    for name in ("a", "b"):
        await add_unused(cache, name, name * 4000)
    await InputCache(folder, max_bytes=5000).start()
    assert len(entries(folder)) == 1


async def test_room_is_made_of_what_nobody_uses(cache: InputCache, folder: Path, monkeypatch: pytest.MonkeyPatch):
    await add_unused(cache, "a", "a" * 3000)
    pin = await add(cache, "b", text="b" * 3000)
    size = 6000  # a disk on which nothing else lies

    def free() -> int:
        return size - sum(path.stat().st_size for path in folder.rglob("f.bin"))

    monkeypatch.setattr(cache, "free_bytes", free)
    await cache.make_room(0)
    assert await places(cache, "a", "b") == ["a", "b"]
    await cache.make_room(2000)
    assert await places(cache, "a", "b") == ["b"]
    with pytest.raises(OSError, match="5000 bytes are needed and 3000 are free") as caught:
        await cache.make_room(5000)
    assert caught.value.errno == errno.ENOSPC
    assert pin.path.exists()
    pin.release()


async def test_free_space_is_that_of_the_disk(cache: InputCache):
    assert abs(cache.free_bytes() - shutil.disk_usage("/tmp").free) < 2**30  # noqa: S108 - the tests' own disk


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


async def test_an_abandoned_workspace_leaves_nothing(cache: InputCache, folder: Path):
    async def fail() -> None:
        async with cache.workspace(wanted()) as made:
            (made.folder / "download").write_text("half")
            raise ValueError("the peer is gone")

    with pytest.raises(ValueError, match="gone"):
        await fail()
    assert names(folder) == [".guard"]


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


async def test_foreign_things_in_the_folder_are_left_alone(cache: InputCache, folder: Path):
    (folder / "huggingface").mkdir(parents=True)
    (folder / "note.txt").write_text("mine")
    await cache.start()
    await add_unused(cache, "a", "a" * 20_000)
    await cache.drop_unused()
    assert names(folder) == [".guard", "huggingface", "note.txt"]


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
