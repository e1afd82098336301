"""The cache of fetched files on a real disk: whole entries, pins, room."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from cache_entries import add, add_unused, digest, entries, grow_older, hidden, names, places, wanted

from worker.cache_entry import Wanted, bytes_taken
from worker.input_cache import InputCache


class DiskUsage(NamedTuple):
    """As shutil has it."""

    total: int
    used: int
    free: int


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / ".cache"


@pytest.fixture
def cache(folder: Path) -> InputCache:
    return InputCache(folder, max_bytes=10_000)


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


def disk_of(cache: InputCache, folder: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small disk on which nothing else lies."""

    def room() -> int:
        return size - sum(path.stat().st_size for path in folder.rglob("f.bin"))

    monkeypatch.setattr(cache, "room_bytes", room)


async def test_room_is_made_of_what_nobody_uses(cache: InputCache, folder: Path, monkeypatch: pytest.MonkeyPatch):
    await add_unused(cache, "a", "a" * 3000)
    pin = await add(cache, "b", text="b" * 3000)
    disk_of(cache, folder, 6000, monkeypatch)
    await cache.make_room(0)
    assert await places(cache, "a", "b") == ["a", "b"]
    await cache.make_room(2000)
    assert await places(cache, "a", "b") == ["b"]
    assert pin.path.exists()
    pin.release()


async def test_nothing_goes_for_room_that_cannot_be_made(
    cache: InputCache, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    await add_unused(cache, "a", "a" * 3000)
    pin = await add(cache, "b", text="b" * 3000)
    disk_of(cache, folder, 6500, monkeypatch)
    with pytest.raises(OSError, match="3501 bytes are needed and 500 are free") as caught:
        await cache.make_room(3501)
    assert caught.value.errno == errno.ENOSPC
    assert await places(cache, "a", "b") == ["a", "b"]
    await cache.make_room(3500)
    assert await places(cache, "a", "b") == ["b"]
    pin.release()


async def test_a_part_of_the_disk_is_left_to_others(cache: InputCache, monkeypatch: pytest.MonkeyPatch):
    disk = shutil.disk_usage("/tmp")  # noqa: S108 - the tests' own disk
    assert abs(disk.free - min(2**30, disk.total // 50) - cache.room_bytes()) < 2**30
    for total, free, room in ((2**40, 2**31, 2**30), (1000, 500, 480), (1000, 20, 0), (2**40, 5, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, facts=(total, total - free, free): DiskUsage(*facts))
        assert cache.room_bytes() == room


async def test_an_abandoned_workspace_leaves_nothing(cache: InputCache, folder: Path):
    async def fail() -> None:
        async with cache.workspace(wanted()) as made:
            (made.folder / "download").write_text("half")
            raise ValueError("the peer is gone")

    with pytest.raises(ValueError, match="gone"):
        await fail()
    assert names(folder) == [".guard"]


async def test_a_workspace_that_is_gone_hides_no_error(cache: InputCache, folder: Path):
    async def fail(error: BaseException) -> None:
        async with cache.workspace(wanted()):
            shutil.rmtree(folder)
            raise error

    with pytest.raises(ValueError, match="the peer is gone"):
        await fail(ValueError("the peer is gone"))
    with pytest.raises(asyncio.CancelledError):
        await fail(asyncio.CancelledError())


async def test_a_version_that_comes_back_is_found_first(cache: InputCache, folder: Path):
    for text, validator in (("old", "1"), ("new", "2")):
        (await add(cache, text=text, validator=validator)).release()
    for entry in entries(folder):
        grow_older(entry, 60)
    back = await add(cache, text="old", validator="1")
    found = await cache.find(wanted())
    assert found is not None
    assert found.path == back.path
    found.release()
    back.release()


async def test_an_entry_that_cannot_be_read_here_hides_no_other(cache: InputCache, folder: Path):
    for name in ("a", "b"):
        await add_unused(cache, name, name)
    (broken,) = (entry for entry in entries(folder) if digest("a") in (entry / "entry.json").read_text())
    (broken / "entry.json").unlink()
    (broken / "entry.json").symlink_to("entry.json")  # a loop: an OSError for everybody, root too
    assert await places(cache, "a", "b") == ["b"]
    assert broken.exists(), "it may be of use to others"
    await cache.trim()
    assert await cache.drop_unused() == 1
    again = await add(cache, "a", text="a")
    assert again.path.read_text() == "a"
    again.release()


async def test_an_entry_without_a_lock_that_can_be_taken_hides_no_other(cache: InputCache, folder: Path):
    for name in ("a", "b"):
        await add_unused(cache, name, name)
    (broken,) = (entry for entry in entries(folder) if digest("a") in (entry / "entry.json").read_text())
    (broken / "lock").unlink()
    (broken / "lock").mkdir()
    assert await places(cache, "a", "b") == ["b"]
    assert await cache.drop_unused() == 1


def test_small_files_count_as_whole_blocks(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    for number in range(10):
        (tmp_path / "folder" / str(number)).write_text("x")
    (tmp_path / "large").write_bytes(bytes(10_000))
    assert bytes_taken(tmp_path) == 11 * 4096 + 10_000


async def test_foreign_things_in_the_folder_are_left_alone(cache: InputCache, folder: Path):
    (folder / "huggingface").mkdir(parents=True)
    (folder / "note.txt").write_text("mine")
    await cache.start()
    await add_unused(cache, "a", "a" * 20_000)
    await cache.drop_unused()
    assert names(folder) == [".guard", "huggingface", "note.txt"]
