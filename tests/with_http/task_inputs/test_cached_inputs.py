"""Inputs kept in the cache: when they are fetched anew, and when they go."""

from __future__ import annotations

import hashlib
import json
import os

import pytest
from input_world import World, archive, checkpoint, jsonl, marker_of, put, tar_of

from worker.cache_entry import Pin, Wanted


async def test_a_digest_needs_no_network(world: World):
    content = archive()
    url = put(world, content)
    digest = hashlib.sha256(content).hexdigest()
    first = await world.checkpoint(url=url, sha256=digest)
    world.orch.stop()
    other = world.again()
    assert await other.checkpoint(url=url, sha256=digest) == first
    assert await other.checkpoint(url="http://nowhere.invalid/y.tar.gz", sha256=digest.upper()) == first
    assert world.statuses == [200]
    await other.aclose()


async def test_a_wrong_digest_leaves_nothing(world: World):
    failure = await world.failure(checkpoint(url=put(world, archive()), sha256="0" * 64))
    assert "000000000000" in failure.message
    assert not failure.retryable
    assert world.entries == []
    assert world.leftovers == []


async def test_unchanged_is_not_sent_again(world: World):
    url = put(world, archive())
    first = await world.checkpoint(url=url)
    other = world.again()
    assert await other.checkpoint(url=url) == first
    assert world.statuses == [200, 304]
    await other.aclose()


async def test_changed_is_fetched_anew(world: World):
    url = put(world, archive("old"))
    first = await world.checkpoint(url=url)
    put(world, archive("new"))
    second = await world.checkpoint(url=url)
    assert (marker_of(first), marker_of(second)) == ("old", "new")
    assert world.statuses == [200, 200]
    assert await world.checkpoint(url=url) == second
    assert world.statuses == [200, 200, 304]


async def test_without_a_validator_it_is_fetched_each_time(world: World):
    url = put(world, b"{}" * 16, name="rows.jsonl")
    for _ in range(2):
        world.orch.lie("wrong_content")  # and without ETag
        await world.fetch(jsonl(url=url))
    assert world.statuses == [200, 200]
    assert ["if-none-match" in call.headers for call in world.orch.seen("download")] == [False, False]


async def test_a_damaged_entry_is_fetched_anew(world: World):
    url = put(world, archive())
    first = await world.checkpoint(url=url)
    world.inputs.release("t1")
    (entry,) = world.entries
    (entry / "entry.json").write_text("{")
    assert marker_of(await world.checkpoint(url=url)) == "fetched"
    assert world.statuses == [200, 200]
    assert first.exists()


async def test_a_local_archive_is_unpacked_once(world: World):
    file = world.results / "77aa" / "final_model.tar.gz"
    file.parent.mkdir()
    file.write_bytes(archive("one"))
    first = await world.checkpoint(path=str(file))
    assert await world.checkpoint(path="77aa/final_model.tar.gz", task_id="t2") == first
    assert len(world.entries) == 1
    assert file.exists()
    file.write_bytes(archive("two!"))
    assert marker_of(await world.checkpoint(path=str(file))) == "two!"
    assert "SHA-256" in (await world.failure(checkpoint(path=str(file), sha256="0" * 64))).message
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert marker_of(await world.checkpoint(path=str(file), sha256=digest)) == "two!"


async def test_a_task_without_inputs_costs_nothing(world: World):
    task = world.task()
    assert await world.inputs.fetch(task, world.heard.append) is task.order
    world.inputs.prefetch(task)
    world.inputs.release("t1")
    assert not (world.results / ".cache").exists()


async def test_unused_entries_go_when_others_come(world: World):
    small = world.again(worker_cache_max_bytes=40_000)
    urls = [put(world, archive(str(number)), name=f"{number}.tar.gz") for number in range(4)]
    kept = await small.checkpoint(task_id="t0", url=urls[0])
    for number in (1, 2, 3):
        await small.checkpoint(task_id=f"t{number}", url=urls[number])
        small.inputs.release(f"t{number}")
    await small.aclose()
    assert len(world.entries) == 2
    assert kept.exists(), "it was in use"
    await world.checkpoint(url=urls[3])
    assert world.statuses == [200, 200, 200, 200, 304]


async def test_what_a_task_uses_stays(world: World):
    tiny = world.again(worker_cache_max_bytes=0)
    found = await tiny.checkpoint(url=put(world, archive()))
    await world.checkpoint(task_id="t2", url=put(world, archive("b"), name="b.tar.gz"))
    await tiny.cache.trim()
    assert marker_of(found) == "fetched"
    tiny.inputs.release("t1")
    await tiny.aclose()
    assert not found.exists()


async def test_tiny_files_press_on_the_cap_too(world: World):
    small = world.again(worker_cache_max_bytes=100_000)
    for number in range(2):
        files = {f"m/{name}": b"" for name in ["config.json", *(str(each) for each in range(20 + number))]}
        await small.checkpoint(task_id=f"t{number}", url=put(world, tar_of(files), name=f"{number}.tar.gz"))
        small.inputs.release(f"t{number}")
    await small.aclose()
    assert len(world.entries) == 1


async def test_what_comes_back_on_the_server_is_fetched_once(world: World):
    for second, marker in enumerate("aba"):
        url = put(world, archive(marker))
        os.utime(world.orch_file("final_model.tar.gz"), (1000 + second % 2, 1000 + second % 2))  # with its old ETag
        assert marker_of(await world.checkpoint(url=url)) == marker
    assert marker_of(await world.checkpoint(url=url)) == "a"
    assert world.statuses == [200, 200, 200, 304]


async def test_a_local_archive_is_read_for_its_digest_only_if_one_is_given(world: World):
    file = world.results / "77aa" / "final_model.tar.gz"
    file.parent.mkdir()
    file.write_bytes(archive())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    for keys, expected in (({}, ""), ({"sha256": digest}, digest)):
        await world.checkpoint(path=str(file), **keys)
        records = [json.loads((entry / "entry.json").read_text()) for entry in world.entries]
        assert [record["sha256"] for record in records] == [expected]
        world.inputs.release("t1")
        await world.cache.drop_unused()


async def test_a_local_file_that_is_no_archive_any_more_stays_where_it_is(
    world: World, monkeypatch: pytest.MonkeyPatch
):
    file = world.results / "77aa" / "final_model.tar.gz"
    file.parent.mkdir()
    file.write_bytes(archive())
    find = world.cache.find

    async def changed_meanwhile(wanted: Wanted) -> Pin | None:
        file.write_bytes(b"no archive any more")
        return await find(wanted)

    monkeypatch.setattr(world.cache, "find", changed_meanwhile)
    assert "no archive" in (await world.failure(checkpoint(path=str(file)))).message
    assert file.read_bytes() == b"no archive any more"
    assert world.entries == []
