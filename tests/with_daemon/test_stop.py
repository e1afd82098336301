"""How the daemon ends: by a signal, idle or busy, patient or hurried; by SIGKILL; and what the next start does."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
import time

import psutil
import pytest
from daemon_process import DaemonProcess, tagged_below
from daemon_world import World
from waiting_until import wait_until


def starts_in_journal(daemon: DaemonProcess) -> int:
    """How often the one open task was started, as far as a crash would remember it (up to a second late)."""
    path = daemon.results / ".worker" / "w-1" / "journal.sqlite3"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
        return int(db.execute("SELECT max(starts) FROM tasks").fetchone()[0] or 0)


def subject(act: str, **fields: object) -> dict[str, object]:
    return {"taskType": "subject", "act": act, **fields}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_idle_worker_leaves_at_once(world: World, number: signal.Signals):
    daemon = world.start()
    daemon.signal(number)
    assert daemon.wait(5) == 0
    assert daemon.stderr == ""
    (farewell,) = world.events.on("workers.events", "UNREGISTER")
    assert farewell["worker_id"] == "w-1"


def test_a_running_task_may_finish(world: World):
    daemon = world.start()
    task_id = world.send(subject("sleep", seconds=1.0))
    world.progressed(task_id)
    assert daemon.stop() == 0
    assert world.ended(task_id).ok
    kinds = [e["type"] for _, e in world.events.events if e.get("type") in {"UNREGISTER", "TASK_SUCCEEDED"}]
    assert kinds == ["TASK_SUCCEEDED", "UNREGISTER"]


@pytest.mark.parametrize("act", ["hang", "hang_gil", "grandchild_hang"])
def test_a_task_that_takes_too_long_is_reported(world: World, act: str):
    daemon = world.start(SHUTDOWN_GRACE_SEC="0.3")
    task_id = world.send(subject(act))
    world.progressed(task_id)
    assert daemon.stop() == 0
    end = world.ended(task_id)
    assert (end.ok, end.reason, end.event["payload"]["retryable"]) == (False, "worker_shutdown", True)
    assert end.result["reason"] == "worker_shutdown"
    assert not tagged_below(world.folder)


def test_waiting_tasks_are_given_back_at_once(world: World):
    daemon = world.start()
    running = world.send(subject("obey"))
    waiting = [world.send() for _ in range(3)]
    world.progressed(running)
    for task_id in waiting:
        world.hash_of(task_id, "QUEUED")
    daemon.signal(signal.SIGTERM)
    for task_id in waiting:
        assert world.ended(task_id).reason == "worker_shutdown"
    assert daemon.running
    world.cancel(running)
    daemon.signal(signal.SIGTERM)
    assert daemon.wait() == 0
    assert not world.ended(running).ok


def test_a_second_signal_hurries(world: World):
    daemon = world.start(SHUTDOWN_GRACE_SEC="600")
    task_id = world.send(subject("hang"))
    world.progressed(task_id)
    daemon.signal(signal.SIGTERM)
    wait_until(lambda: daemon.logged("shutdown"), "it is shutting down")
    daemon.signal(signal.SIGTERM)
    assert daemon.wait(8) == 0
    assert world.ended(task_id).reason == "worker_shutdown"


@pytest.mark.parametrize("act", ["hang", "hang_gil"])
def test_sigkill_leaves_no_engine(world: World, act: str):
    daemon = world.start()
    task_id = world.send(subject(act))
    world.may_stay_open.add(task_id)
    world.progressed(task_id)
    assert tagged_below(world.folder)
    world.kill(daemon)
    wait_until(lambda: not tagged_below(world.folder), "no engine is left", within_sec=5)


def test_what_escaped_from_a_killed_daemon_is_ended_by_the_next(world: World):
    first = world.start()
    end = world.run(subject("grandchild"))
    left = int((end.folder / "artifacts" / "grandchild").read_text())
    world.kill(first)
    world.start()
    wait_until(lambda: not psutil.pid_exists(left), "the grandchild is gone")


def test_a_task_that_ends_the_daemon_again_and_again_is_given_up(world: World):
    daemon = world.start()
    task_id = world.send(subject("hang"))
    for round_number in range(1, 4):
        wait_until(lambda: starts_in_journal(daemon) == round_number, "the start is in the journal")  # noqa: B023 - used at once
        world.kill(daemon)
        daemon = world.start(idle=False)
    end = world.ended(task_id)
    assert (end.ok, end.reason) == (False, "worker_restarted")
    assert "3 times" in end.error
    world.wait_status("IDLE")
    world.unattended.clear()
    assert world.run().ok


def test_a_worker_without_a_pinned_id_takes_over_the_work_of_a_dead_one(world: World):
    first = world.start("", idle=False)
    name = str(wait_until(lambda: next(iter(world.redis.smembers("workers:ids")), None), "it is registered"))
    world.wait_status("IDLE", name)
    task_id = world.send(subject("sleep", seconds=0.5), to=name)
    world.progressed(task_id)
    first.kill()
    second = world.start("", idle=False)
    end = world.ended(task_id)
    assert end.ok
    assert end.event["worker_id"] == name
    world.wait_status("IDLE", name)
    assert second.logged("ready", worker_id=name)


def test_an_end_that_nobody_heard_is_announced_at_the_next_start(world: World):
    daemon = world.start()
    task_id = world.send(subject("sleep", seconds=0.5))
    world.progressed(task_id)
    world.server.stop()
    wait_until(lambda: daemon.logged("task_end", task_id=task_id), "the task ends while the broker is away")
    assert daemon.stop() == 0
    world.restart_server()
    world.events.wait_listening()
    world.start()
    assert world.ended(task_id).ok
    world.run()
    assert len(world.events.ends(task_id)) == 1


def test_it_stops_in_time_when_the_broker_hangs(world: World):
    daemon = world.start()
    assert world.server._process is not None
    server = psutil.Process(world.server._process.pid)
    server.suspend()
    try:
        began = time.monotonic()
        assert daemon.stop(25) == 0
        assert time.monotonic() - began < 20
    finally:
        server.resume()
        world.unattended.add("w-1")
