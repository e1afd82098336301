"""Several queued tasks run at once in one engine process, where its executor can do that."""

from __future__ import annotations

import contextlib
import signal
import sqlite3
from pathlib import Path

import psutil
import pytest
from daemon_process import DaemonProcess, tagged_below
from daemon_world import Json, World
from waiting_until import wait_until


def batching(**fields: object) -> Json:
    return {"taskType": "batching", **fields}


@pytest.fixture
def gate(world: World) -> Path:
    """A file that waiting tasks wait for."""
    return world.folder / "gate"


def inside(world: World, **fields: object) -> str:
    """Send a task and wait until its run has begun."""
    task_id = world.send(batching(**fields))
    is_inside(world, task_id)
    return task_id


def is_inside(world: World, task_id: str, *, times: int = 1) -> None:
    (*_, daemon) = world.daemons
    printed = f"{task_id} is inside"
    wait_until(lambda: len(daemon.logged("engine_output", event=printed)) >= times, f"{task_id} is inside the engine")


def said_of(world: World, task_id: str) -> set[str]:
    events = world.events.of_task(task_id)
    return {event["payload"]["message"] for event in events if event["type"] == "TASK_PROGRESS"}


def types_of(world: World, task_id: str) -> list[str]:
    return [event["type"] for event in world.events.of_task(task_id) if event["type"] != "TASK_PROGRESS"]


def queued(world: World, *task_ids: str) -> None:
    """Wait until the daemon has accepted tasks."""
    for task_id in task_ids:
        world.hash_of(task_id)


def only_engine(daemon: DaemonProcess) -> int:
    (pid,) = daemon.engines()
    return pid


def starts_of(world: World, task_id: str) -> int:
    """How many starts the journal counts against a task."""
    file = world.folder / "results" / ".worker" / "w-1" / "journal.sqlite3"
    with contextlib.closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as journal:
        found = journal.execute("SELECT starts FROM tasks WHERE task_id = ?", (task_id,)).fetchone()
    return int(found[0])


def test_queued_tasks_run_together_up_to_eight_and_each_has_what_is_its_own(world: World, gate: Path):
    world.start()
    first = inside(world, until=str(gate))
    others = [world.send(batching(until=str(gate))) for _ in range(10)]
    queued(world, *others)
    for task_id in others[:7]:
        is_inside(world, task_id)
    assert [types_of(world, task_id) for task_id in others[7:]] == [[]] * 3

    gate.touch()

    for task_id in (first, *others):
        end = world.ended(task_id)
        assert end.ok
        assert end.result["own"] == task_id
        assert end.result["most"] <= 8
        assert end.result["loads"] == 1
        assert f"{task_id} is inside" in (end.folder / "logs" / "engine.log").read_text()
        assert types_of(world, task_id) == ["TASK_STARTED", "TASK_SUCCEEDED"]
        assert said_of(world, task_id) == {"loading" if task_id == first else f"inside {task_id}"}
    assert max(world.ended(task_id).result["most"] for task_id in others) == 8
    assert world.ended(first).result["timings"]["engine"] == "cold"
    assert world.ended(others[0]).result["timings"]["engine"] == "warm"
    world.wait_status("IDLE")


def test_the_operator_sets_how_many_run_together(world: World, gate: Path):
    world.start(WORKER_MAX_BATCHED_TASKS="2")
    tasks = [inside(world, until=str(gate)) for _ in range(2)]
    third = world.send(batching())
    queued(world, third)
    gate.touch()
    assert {world.ended(task_id).result["most"] for task_id in (*tasks, third)} == {2}


def test_a_task_that_waits_for_its_model_is_loaded_once_for_all(world: World, gate: Path):
    world.start()
    first = world.send(batching(load_until=str(gate)))
    world.progressed(first)
    second = world.send(batching())
    world.started(second)
    gate.touch()
    ends = [world.ended(task_id) for task_id in (first, second)]
    assert [end.result["loads"] for end in ends] == [1, 1]
    assert [end.result["timings"]["engine"] for end in ends] == ["cold", "cold"]
    assert ends[0].result["timings"]["load_sec"] > ends[1].result["timings"]["load_sec"] > 0


def test_who_waits_for_a_load_that_fails_gets_its_failure(world: World, gate: Path):
    world.start()
    first = world.send(batching(load="raise", load_until=str(gate)))
    world.progressed(first)
    second = world.send(batching())
    world.started(second)
    gate.touch()
    ends = [world.ended(task_id) for task_id in (first, second)]
    assert [end.reason for end in ends] == ["model_load", "model_load"]
    assert world.run(batching()).ok


def test_who_waits_for_a_load_may_be_cancelled_alone(world: World, gate: Path):
    world.start()
    first = world.send(batching(load_until=str(gate)))
    world.progressed(first)
    second = world.send(batching())
    world.started(second)
    world.cancel(second)
    assert world.ended(second).reason == "cancelled"
    gate.touch()
    assert world.ended(first).ok


def test_a_bad_spec_ends_the_load_of_one_and_the_next_loads_in_the_same_engine(world: World, gate: Path):
    daemon = world.start()
    bad = world.send(batching(load="bad_spec", load_until=str(gate)))
    world.progressed(bad)
    others = [world.send(batching()) for _ in range(2)]
    for task_id in others:
        world.started(task_id)
    pid = only_engine(daemon)
    gate.touch()
    assert world.ended(bad).reason == "bad_spec"
    for task_id in others:
        end = world.ended(task_id)
        assert (end.result["loads"], end.result["pid"]) == (2, pid)
    assert world.run(batching()).result["pid"] == pid


@pytest.mark.parametrize("how", ["cancelled", "timeout"])
def test_who_loads_may_be_stopped_and_the_others_have_what_it_loads(world: World, gate: Path, how: str):
    daemon = world.start(WORKER_CANCEL_GRACE_SEC="1")
    limit = {"timeoutSec": 1} if how == "timeout" else {}
    first = world.send(batching(load_until=str(gate), **limit))
    world.progressed(first)
    others = [world.send(batching()) for _ in range(7)]
    for task_id in others:
        world.started(task_id)
    pid = only_engine(daemon)
    if how == "cancelled":
        world.cancel(first)
    assert world.ended(first).reason == how
    gate.touch()
    assert [world.ended(task_id).result["pid"] for task_id in others] == [pid] * 7
    assert world.ended(others[0]).result["loads"] == 1


def test_a_load_is_cancelled_when_all_that_wait_for_it_are(world: World):
    daemon = world.start()
    tasks = [world.send(batching(load="obedient"))]
    world.progressed(tasks[0])
    tasks.append(world.send(batching()))
    world.started(tasks[1])
    pid = only_engine(daemon)
    for task_id in tasks:
        world.cancel(task_id)
    assert [world.ended(task_id).reason for task_id in tasks] == ["cancelled", "cancelled"]
    assert world.run(batching()).ok
    assert not psutil.pid_exists(pid)


def test_a_load_that_does_not_obey_is_ended_when_nobody_else_waits_for_it(world: World, gate: Path):
    daemon = world.start(WORKER_CANCEL_GRACE_SEC="0.3")
    first = world.send(batching(load_until=str(gate)))
    world.progressed(first)
    pid = only_engine(daemon)
    world.cancel(first)
    assert world.ended(first).reason == "cancelled"
    assert world.run(batching()).ok
    assert not psutil.pid_exists(pid)


@pytest.mark.parametrize("how", ["talk", "report"])
def test_the_signs_of_life_of_a_load_are_for_all_that_wait(world: World, gate: Path, how: str):
    daemon = world.start()
    first = world.send(batching(load=how, load_until=str(gate), noProgressTimeoutSec=1))
    world.progressed(first)
    second = world.send(batching(noProgressTimeoutSec=1))
    world.started(second)
    if how == "talk":
        printed = f"{first} loads, step 20"
        wait_until(lambda: daemon.logged("engine_output", event=printed), "the load takes longer than the limit")
    else:
        wait_until(lambda: float(world.hash_of(second).get("progress_done") or 0) >= 20, "the load takes long")
    gate.touch()
    assert all(world.ended(task_id).ok for task_id in (first, second))


def test_what_others_print_is_no_sign_of_life(world: World, gate: Path):
    world.start()
    talking = inside(world, act="talk", until=str(gate))
    hung = world.send(batching(until=str(gate), noProgressTimeoutSec=1))
    assert world.ended(hung).reason == "no_progress"
    gate.touch()
    assert world.ended(talking).ok
    gate.unlink()
    alone = inside(world, act="talk", until=str(gate), noProgressTimeoutSec=1)
    wait_until(
        lambda: (world.folder / "results" / alone / "logs" / "engine.log").read_text().count("talks") > 20, "it talks"
    )
    gate.touch()
    assert world.ended(alone).ok


def test_a_task_of_another_model_waits_until_none_of_the_first_runs(world: World, gate: Path):
    daemon = world.start()
    tasks = [inside(world, until=str(gate)) for _ in range(2)]
    pid = only_engine(daemon)
    other = world.send(batching(model="large"))
    late = inside(world, until=str(gate))
    assert types_of(world, other) == []
    gate.touch()
    assert all(world.ended(task_id).ok for task_id in (*tasks, late))
    assert world.ended(other).ok
    assert not psutil.pid_exists(pid)


def test_a_task_is_overtaken_only_so_often(world: World, gate: Path):
    world.start(WORKER_MAX_QUEUE_SKIPS="2")
    first = inside(world, until=str(gate))
    other = world.send(batching(model="large"))
    queued(world, other)
    joined = [inside(world, until=str(gate)) for _ in range(2)]
    late = world.send(batching(filler="x" * 100_000))  # too large to be kept prepared while it waits
    queued(world, late)
    gate.touch()
    assert all(world.ended(task_id).ok for task_id in (first, *joined, other, late))
    started = [event["task_id"] for event in world.events.on("tasks.events", "TASK_STARTED")]
    assert started == [first, *joined, other, late]


def test_large_tasks_join_too(world: World, gate: Path):
    world.start()
    first = inside(world, until=str(gate))
    second = inside(world, until=str(gate), filler="x" * 100_000)
    gate.touch()
    assert world.ended(first).ok
    assert world.ended(second).result["most"] == 2


def test_a_cancel_stops_one_and_leaves_the_others(world: World, gate: Path):
    daemon = world.start()
    tasks = [inside(world, until=str(gate)) for _ in range(3)]
    pid = only_engine(daemon)
    world.cancel(tasks[1])
    assert world.ended(tasks[1]).reason == "cancelled"
    gate.touch()
    assert world.ended(tasks[0]).result["pid"] == pid
    assert world.ended(tasks[2]).result["pid"] == pid


def test_a_failure_of_one_leaves_the_others(world: World, gate: Path):
    world.start()
    first = inside(world, until=str(gate))
    end = world.run(batching(act="raise"))
    assert end.reason == "executor_error"
    assert "raises" in end.error
    gate.touch()
    assert world.ended(first).ok


def test_who_shares_an_engine_with_one_that_does_not_obey_runs_again(world: World, gate: Path):
    daemon = world.start(WORKER_CANCEL_GRACE_SEC="0.3")
    others = [inside(world, until=str(gate)), inside(world, until=str(gate), filler="x" * 100_000)]
    pid = only_engine(daemon)
    deaf = inside(world, act="deaf")
    world.cancel(deaf)
    assert world.ended(deaf).reason == "cancelled"
    for task_id in others:
        is_inside(world, task_id, times=2)
        wait_until(lambda: starts_of(world, task_id) == 1, "one start counts")  # noqa: B023 - used at once
        assert world.hash_of(task_id)["status"] == "RUNNING"
    gate.touch()
    for task_id in others:
        end = world.ended(task_id)
        assert end.result["pid"] != pid
        assert types_of(world, task_id) == ["TASK_STARTED", "TASK_STARTED", "TASK_SUCCEEDED"]
    assert len(daemon.logged("task_put_back", by=deaf)) == 2


def test_who_runs_again_has_its_inputs_still(world: World, gate: Path):
    world.start(WORKER_CANCEL_GRACE_SEC="0.3")
    rows = world.folder / "results" / "rows.jsonl"
    rows.write_text('{"n": 1}\n')
    first = inside(world, until=str(gate), jsonl={"path": str(rows)})
    rows.unlink()  # nobody may look for it again
    deaf = inside(world, act="deaf")
    world.cancel(deaf)
    is_inside(world, first, times=2)
    gate.touch()
    assert world.ended(first).result["inputs"] == {"jsonl": str(rows)}


def test_who_waits_again_comes_first_and_may_be_cancelled(world: World, gate: Path):
    world.start(WORKER_CANCEL_GRACE_SEC="0.3", WORKER_MAX_BATCHED_TASKS="2")
    first = inside(world, until=str(gate))
    deaf = inside(world, act="deaf")
    waiting = world.send(batching(until=str(gate)))
    queued(world, waiting)
    world.cancel(deaf)
    assert world.ended(deaf).reason == "cancelled"
    is_inside(world, first, times=2)
    is_inside(world, waiting)
    started = [event["task_id"] for event in world.events.on("tasks.events", "TASK_STARTED")]
    assert started == [first, deaf, first, waiting]
    world.cancel(first)
    assert world.ended(first).reason == "cancelled"
    gate.touch()
    assert world.ended(waiting).ok


def test_a_task_runs_again_only_so_often(world: World, gate: Path):
    world.start(WORKER_CANCEL_GRACE_SEC="0.2")
    patient = inside(world, until=str(gate))
    for times in (2, 3, 4):
        deaf = inside(world, act="deaf")
        world.cancel(deaf)
        assert world.ended(deaf).reason == "cancelled"
        if times < 4:
            is_inside(world, patient, times=times)
    end = world.ended(patient)
    assert (end.reason, end.event["payload"]["retryable"]) == ("engine_crash", True)
    assert f"because of task {deaf}" in end.error
    assert types_of(world, patient) == ["TASK_STARTED"] * 3 + ["TASK_FAILED"]
    assert world.run(batching()).result["loads"] == 1


def test_nobody_waits_again_after_sigterm(world: World, gate: Path):
    daemon = world.start(WORKER_CANCEL_GRACE_SEC="0.2")
    innocent = inside(world, until=str(gate))
    deaf = inside(world, act="deaf", timeoutSec=2)
    daemon.signal(signal.SIGTERM)
    assert world.ended(deaf).reason == "timeout"
    assert world.ended(innocent).reason == "worker_shutdown"
    assert daemon.wait() == 0


def test_who_is_in_a_broken_engine_may_end_before_it_is_replaced(world: World, gate: Path):
    daemon = world.start()
    first = inside(world, until=str(gate))
    pid = only_engine(daemon)
    broken = world.send(batching(act="no_memory"))
    is_inside(world, broken)
    gate.touch()
    assert world.ended(first).result["pid"] == pid
    assert world.ended(broken).reason == "host_oom"
    assert world.run(batching()).result["pid"] != pid
    assert not psutil.pid_exists(pid)


def test_who_stays_in_a_broken_engine_runs_again_in_the_next(world: World, gate: Path):
    daemon = world.start()
    first = inside(world, until=str(gate))
    pid = only_engine(daemon)
    broken = world.send(batching(act="no_memory"))
    assert world.ended(broken).reason == "host_oom"
    is_inside(world, first, times=2)
    gate.touch()
    assert world.ended(first).result["pid"] != pid


@pytest.mark.parametrize(("act", "words"), [("kill", "SIGKILL"), ("exit", "status 3")])
def test_the_death_of_the_engine_ends_each_task_in_it_once(world: World, gate: Path, act: str, words: str):
    daemon = world.start()
    tasks = [inside(world, until=str(gate)) for _ in range(4)]
    pid = only_engine(daemon)
    fatal = world.send(batching(act=act))
    waiting = world.send(batching(model="large"))
    for task_id in (*tasks, fatal):
        end = world.ended(task_id)
        assert end.reason == "engine_crash"
        assert words in end.error
        assert types_of(world, task_id) == ["TASK_STARTED", "TASK_FAILED"]
    assert world.ended(waiting).ok
    assert not psutil.pid_exists(pid)
    assert len(daemon.engines()) == 1


def test_running_tasks_may_finish_after_sigterm(world: World, gate: Path):
    daemon = world.start()
    tasks = [inside(world, until=str(gate)) for _ in range(3)]
    waiting = world.send(batching(model="large"))
    queued(world, waiting)
    daemon.signal(signal.SIGTERM)
    assert world.ended(waiting).reason == "worker_shutdown"
    gate.touch()
    assert daemon.wait() == 0
    assert all(world.ended(task_id).ok for task_id in tasks)


def test_tasks_that_take_too_long_after_sigterm_are_all_reported(world: World, gate: Path):
    daemon = world.start(SHUTDOWN_GRACE_SEC="0.3")
    tasks = [inside(world, until=str(gate)), inside(world, act="deaf"), inside(world, until=str(gate))]
    assert daemon.stop() == 0
    assert [world.ended(task_id).reason for task_id in tasks] == ["worker_shutdown"] * 3
    assert not tagged_below(world.folder)


def test_all_run_again_after_the_daemon_was_killed(world: World, gate: Path):
    daemon = world.start()
    tasks = [inside(world, until=str(gate)) for _ in range(3)]
    world.kill(daemon)
    gate.touch()
    world.start(idle=False)
    assert all(world.ended(task_id).ok for task_id in tasks)
    world.wait_status("IDLE")
    world.unattended.clear()
