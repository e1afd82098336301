"""Engines stay warm by key, are replaced by another key, and end when nobody needs them."""

from __future__ import annotations

import psutil
from daemon_world import Json, World
from waiting_until import wait_until


def loading(weights: str, **fields: object) -> Json:
    return {"taskType": "loading", "weights": weights, **fields}


def test_the_second_task_of_a_key_skips_the_load(world: World):
    world.start()
    first = world.run(loading("small", load_sec=0.4))
    second = world.run(loading("small", load_sec=0.4))
    assert (first.result["loaded"], first.result["runs"]) == (["small"], 1)
    assert (second.result["loaded"], second.result["runs"]) == (["small"], 2)
    assert second.result["pid"] == first.result["pid"]
    assert first.result["timings"]["engine"] == "cold"
    assert first.result["timings"]["load_sec"] >= 0.4
    assert second.result["timings"]["engine"] == "warm"
    assert second.result["timings"]["load_sec"] == 0
    assert first.event["payload"]["engine"] == "cold"
    assert second.event["payload"]["engine"] == "warm"
    assert world.hash_of(second.event["task_id"], "SUCCEEDED")["engine"] == "warm"


def test_another_key_replaces_the_engine(world: World):
    daemon = world.start()
    first = world.run(loading("small"))
    second = world.run(loading("large"))
    assert second.result["timings"]["engine"] == "cold"
    assert second.result["loaded"] == ["large"]
    assert not psutil.pid_exists(first.result["pid"])
    assert daemon.engines() == [second.result["pid"]]
    third = world.run(loading("small"))
    assert third.result["timings"]["engine"] == "cold"
    assert daemon.engines() == [third.result["pid"]]


def test_waiting_tasks_of_the_loaded_model_come_first(world: World):
    world.start()
    first = world.send(loading("small", run_sec=1.0))
    world.progressed(first)
    other = world.send(loading("large"))
    late = world.send(loading("small"))
    assert all(world.ended(task_id).ok for task_id in (first, other, late))
    started = [event["task_id"] for event in world.events.on("tasks.events", "TASK_STARTED")]
    assert started == [first, late, other]


def test_the_order_of_arrival_can_be_kept(world: World):
    world.start(WORKER_MAX_QUEUE_SKIPS="0")
    first = world.send(loading("small", run_sec=1.0))
    world.progressed(first)
    others = [world.send(loading("large")), world.send(loading("small"))]
    assert all(world.ended(task_id).ok for task_id in (first, *others))
    started = [event["task_id"] for event in world.events.on("tasks.events", "TASK_STARTED")]
    assert started == [first, *others]


def test_equal_keys_of_different_kinds_are_different_engines(world: World):
    world.start()
    first = world.run(loading("small"))
    other = world.run({"taskType": "second-loading", "weights": "small"})
    assert other.result["timings"]["engine"] == "cold"
    assert other.result["pid"] != first.result["pid"]


def test_an_engine_that_uses_no_accelerator_lives_beside_the_others(world: World):
    daemon = world.start()
    first = world.run(loading("small"))
    assert world.run().ok
    assert world.run(loading("small")).result["timings"]["engine"] == "warm"
    assert len(daemon.engines()) == 2
    assert first.result["pid"] in daemon.engines()


def test_an_idle_engine_ends(world: World):
    daemon = world.start(EXECUTOR_IDLE_TTL_SEC="0.5")
    first = world.run(loading("small"))
    wait_until(lambda: not psutil.pid_exists(first.result["pid"]), "the idle engine has ended", within_sec=5)
    assert daemon.logged("engine_idle")
    again = world.run(loading("small", run_sec=1.0))
    assert again.result["timings"]["engine"] == "cold"
    assert again.result["runs"] == 1


def test_a_load_that_fails_leaves_no_engine(world: World):
    daemon = world.start()
    end = world.run(loading("none", fail_load=True))
    assert (end.ok, end.reason) == (False, "model_load")
    assert "spec.weights is 'none'" in end.error
    wait_until(lambda: not daemon.engines(), "the engine has ended")
    good = world.run(loading("none"))
    assert good.result["timings"]["engine"] == "cold"


def test_a_cancel_is_heard_while_loading(world: World):
    daemon = world.start(WORKER_CANCEL_GRACE_SEC="0.2")
    task_id = world.send(loading("slow", load_sec=600))
    world.progressed(task_id)
    world.cancel(task_id)
    assert world.ended(task_id).reason == "cancelled"
    assert not daemon.engines()


def test_an_engine_that_dies_between_tasks_is_replaced(world: World):
    world.start()
    first = world.run(loading("small"))
    psutil.Process(first.result["pid"]).kill()
    wait_until(lambda: not psutil.pid_exists(first.result["pid"]), "the engine is dead")
    again = world.run(loading("small"))
    assert again.ok
    assert again.result["timings"]["engine"] == "cold"
