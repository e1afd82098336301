"""Register, dispatch, events, unregister: the daemon as an orchestrator that talks only WIRE sees it."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from daemon_world import World
from orchestrator_process import OrchestratorProcess
from waiting_until import wait_until

Json = dict[str, Any]
ECHO = {"taskType": "echo", "data": {"greeting": "hello"}}


@pytest.fixture
def orchestrator(world: World) -> Iterator[OrchestratorProcess]:
    with OrchestratorProcess(world.url, world.folder / "results") as started:
        yield started


def subject(act: str, **fields: object) -> Json:
    return {"taskType": "subject", "act": act, **fields}


def of(report: Json, channel: str, **fields: object) -> list[Json]:
    return [e for where, e in report["heard"] if where == channel and fields.items() <= e.items()]


def types_of(report: Json, task_id: str) -> list[str]:
    return [event["type"] for event in of(report, "tasks.events", task_id=task_id)]


def send(world: World, orchestrator: OrchestratorProcess, task_id: str, spec: Json, worker: str | None) -> None:
    orchestrator.dispatch(task_id, spec, worker)
    world.sent[task_id] += 1


def test_one_worker_from_registration_to_farewell(world: World, orchestrator: OrchestratorProcess):
    daemon = world.start("w-1", idle=False, WORKER_TAGS="gpu-free, lab ,", WORKER_COST_PER_HOUR="2.5")
    assert orchestrator.await_workers(1, tags=("gpu-free", "lab"), cost=2.5) == ["w-1"]
    send(world, orchestrator, "good", ECHO, "w-1")
    ends = orchestrator.await_ends("good")
    assert ends["good"]["type"] == "TASK_SUCCEEDED"
    assert orchestrator.await_workers(1, tags=("gpu-free", "lab"), cost=2.5) == ["w-1"]
    send(world, orchestrator, "bad", subject("raise"), "w-1")
    assert orchestrator.await_ends("bad")["bad"]["type"] == "TASK_FAILED"
    # WIRE 0 step 9: the orchestrator wrote RUNNING after its publish and never IDLE; the heartbeat mends it.
    assert orchestrator.await_workers(1, tags=("gpu-free", "lab"), cost=2.5) == ["w-1"]
    orchestrator.await_event("HEARTBEAT", "w-1", 3)
    assert daemon.stop() == 0
    (farewell,) = orchestrator.await_event("UNREGISTER", "w-1")
    assert farewell["payload"]["cost_per_hour"] == 2.5

    report = orchestrator.report()
    assert report["problems"] == []
    assert types_of(report, "good")[0] == "TASK_STARTED"
    assert types_of(report, "good")[-1] == "TASK_SUCCEEDED"
    (started,) = of(report, "tasks.events", task_id="good", type="TASK_STARTED")
    assert started["payload"]["dispatched_at"] == ends["good"]["payload"]["dispatched_at"]
    assert started["payload"]["taskType"] == "echo"
    kinds = [event["type"] for event in of(report, "workers.events")]
    assert kinds[:3] == ["REGISTER", "HEARTBEAT", "STATUS"]
    assert kinds[-1] == "UNREGISTER"
    (register,) = of(report, "workers.events", type="REGISTER")
    assert register["tags"] == ["gpu-free", "lab"]
    assert register["payload"]["cost_per_hour"] == 2.5
    running = of(report, "workers.events", type="STATUS", status="RUNNING")
    assert [event["payload"]["task_id"] for event in running] == ["good", "bad"]
    idle = of(report, "workers.events", type="STATUS", status="IDLE")
    assert [event["payload"].get("last_task") for event in idle][-2:] == ["good", "bad"]
    lifecycle = [event["event_type"] for event in of(report, "channel:worker:w-1")]
    assert lifecycle[0] == "registered"
    assert lifecycle[-1] == "offline"
    assert [each for each in lifecycle if each.startswith("job_")] == ["job_started", "job_completed"] * 2
    assert report["keys"] == ["task:bad", "task:good"]


def test_three_workers_share_the_work(world: World, orchestrator: OrchestratorProcess):
    names = ["w-1", "w-2", "w-3"]
    daemons = [world.start(name, idle=False) for name in names]
    assert orchestrator.await_workers(3) == names
    for number in range(9):
        send(world, orchestrator, f"t-{number}", ECHO, names[number % 3])
    for number in range(9):
        assert orchestrator.await_ends(f"t-{number}")[f"t-{number}"]["worker_id"] == names[number % 3]
    orchestrator.await_workers(3)
    for daemon in daemons:
        assert daemon.stop() == 0
    for name in names:
        orchestrator.await_event("UNREGISTER", name)
    report = orchestrator.report()
    assert report["problems"] == []
    assert not [key for key in report["keys"] if key.startswith("worker")]


def test_a_task_for_anybody_runs_exactly_once(world: World, orchestrator: OrchestratorProcess):
    names = ["w-1", "w-2", "w-3"]
    for name in names:
        world.start(name, idle=False)
    orchestrator.await_workers(3)
    tasks = [f"any-{number}" for number in range(12)]
    for task_id in tasks:
        send(world, orchestrator, task_id, ECHO, None)
    ends = orchestrator.await_ends(*tasks)
    assert {end["type"] for end in ends.values()} == {"TASK_SUCCEEDED"}
    orchestrator.await_workers(3)
    report = orchestrator.report()
    assert report["problems"] == []
    for task_id in tasks:
        assert types_of(report, task_id).count("TASK_STARTED") == 1
        assert world.redis.get(f"task:{task_id}:claim") == ends[task_id]["worker_id"]


def test_a_worker_that_cannot_run_a_task_leaves_it_to_one_that_can(world: World, orchestrator: OrchestratorProcess):
    world.start("w-1", idle=False, WORKER_EXECUTOR_MASK="echo")
    world.start("w-2", idle=False)
    orchestrator.await_workers(2)
    for number in range(3):
        send(world, orchestrator, f"any-{number}", subject("fine"), None)
    ends = orchestrator.await_ends("any-0", "any-1", "any-2")
    assert {(end["type"], end["worker_id"]) for end in ends.values()} == {("TASK_SUCCEEDED", "w-2")}


def test_a_flush_is_noticed_at_the_next_beat(world: World, orchestrator: OrchestratorProcess):
    world.start("w-1", idle=False)
    orchestrator.await_workers(1)
    world.redis.flushdb()
    orchestrator.await_event("REGISTER", "w-1", 2)
    assert orchestrator.await_workers(1) == ["w-1"]
    send(world, orchestrator, "after", ECHO, "w-1")
    orchestrator.await_ends("after")
    assert orchestrator.report()["problems"] == []


def test_a_crash_and_a_restart_end_each_task_exactly_once(world: World, orchestrator: OrchestratorProcess):
    daemon = world.start("w-1", idle=False)
    orchestrator.await_workers(1)
    send(world, orchestrator, "running", subject("sleep", seconds=0.8), "w-1")
    send(world, orchestrator, "waiting", ECHO, "w-1")
    world.progressed("running")
    world.hash_of("waiting", "QUEUED")
    world.kill(daemon)
    world.start("w-1", idle=False)
    orchestrator.await_event("REGISTER", "w-1", 2)
    ends = orchestrator.await_ends("running", "waiting")
    assert {end["type"] for end in ends.values()} == {"TASK_SUCCEEDED"}
    orchestrator.await_workers(1)
    world.unattended.discard("w-1")
    report = orchestrator.report()
    assert report["problems"] == []
    kinds = [event["type"] for event in of(report, "workers.events") if event["type"].endswith("REGISTER")]
    assert kinds == ["REGISTER", "UNREGISTER", "REGISTER"]


def test_a_second_dispatch_waits_its_turn(world: World, orchestrator: OrchestratorProcess):
    world.start("w-1", idle=False)
    orchestrator.await_workers(1)
    send(world, orchestrator, "first", subject("sleep", seconds=1.2), "w-1")
    send(world, orchestrator, "second", ECHO, "w-1")
    assert world.hash_of("second", "QUEUED")["worker_id"] == "w-1"
    beats = len(orchestrator.await_event("HEARTBEAT", "w-1"))
    beat = orchestrator.await_event("HEARTBEAT", "w-1", beats + 1)[-1]
    assert beat["status"] == "RUNNING"
    orchestrator.await_ends("first", "second")
    report = orchestrator.report()
    assert report["problems"] == []
    begin = {
        task_id: datetime.fromisoformat(event["payload"]["started_at"])
        for task_id in ("first", "second")
        for event in of(report, "tasks.events", task_id=task_id, type="TASK_STARTED")
    }
    assert begin["second"] - begin["first"] >= timedelta(seconds=1.2)


def test_a_task_that_succeeded_is_answered_from_the_journal(world: World, orchestrator: OrchestratorProcess):
    world.start("w-1", idle=False)
    orchestrator.await_workers(1)
    send(world, orchestrator, "again", subject("fine"), "w-1")
    first = orchestrator.await_ends("again")["again"]
    send(world, orchestrator, "again", subject("fine"), "w-1")
    second = orchestrator.await_ends("again")["again"]
    assert second["type"] == "TASK_SUCCEEDED"
    assert second["payload"]["finished_at"] == first["payload"]["finished_at"]
    assert types_of(orchestrator.report(), "again").count("TASK_STARTED") == 1
    assert orchestrator.report()["problems"] == []


def test_a_task_that_failed_runs_again(world: World, orchestrator: OrchestratorProcess):
    world.start("w-1", idle=False)
    orchestrator.await_workers(1)
    for _ in range(2):
        send(world, orchestrator, "again", subject("raise"), "w-1")
        orchestrator.await_ends("again")
    assert types_of(orchestrator.report(), "again").count("TASK_STARTED") == 2
    assert orchestrator.report()["problems"] == []


def test_a_lost_broker_loses_no_end(world: World):
    daemon = world.start("w-1")
    running = world.send(subject("sleep", seconds=1.0))
    waiting = world.send(subject("fine"))
    world.progressed(running)
    world.hash_of(waiting, "QUEUED")
    world.server.stop()
    wait_until(lambda: len(daemon.logged("task_end")) == 2, "both tasks end while the broker is away")
    assert not world.events.ends(running)
    world.restart_server()
    for task_id in (running, waiting):
        assert world.ended(task_id).ok
        assert world.hash_of(task_id, "SUCCEEDED")["result_path"]
    world.wait_status("IDLE")
    assert world.run(ECHO).ok
    for task_id in (running, waiting):
        assert len(world.events.ends(task_id)) == 1
