"""Moments at which tasks used to be lost, ended twice, or taken for finished; each was seen to fail once."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3

import psutil
import pytest
from daemon_world import World
from event_log import Event
from waiting_until import wait_until


def test_a_worker_spares_the_engines_of_one_whose_id_begins_with_its_own(world: World):
    world.start("w-10")
    task = world.send({"taskType": "subject", "act": "obey"}, to="w-10")
    world.started(task)

    world.start("w-1")

    assert world.run(to="w-1").ok
    assert not world.events.ends(task)
    world.cancel(task)
    assert world.ended(task).reason == "cancelled"


@pytest.mark.parametrize("part", ["artifacts", "path"])
def test_a_nul_byte_in_a_name_is_refused_and_harms_no_other_task(busy_world: World, part: str):
    wanted = {"artifacts": ["a/\0b"]} if part == "artifacts" else {"destination": {"path": "a\0b"}}

    bad = busy_world.send({"taskType": "echo", "output": wanted})
    good = busy_world.send()

    end = busy_world.ended(bad)
    assert (end.ok, end.reason) == (False, "bad_spec")
    assert part in end.error
    assert busy_world.ended(good).ok
    busy_world.wait_status("IDLE")


@pytest.mark.parametrize("attempt", range(3))
def test_sigterm_into_a_burst_ends_every_task_once_and_the_process_too(world: World, attempt: int):
    daemon = world.start()
    padding = "x" * 20_000
    names = [world.send({"taskType": "echo", "padding": padding}, task_id=f"burst-{attempt}-{n}") for n in range(100)]

    assert daemon.stop() == 0

    ended = {name: len(world.events.ends(name)) for name in names}
    accepted = {name for name in names if world.redis.exists(f"task:{name}")}
    assert {name for name, count in ended.items() if count} == accepted
    assert max(ended.values()) <= 1
    world.may_stay_open |= set(names) - accepted  # still on their way when the subscription ended


def test_nobody_sees_an_idle_worker_that_does_not_listen_any_more(world: World):
    daemon = world.start()
    world.run({"taskType": "subject", "act": "stubborn"})  # its engine ignores SIGTERM, so the stop takes a while
    daemon.signal(signal.SIGTERM)

    def look() -> bool:
        with world.redis.pipeline(transaction=True) as both:
            both.hget("worker:w-1", "status")
            both.execute_command("PUBSUB", "NUMSUB", "tasks")
            status, (_, listeners) = both.execute()
        assert not (status == "IDLE" and listeners == 0), "IDLE, but deaf"
        return status is None

    wait_until(look, "it has unregistered")
    assert daemon.wait() == 0


def test_a_task_that_comes_again_before_its_first_end_is_said_keeps_the_worker_busy(world: World):
    world.start(TASK_MIN_TURNAROUND_MS="1500")
    name = world.send({"taskType": "subject", "act": 5})
    wait_until(lambda: _state_in_journal(world, name) == "failed", "its end is in the journal")
    world.send({"taskType": "subject", "act": "obey"}, task_id=name)
    world.started(name)
    assert world.ended(name).reason == "bad_spec"

    beats = _heartbeats(world)
    wait_until(lambda: len(_heartbeats(world)) >= len(beats) + 2, "two heartbeats have passed")
    assert {beat["status"] for beat in _heartbeats(world)[len(beats) :]} == {"RUNNING"}

    world.cancel(name)
    assert world.ended(name, count=2).reason == "cancelled"


def _heartbeats(world: World) -> list[Event]:
    return [event for event in world.events.on("workers.events") if event["type"] == "HEARTBEAT"]


def _state_in_journal(world: World, name: str) -> str | None:
    (journal,) = (world.folder / "results" / ".worker").glob("*/journal.sqlite3")
    with contextlib.closing(sqlite3.connect(journal)) as db:
        row = db.execute("SELECT state FROM tasks WHERE task_id = ?", (name,)).fetchone()
    return row[0] if row else None


def test_a_cancel_right_behind_its_task_counts(busy_world: World):
    name = "cancelled-at-once"
    envelope = {"task_id": name, "task": {"spec": {"taskType": "subject", "act": "obey"}}, "assigned_worker": "w-1"}
    with busy_world.redis.pipeline(transaction=True) as both:
        both.publish("tasks", json.dumps(envelope))
        both.publish("tasks.control", json.dumps({"type": "CANCEL", "task_id": name}))
        both.execute()
    busy_world.sent[name] += 1

    assert busy_world.ended(name).reason == "cancelled"


def test_an_engine_that_talks_without_a_task_costs_the_daemon_no_memory(busy_world: World):
    (daemon,) = busy_world.daemons
    process = psutil.Process(daemon.pid)
    before = process.memory_info().rss

    assert busy_world.run({"taskType": "subject", "act": "talking_thread"}).ok
    said = busy_world.folder / "results" / "said"
    wait_until(lambda: said.exists() and int(said.read_text() or 0) > 100, "it has said 100 MB")

    assert process.memory_info().rss - before < 60e6
