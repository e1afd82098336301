"""Inputs on a disk that is full, or nearly: what is deleted for them, what is not, and what is not fetched twice."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path

import pytest
from input_world import NAME, World, archive, checkpoint, marker_of, put, tar_of
from waiting_until import wait_until

from orchestrator_client.archives.archive_reader import ArchiveFormat, UnpackLimits, unpack
from worker import input_fetching

MIB = 1024**2


async def old_entry(world: World) -> Path:
    """Something that nobody uses; 12288 bytes and more."""
    await world.checkpoint(url=put(world, archive("old"), name="old.tar.gz"))
    world.inputs.release("t1")
    (entry,) = world.entries
    return entry


def let_disk_be(world: World, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk of `size` bytes on which nothing but the cache lies."""
    folder = world.results / ".cache"
    monkeypatch.setattr(world.cache, "room_bytes", lambda: max(size - taken(folder), 0))


def taken(folder: Path) -> int:
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except FileNotFoundError:
            continue  # it is just going
    return sum(sizes)


async def test_a_full_disk_drops_unused_entries_first(world: World, monkeypatch: pytest.MonkeyPatch):
    await old_entry(world)
    content = bytes(3 * MIB)
    let_disk_be(world, len(content) + 1000, monkeypatch)
    found = await world.checkpoint(url=put(world, content, name="m.gguf"))
    assert found.stat().st_size == len(content)
    assert [entry.name for entry in world.entries] == [found.parents[1].name]


async def test_no_room_is_disk_full_and_drops_nothing(world: World, monkeypatch: pytest.MonkeyPatch):
    old = await old_entry(world)
    let_disk_be(world, 2 * MIB, monkeypatch)
    failure = await world.failure(checkpoint(url=put(world, bytes(3 * MIB), name="m.gguf")))
    assert (failure.reason, failure.retryable) == ("disk_full", True)
    assert "3145728 bytes are needed" in failure.message
    assert world.entries == [old]
    assert world.leftovers == []


async def test_room_is_made_for_what_an_archive_holds_too(world: World, monkeypatch: pytest.MonkeyPatch):
    for number in range(10):
        url = put(world, os.urandom(MIB), name=f"old-{number}.gguf")
        await world.checkpoint(url=url, task_id=f"o{number}")
        world.inputs.release(f"o{number}")
    packed = tar_of({"m/config.json": b"{}", "m/model.safetensors": os.urandom(2 * MIB) + bytes(2 * MIB)})
    assert len(packed) < 3 * MIB
    let_disk_be(world, taken(world.results / ".cache") + MIB // 5, monkeypatch)

    found = await world.checkpoint(url=put(world, packed, name="new.tar.gz"))

    assert (found / "model.safetensors").stat().st_size == 4 * MIB


async def test_a_body_without_an_end_leaves_the_reserve(world: World, monkeypatch: pytest.MonkeyPatch):
    url = put(world, b"x", name="m.gguf")
    world.orch.lie("endless", times=3)
    disk = 5 * MIB
    let_disk_be(world, disk, monkeypatch)
    failure = await world.failure(checkpoint(url=url))
    assert failure.reason == "disk_full"
    assert world.leftovers == []
    assert len(world.statuses) == 1


async def test_no_room_while_unpacking_is_disk_full(world: World, monkeypatch: pytest.MonkeyPatch):
    async def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("worker.input_fetching.unpack", full)
    failure = await world.failure(checkpoint(url=put(world, archive())))
    assert failure.reason == "disk_full"
    assert "No space left" in failure.message
    assert world.leftovers == []


async def test_unpacking_does_not_take_the_last_of_the_disk(world: World, monkeypatch: pytest.MonkeyPatch):
    let_disk_be(world, 2 * MIB, monkeypatch)
    failure = await world.failure(checkpoint(url=put(world, tar_of({"m/config.json": bytes(3 * MIB)}))))
    assert failure.reason == "disk_full"
    assert "free, but for a reserve" in failure.message
    assert world.entries == []
    assert world.leftovers == []


async def test_unpacking_that_finds_no_room_fetches_nothing_again(world: World, monkeypatch: pytest.MonkeyPatch):
    await old_entry(world)
    seen: list[list[str]] = []

    async def first_full(file: Path, target: Path, how: ArchiveFormat, limits: UnpackLimits) -> int:
        seen.append(sorted(path.name for path in file.parent.iterdir()))
        if len(seen) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return await unpack(file, target, how, limits)

    monkeypatch.setattr(input_fetching, "unpack", first_full)
    assert marker_of(await world.checkpoint(url=put(world, archive("new")))) == "new"
    assert seen == [["download", "lock"]] * 2
    assert world.statuses == [200, 200]
    assert len(world.entries) == 1


async def test_a_prefetch_drops_nothing(world: World, monkeypatch: pytest.MonkeyPatch):
    old = await old_entry(world)
    content = bytes(3 * MIB)
    task = world.task(checkpoint(url=put(world, content, name="m.gguf")), task_id="t2")
    let_disk_be(world, len(content) + 1000, monkeypatch)
    world.inputs.prefetch(task)
    await asyncio.to_thread(wait_until, lambda: len(world.statuses) == 2 and not world.leftovers, "it has given up")
    assert world.entries == [old]
    order = await world.inputs.fetch(task, world.heard.append)
    assert order.inputs[NAME].stat().st_size == len(content)
    assert not old.exists()


async def test_a_prefetch_that_somebody_waits_for_makes_room(world: World, monkeypatch: pytest.MonkeyPatch):
    old = await old_entry(world)
    content = bytes(3 * MIB)
    request = checkpoint(url=put(world, content, name="m.gguf"))
    let_disk_be(world, len(content) + 1000, monkeypatch)
    world.orch.hang("download")
    world.inputs.prefetch(world.task(request, task_id="t2"))
    await asyncio.to_thread(wait_until, lambda: len(world.orch.seen("download")) == 2, "it has begun")
    world.orch.release()
    assert (await world.checkpoint(task_id="t3", url=request.url)).stat().st_size == len(content)
    assert not old.exists()
