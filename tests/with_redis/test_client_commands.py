"""The commands for people, against a real broker and a scripted worker."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis

from orchestrator_client.connection import sync_client
from orchestrator_client.messages import TaskEvent
from worker import exit_codes
from worker.commands import task_watch
from worker.commands.client_commands import run_client

Result = tuple[int, str, str]
Run = Callable[..., Result]
Envelope = dict[str, Any]


@dataclass
class ScriptedWorker:
    """Listens like a worker; calls `on_task` for each envelope, in its own thread.

    Attributes:
        heard: envelopes and control messages, in order.
    """

    client: redis.Redis
    worker_id: str = "w-1"
    on_task: Callable[[ScriptedWorker, Envelope], None] = lambda *_: None
    on_control: Callable[[ScriptedWorker, Envelope], None] = lambda *_: None
    heard: list[Envelope] = field(default_factory=list)

    def register(self, **fields: str) -> None:
        self.client.sadd("workers:ids", self.worker_id)
        mapping = {"worker_id": self.worker_id, "status": "IDLE"} | fields
        self.client.hset(f"worker:{self.worker_id}", mapping=mapping)
        self.client.set(f"worker:{self.worker_id}:hb", "now", ex=120)

    def set_task(self, task_id: str, **fields: str) -> None:
        self.client.hset(f"task:{task_id}", mapping={"worker_id": self.worker_id} | fields)

    def tell(self, kind: str, task_id: str, error: str | None = None, **payload: object) -> None:
        event = TaskEvent(type=kind, task_id=task_id, worker_id=self.worker_id, error=error, payload=payload)
        self.client.publish("tasks.events", event.encode())


@pytest.fixture
def scripted_worker(broker_url: str) -> Iterator[ScriptedWorker]:
    worker = ScriptedWorker(sync_client(broker_url))
    stop, ready = threading.Event(), threading.Event()

    def listen() -> None:
        with worker.client.pubsub() as pubsub:
            pubsub.subscribe("tasks", "tasks.control")
            confirmed = 0
            while not stop.is_set():
                message = pubsub.get_message(timeout=0.05)
                if message is None:
                    continue
                if message["type"] != "message":
                    confirmed += 1
                    if confirmed == 2:
                        ready.set()
                    continue
                body = json.loads(message["data"])
                worker.heard.append(body)
                (worker.on_task if message["channel"] == b"tasks" else worker.on_control)(worker, body)

    thread = threading.Thread(target=listen)
    thread.start()
    assert ready.wait(10), "the scripted worker did not get its subscription confirmed"
    yield worker
    stop.set()
    thread.join(10)
    assert not thread.is_alive()
    worker.client.close()
    worker.client.connection_pool.disconnect()


@pytest.fixture
def run(broker_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("REDIS_URL", broker_url)
    monkeypatch.delenv("TASK_TOPIC", raising=False)

    def call(*arguments: str) -> Result:
        code = run_client(list(arguments))
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    file = tmp_path / "task.yaml"
    file.write_text("taskType: echo\nmessage: hi\n")
    return str(file)


def succeed(worker: ScriptedWorker, envelope: Envelope) -> None:
    task_id = envelope["task_id"]
    worker.set_task(task_id, status="RUNNING")
    worker.tell("TASK_STARTED", task_id)
    worker.tell("TASK_PROGRESS", task_id, done=1, total=2, unit="items", message="half")
    worker.set_task(task_id, status="SUCCEEDED", result_path="/results/responses.json")
    worker.tell("TASK_SUCCEEDED", task_id)


def fail(worker: ScriptedWorker, envelope: Envelope) -> None:
    task_id = envelope["task_id"]
    worker.set_task(task_id, status="FAILED", error="no such column", reason="bad_data", hint="name another")
    worker.tell("TASK_FAILED", task_id, "no such column")


def test_submit_without_workers(run: Run, task_file: str):
    code, _, err = run("submit", task_file)
    assert code == exit_codes.UNAVAILABLE
    assert "no worker listens" in err
    assert err.count("\n") == 1


def test_submit_that_nobody_takes(
    run: Run, task_file: str, scripted_worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(task_watch, "ACCEPT_WITHIN_SEC", 0.3)
    code, _, err = run("submit", task_file)
    assert code == exit_codes.UNAVAILABLE
    assert "no worker took task" in err
    assert len(scripted_worker.heard) == 1


def test_submit_returns_once_accepted(run: Run, task_file: str, scripted_worker: ScriptedWorker):
    scripted_worker.on_task = lambda worker, envelope: worker.set_task(envelope["task_id"], status="QUEUED")
    code, out, _ = run("submit", task_file, "--task-id", "my-task")
    assert code == exit_codes.OK
    assert "task my-task is queued on w-1" in out
    assert scripted_worker.heard[0]["task"]["spec"] == {"taskType": "echo", "message": "hi"}


def test_submit_refuses_an_id_in_use(run: Run, task_file: str, scripted_worker: ScriptedWorker):
    scripted_worker.set_task("my-task", status="RUNNING")
    code, _, err = run("submit", task_file, "--task-id", "my-task")
    assert code == exit_codes.FAILED
    assert "my-task is RUNNING on w-1" in err
    assert scripted_worker.heard == []


def test_submit_and_wait_for_success(run: Run, task_file: str, scripted_worker: ScriptedWorker):
    scripted_worker.on_task = succeed
    code, out, _ = run("submit", task_file, "--wait")
    assert code == exit_codes.OK
    assert "succeeded on w-1" in out
    assert "result: /results/responses.json" in out


def test_submit_and_wait_for_failure(run: Run, task_file: str, scripted_worker: ScriptedWorker):
    scripted_worker.on_task = fail
    code, _, err = run("submit", task_file, "--wait")
    assert code == exit_codes.FAILED
    assert "no such column" in err
    assert "reason: bad_data" in err
    assert "next: name another" in err


def test_end_known_from_the_event_alone(
    run: Run, task_file: str, scripted_worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
):
    """A worker that refuses a task may never write its hash."""
    monkeypatch.setattr(task_watch, "_HASH_LAG_SEC", 0.2)
    scripted_worker.on_task = lambda worker, envelope: worker.tell(
        "TASK_FAILED", envelope["task_id"], "unknown task type", reason="unknown_task_type", hint="known: echo"
    )
    code, _, err = run("submit", task_file, "--wait")
    assert code == exit_codes.FAILED
    assert "unknown task type" in err
    assert "next: known: echo" in err


def test_wait_has_an_end(run: Run, task_file: str, scripted_worker: ScriptedWorker):
    scripted_worker.on_task = lambda worker, envelope: worker.set_task(envelope["task_id"], status="RUNNING")
    code, _, err = run("submit", task_file, "--wait", "--timeout", "0.2")
    assert code == exit_codes.TIMED_OUT
    assert "it goes on" in err


def test_submit_to_one_worker(run: Run, task_file: str, scripted_worker: ScriptedWorker):
    code, _, err = run("submit", task_file, "--worker", "w-1")
    assert code == exit_codes.UNAVAILABLE
    assert "no worker 'w-1' is registered; alive: none" in err
    scripted_worker.register()
    scripted_worker.on_task = succeed
    assert run("submit", task_file, "--worker", "w-1", "--wait")[0] == exit_codes.OK
    assert scripted_worker.heard[0]["assigned_worker"] == "w-1"
    scripted_worker.client.delete("worker:w-1:hb")
    code, _, err = run("submit", task_file, "--worker", "w-1")
    assert code == exit_codes.UNAVAILABLE
    assert "no heartbeat" in err


def test_ctrl_c_leaves_the_task_running(broker_url: str, task_file: str, scripted_worker: ScriptedWorker):
    scripted_worker.on_task = lambda worker, envelope: worker.set_task(envelope["task_id"], status="RUNNING")
    command = [
        sys.executable,
        "-m",
        "worker.commands.command_line",
        "submit",
        task_file,
        "--wait",
        "--broker",
        broker_url,
    ]
    # A test run in the background of a script ignores Ctrl-C, and what it starts would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen([*command, "--task-id", "t-9"], stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, before)
    with process:
        assert process.stderr is not None
        first = process.stderr.readline()
        process.send_signal(signal.SIGINT)
        try:
            rest = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert "t-9 is taken by w-1" in first
    assert process.returncode == exit_codes.INTERRUPTED
    assert "flowmesh-worker cancel t-9" in rest
    assert "Traceback" not in rest
    assert [body.get("type") for body in scripted_worker.heard] == [None], "no cancel was sent"


def test_workers_and_task(run: Run, scripted_worker: ScriptedWorker):
    code, out, _ = run("workers")
    assert code == exit_codes.OK
    assert "no worker is registered" in out
    scripted_worker.register(tags_json='["eu"]', cost_per_hour="0.5")
    code, out, _ = run("workers")
    assert out.splitlines()[0].split() == ["worker", "heartbeat", "status", "task", "GPUs", "cost/h", "uptime", "tags"]
    assert out.splitlines()[1].split() == ["w-1", "alive", "IDLE", "-", "none", "0.5", "-", "eu"]
    listed = json.loads(run("workers", "--json")[1])
    assert (listed[0]["worker_id"], listed[0]["alive"], listed[0]["tags"]) == ("w-1", True, ["eu"])
    scripted_worker.set_task("t", status="RUNNING", task_type="echo", progress_done="1", progress_total="4")
    code, out, _ = run("task", "t")
    assert code == exit_codes.OK
    assert "status    RUNNING" in out
    assert "progress  1/4" in out
    assert json.loads(run("task", "t", "--json")[1])["progress_total"] == 4


def test_unknown_task(run: Run):
    code, _, err = run("task", "never-seen")
    assert code == exit_codes.FAILED
    assert "knows no task never-seen" in err


def test_cancel(run: Run, scripted_worker: ScriptedWorker):
    scripted_worker.set_task("t", status="RUNNING")
    scripted_worker.on_control = lambda worker, body: worker.set_task(
        body["task_id"], status="FAILED", reason="cancelled"
    )
    code, out, _ = run("cancel", "t")
    assert code == exit_codes.OK
    assert "task t is cancelled" in out
    assert scripted_worker.heard == [{"type": "CANCEL", "task_id": "t"}]
    assert run("cancel", "t")[0] == exit_codes.OK, "a second time there is nothing left to do"
    assert len(scripted_worker.heard) == 1


def test_cancel_that_comes_to_nothing(run: Run, scripted_worker: ScriptedWorker):
    scripted_worker.set_task("done", status="SUCCEEDED")
    code, _, err = run("cancel", "done")
    assert (code, "has ended: SUCCEEDED" in err) == (exit_codes.FAILED, True)
    scripted_worker.set_task("deaf", status="RUNNING")
    code, _, err = run("cancel", "deaf", "--timeout", "0.1")
    assert (code, "has not ended within" in err) == (exit_codes.FAILED, True)
    code, _, err = run("cancel", "unknown")
    assert (code, "knows no task unknown" in err) == (exit_codes.FAILED, True)


def test_cancel_without_workers(run: Run, broker_url: str):
    with sync_client(broker_url) as server:
        server.hset("task:t", "status", "RUNNING")
        server.connection_pool.disconnect()
    code, _, err = run("cancel", "t")
    assert (code, "no worker listens" in err) == (exit_codes.UNAVAILABLE, True)


def test_doctor_with_a_broker(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("RESULTS_DIR", str(tmp_path / "new" / "results"))
    monkeypatch.setenv("WORKER_TAG", "x")
    code, out, _ = run("doctor", "--json")
    findings = json.loads(out)
    levels = {found["subject"]: found["level"] for found in findings}
    assert (levels["broker"], levels["permissions"], levels["buffers"], levels["clock"]) == ("OK", "OK", "OK", "OK")
    assert levels["type echo"] == "OK"
    assert any("did you mean WORKER_TAGS" in found["message"] for found in findings)
    assert all(found["fix"] for found in findings if found["level"] != "OK")
    assert code == (exit_codes.FAILED if "FAIL" in levels.values() else exit_codes.OK)
    assert not (tmp_path / "new").exists(), "doctor leaves nothing behind"


@pytest.mark.parametrize(
    ("limit", "words"), [("0 0 0", "unlimited"), ("1048576 0 0", "less than one task message may be")]
)
def test_doctor_on_buffers(run: Run, broker_url: str, limit: str, words: str):
    server: redis.Redis
    with sync_client(broker_url) as server:
        server.config_set("client-output-buffer-limit", f"pubsub {limit}")
        try:
            _, out, _ = run("doctor")
        finally:
            server.config_set("client-output-buffer-limit", "pubsub 33554432 8388608 60")
            server.connection_pool.disconnect()
    line = next(line for line in out.splitlines() if " buffers " in line)
    assert line.startswith("WARN")
    assert words in line
