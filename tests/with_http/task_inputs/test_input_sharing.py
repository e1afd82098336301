"""Inputs fetched ahead, and by several tasks, children or daemons at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from input_world import NAME, World, archive, checkpoint, marker_of, put
from waiting_until import wait_until


def in_flight(world: World) -> Callable[[], bool]:
    return lambda: len(world.orch.seen("download")) > 0


async def begun(world: World) -> None:
    await asyncio.to_thread(wait_until, in_flight(world), "the download has begun")


async def test_a_prefetch_is_joined(world: World):
    world.orch.hang("download")
    task = world.task(checkpoint(url=put(world, archive())))
    world.inputs.prefetch(task)
    await begun(world)
    fetching = asyncio.create_task(world.inputs.fetch(task, world.heard.append))
    await asyncio.sleep(0)
    world.orch.release()
    order = await fetching
    assert marker_of(order.inputs[NAME]) == "fetched"
    assert len(world.statuses) == 1
    assert {progress.name for progress in world.heard} == {NAME}
    assert world.heard[-1].done_bytes == world.heard[-1].total_bytes


async def test_a_prefetch_that_is_over_needs_no_second_look(world: World):
    task = world.task(checkpoint(url=put(world, archive())))
    world.inputs.prefetch(task)
    await asyncio.to_thread(
        wait_until, lambda: world.entries if (world.results / ".cache").exists() else [], "it is here"
    )
    order = await world.inputs.fetch(task, world.heard.append)
    assert marker_of(order.inputs[NAME]) == "fetched"
    assert world.statuses == [200]


async def test_a_failed_prefetch_is_forgotten(world: World):
    url = world.orch.file_url("77aa", "final_model.tar.gz")
    task = world.task(checkpoint(url=url))
    world.inputs.prefetch(task)
    await asyncio.to_thread(wait_until, lambda: world.statuses == [404], "it has failed")
    put(world, archive())
    order = await world.inputs.fetch(task, world.heard.append)
    assert marker_of(order.inputs[NAME]) == "fetched"


async def test_a_failed_prefetch_is_not_repeated(world: World):
    task = world.task(checkpoint(url=world.orch.file_url("77aa", "final_model.tar.gz")), task_id="t2")

    async def prefetched() -> int:
        world.inputs.prefetch(task)
        for name in ("1", "2", "3"):  # it is asked for and over before these are
            await world.failure(checkpoint(url=world.orch.file_url("77aa", name)))
        return sum(call.path.endswith("final_model.tar.gz") for call in world.orch.seen("download"))

    assert await prefetched() == 1
    assert await prefetched() == 1
    world.inputs.release("t2")
    assert await prefetched() == 2


async def test_one_prefetch_at_a_time(world: World):
    world.orch.hang("download")
    world.inputs.prefetch(world.task(checkpoint(url=put(world, archive())), task_id="t1"))
    world.inputs.prefetch(world.task(checkpoint(url=put(world, archive(), name="b.tgz")), task_id="t2"))
    await begun(world)
    world.orch.release()
    assert await world.checkpoint(task_id="t1", url=world.orch.file_url("77aa", "final_model.tar.gz"))
    assert [call.path.rpartition("/")[2] for call in world.orch.seen("download")] == ["final_model.tar.gz"]


@pytest.mark.parametrize("way", ["forget", "close", "cancelled fetch"])
async def test_a_prefetch_can_be_ended(world: World, way: str):
    world.orch.hang("download")
    task = world.task(checkpoint(url=put(world, archive())))
    world.inputs.prefetch(task)
    await begun(world)
    if way == "forget":
        world.inputs.release("t1")
    elif way == "cancelled fetch":
        fetching = asyncio.create_task(world.inputs.fetch(task, world.heard.append))
        await asyncio.sleep(0)
        fetching.cancel()
        with pytest.raises(asyncio.CancelledError):
            await fetching
    else:
        await world.inputs.close()
    await asyncio.to_thread(wait_until, lambda: not world.leftovers, "nothing is left of it")
    world.orch.release()
    later = world.again()
    assert marker_of(await later.checkpoint(url=put(world, archive()))) == "fetched"
    await later.aclose()


async def test_equal_requests_of_children_are_fetched_once(world: World):
    request = checkpoint(url=put(world, archive()))
    task = world.task(
        request, children={"c1": request, "c2": checkpoint(url=put(world, archive("other"), name="o.tgz"))}
    )
    order = await world.inputs.fetch(task, world.heard.append)
    assert world.statuses == [200, 200]
    assert [child.task_id for child in order.children] == ["c1", "c2"]
    assert order.children[0].inputs == order.inputs
    assert marker_of(order.children[1].inputs[NAME]) == "other"


async def test_two_tasks_share_one_download(world: World):
    world.orch.hang("download")
    request = checkpoint(url=put(world, archive()))
    world.inputs.prefetch(world.task(request, task_id="t2"))
    await begun(world)
    fetching = asyncio.create_task(world.checkpoint(url=request.url))
    await asyncio.sleep(0)
    world.orch.release()
    path = await fetching
    assert await world.checkpoint(task_id="t2", url=request.url) == path
    assert len(world.statuses) == 1


async def test_two_daemons_fetch_one_file_once(world: World):
    other = world.again()
    world.orch.hang("download")
    url = put(world, archive())
    first = asyncio.create_task(world.checkpoint(url=url))
    await begun(world)
    second = asyncio.create_task(other.checkpoint(url=url))
    world.orch.release()
    assert await first == await second
    assert world.statuses == [200, 304]
    await other.aclose()


async def test_a_cancelled_fetch_ends_its_download(world: World):
    world.orch.hang("download")
    fetching = asyncio.create_task(world.checkpoint(url=put(world, archive())))
    await begun(world)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    assert world.leftovers == []
    await asyncio.to_thread(wait_until, lambda: world.orch.seen("download")[0].done, "the connection is closed")
    world.orch.release()


async def test_a_cancelled_fetch_leaves_a_shared_download_alone(world: World):
    world.orch.hang("download")
    request = checkpoint(url=put(world, archive()))
    ahead = world.task(request, task_id="t2")
    world.inputs.prefetch(ahead)
    await begun(world)
    fetching = asyncio.create_task(world.checkpoint(url=request.url))
    await asyncio.sleep(0)
    fetching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await fetching
    world.orch.release()
    order = await world.inputs.fetch(ahead, world.heard.append)
    assert marker_of(order.inputs[NAME]) == "fetched"
    assert len(world.statuses) == 1
