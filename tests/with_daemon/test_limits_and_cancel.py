"""Cancel, time limits, progress and what a task's hash shows meanwhile."""

from __future__ import annotations

from pathlib import Path
from time import monotonic

import pytest
from daemon_world import World
from waiting_until import wait_until


def subject(act: str, **fields: object) -> dict[str, object]:
    return {"taskType": "subject", "act": act, **fields}


def engine_pid(world: World) -> int:
    return int(world.run(subject("fine")).result["pid"])


def test_a_running_task_that_obeys_is_cancelled_and_its_engine_stays(busy_world: World):
    before = engine_pid(busy_world)
    task_id = busy_world.send(subject("obey"))
    busy_world.progressed(task_id)
    busy_world.cancel(task_id)
    end = busy_world.ended(task_id)
    assert (end.ok, end.reason) == (False, "cancelled")
    assert end.result["reason"] == "cancelled"
    assert busy_world.hash_of(task_id, "FAILED")["reason"] == "cancelled"
    assert engine_pid(busy_world) == before


@pytest.mark.parametrize("act", ["hang", "hang_gil", "signal_handler"])
def test_a_running_task_that_does_not_obey_is_ended_with_its_engine(busy_world: World, act: str):
    before = engine_pid(busy_world)
    task_id = busy_world.send(subject(act))
    busy_world.progressed(task_id)
    busy_world.cancel(task_id)
    assert busy_world.ended(task_id).reason == "cancelled"
    assert engine_pid(busy_world) != before


def test_a_waiting_task_is_cancelled_without_running(busy_world: World):
    running = busy_world.send(subject("obey"))
    waiting = busy_world.send(subject("fine"))
    busy_world.hash_of(waiting, "QUEUED")
    busy_world.cancel(waiting)
    end = busy_world.ended(waiting)
    assert end.reason == "cancelled"
    assert [event["type"] for event in busy_world.events.of_task(waiting)] == ["TASK_FAILED"]
    busy_world.cancel(running)
    assert busy_world.ended(running).reason == "cancelled"


def test_a_cancel_of_an_unknown_task_changes_nothing(busy_world: World):
    task_id = busy_world.send(subject("sleep", seconds=0.3))
    busy_world.progressed(task_id)
    busy_world.cancel("another")
    assert busy_world.ended(task_id).ok


def test_a_task_that_was_cancelled_may_be_sent_again(busy_world: World):
    task_id = busy_world.send(subject("obey"))
    busy_world.progressed(task_id)
    busy_world.cancel(task_id)
    busy_world.ended(task_id)
    busy_world.send(subject("fine"), task_id=task_id)
    assert busy_world.ended(task_id, count=2).ok


def test_the_operators_limits_apply_where_a_task_sets_none(world: World):
    # Silence counts from the start of the engine, which takes a while on a busy machine.
    world.start(WORKER_TASK_TIMEOUT_SEC="3", WORKER_NO_PROGRESS_TIMEOUT_SEC="1.5", WORKER_CANCEL_GRACE_SEC="0.2")
    silent = world.run(subject("hang"))
    assert (silent.reason, "1.5 s" in silent.error) == ("no_progress", True)
    chatty = world.run(subject("chatty", seconds=600))
    assert (chatty.reason, "3 s" in chatty.error) == ("timeout", True)
    assert world.run(subject("chatty", seconds=4, timeoutSec=30)).ok


def test_a_task_that_obeys_at_its_limit_keeps_its_engine(busy_world: World):
    before = engine_pid(busy_world)
    end = busy_world.run(subject("obey", timeoutSec=0.4))
    assert (end.ok, end.reason) == (False, "timeout")
    assert engine_pid(busy_world) == before


def test_progress_is_published_and_shown(busy_world: World):
    task_id = busy_world.send(subject("progress", count=4, seconds=0.3))
    shown = wait_until(
        lambda: busy_world.redis.hget(f"task:{task_id}", "progress_message") == "step 2", "the second step is shown"
    )
    assert shown
    running = busy_world.hash_of(task_id, "RUNNING")
    assert running["worker_id"] == "w-1"
    assert running["task_type"] == "subject"
    assert (running["progress_total"], running["progress_unit"]) == ("4", "steps")
    assert running["started_at"] >= running["accepted_at"]
    end = busy_world.ended(task_id)
    assert end.ok
    news = [e["payload"] for e in busy_world.events.of_task(task_id) if e["type"] == "TASK_PROGRESS"]
    assert [each["done"] for each in news][-1] == 4
    assert news[-1] | {"message": "step 4", "total": 4, "unit": "steps", "metrics": {"loss": 0.5}} == news[-1]
    done = busy_world.hash_of(task_id, "SUCCEEDED")
    assert done["finished_at"] > done["started_at"]
    assert Path(done["result_path"]) == end.folder / "responses.json"
    assert 86_000 < busy_world.redis.ttl(f"task:{task_id}") <= 86_400
    assert end.result["warnings"] == ["one warning"]
    (daemon,) = busy_world.daemons
    assert daemon.logged("task_log", task_id=task_id, level="warning", event="the loss is high")


def test_a_result_says_how_long_each_part_took(busy_world: World):
    end = busy_world.run(subject("sleep", seconds=0.3))
    timings = end.result["timings"]
    assert 0.3 <= timings["run_sec"] < 5
    assert timings["load_sec"] >= 0
    assert timings["queue_sec"] >= 0
    assert timings["engine"] in {"cold", "warm"}
    assert end.event["payload"]["engine"] == timings["engine"]
    assert end.event["payload"]["runtime_sec"] >= 0.3


def test_no_end_is_announced_sooner_than_200_ms_after_receipt(busy_world: World):
    busy_world.run()
    began = monotonic()
    busy_world.run()
    assert monotonic() - began >= 0.2
