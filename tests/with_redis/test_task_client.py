from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
import redis

from orchestrator_client.broker_probe import probe_broker
from orchestrator_client.connection import sync_client
from orchestrator_client.errors import BrokerRefusedError, BrokerUnreachableError
from orchestrator_client.messages import decode_envelope, decode_head
from orchestrator_client.task_client import TaskClient, TaskOrder

ECHO = {"spec": {"taskType": "echo", "message": "hé"}}


@pytest.fixture
def client(broker_url: str) -> Iterator[TaskClient]:
    with TaskClient(broker_url, topic="tasks") as client:
        yield client


@pytest.fixture
def server(broker_url: str) -> Iterator[redis.Redis]:
    with sync_client(broker_url) as server:
        yield server
        server.connection_pool.disconnect()


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_nobody_listens(client: TaskClient):
    assert client.submit(TaskOrder(ECHO)) == 0
    assert client.cancel("t") == 0


def test_envelope_is_what_workers_decode(client: TaskClient, server: redis.Redis):
    with server.pubsub() as pubsub:
        pubsub.subscribe("tasks")
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
        first = TaskOrder(ECHO)
        second = TaskOrder(ECHO, worker_id="w-2", task_id="chosen")
        assert client.submit(first) == 1
        assert client.submit(second) == 1
        bodies = [pubsub.get_message(timeout=5)["data"] for _ in range(2)]
    one, two = (decode_envelope(body, decode_head(body)) for body in bodies)
    assert (one.task_id, one.kind, one.assigned_worker) == (first.task_id, "echo", None)
    assert "assigned_worker" not in json.loads(bodies[0])
    assert datetime.fromisoformat(one.dispatched_at or "").tzinfo is not None
    assert (two.task_id, two.assigned_worker, two.task.spec) == ("chosen", "w-2", ECHO["spec"])


def test_nan_is_never_sent():
    with pytest.raises(ValueError, match="not JSON compliant"):
        TaskOrder({"spec": {"x": float("nan")}}).encode()


def test_cancel_message(client: TaskClient, server: redis.Redis):
    with server.pubsub() as pubsub:
        pubsub.subscribe("tasks.control")
        assert pubsub.get_message(timeout=5)["type"] == "subscribe"
        assert client.cancel("t-1") == 1
        assert json.loads(pubsub.get_message(timeout=5)["data"]) == {"type": "CANCEL", "task_id": "t-1"}


def test_task_state(client: TaskClient, server: redis.Redis):
    assert client.task("t") is None
    server.hset("task:t", mapping={"status": "running", "worker_id": "w", "progress_done": "2", "progress_total": "8"})
    state = client.task("t")
    assert (state.status, state.worker_id, state.ended) == ("RUNNING", "w", False)
    assert (state.progress.done, state.progress.total) == (2, 8)


def test_hostile_task_hash(client: TaskClient, server: redis.Redis):
    server.hset(
        "task:t",
        mapping={
            "status": b"\xff\xfe",
            "error": "red \x1b[31m and\r back\nnext",
            "progress_done": "nan",
            "progress_total": "many",
            "unknown": "x",
            b"\xff": b"\xff",
            "task_id": "another",
        },
    )
    state = client.task("t")
    assert state.task_id == "t"
    assert state.progress_done is None
    assert state.progress_total is None
    assert "\x1b" not in state.error
    assert "\r" not in state.error
    assert "\nnext" in state.error
    assert not state.ended


def test_task_key_of_another_type(client: TaskClient, server: redis.Redis):
    server.set("task:t", "a string")
    with pytest.raises(BrokerRefusedError, match="WRONGTYPE"):
        client.task("t")


def test_workers(client: TaskClient, server: redis.Redis):
    assert client.workers() == []
    server.sadd("workers:ids", "b-alive", "a-stale", "c-endless", "d-string", b"\xff")
    server.hset(
        "worker:b-alive",
        mapping={
            "status": "RUNNING",
            "extra_task_id": "t-7",
            "tags_json": '["x", 3, "y"]',
            "cost_per_hour": "2.5",
            "started_at": "2030-01-01T00:00:00+00:00",
            "hardware_json": '{"gpu": {"gpus": [{"name": "H100"}, "odd", {"index": 1}]}}',
        },
    )
    server.set("worker:b-alive:hb", "x", ex=100)
    server.hset(
        "worker:a-stale", mapping={"status": "IDLE", "hardware_json": "null", "tags_json": "{", "env_json": "[]"}
    )
    server.set("worker:c-endless:hb", "x")
    server.set("worker:d-string", "the tuning manager's JSON")
    found = {worker.worker_id: worker for worker in client.workers()}
    assert list(found)[:4] == ["a-stale", "b-alive", "c-endless", "d-string"]
    alive = found["b-alive"]
    assert (alive.alive, alive.status, alive.task_id) == (True, "RUNNING", "t-7")
    assert (alive.tags, alive.gpus, alive.cost_per_hour) == (("x", "y"), ("H100", "GPU"), 2.5)
    assert alive.uptime_sec(datetime(2030, 1, 1, 1, tzinfo=UTC)) == 3600
    assert (found["a-stale"].alive, found["a-stale"].tags, found["a-stale"].gpus) == (False, (), ())
    assert found["a-stale"].uptime_sec() is None
    assert not found["c-endless"].alive, "a heartbeat without TTL counts as stale (WIRE 1.1)"
    assert found["d-string"].status == "UNREADABLE"


def test_events_of_one_task_only(client: TaskClient, server: redis.Redis):
    with client.events("mine") as events:
        for body in (b"junk", b"[1]", b'{"type": 1}', b'{"type":"TASK_FAILED","task_id":"other"}'):
            server.publish("tasks.events", body)
        server.publish(
            "tasks.events", '{"type":" task_progress ","task_id":"mine","payload":{"done":3,"message":"m\\u001b"}}'
        )
        news = events.next(5)
        assert news.type == "TASK_PROGRESS"
        assert news.progress.done == 3
        assert "\x1b" not in news.progress.message
        assert events.next(0.05) is None


def test_events_survive_a_lost_connection(client: TaskClient, server: redis.Redis):
    with client.events("t") as events:
        server.client_kill_filter(_type="pubsub")
        with pytest.raises(BrokerUnreachableError):
            events.next(5)
        assert events.next(0.05) is None
        server.publish("tasks.events", '{"type":"TASK_STARTED","task_id":"t"}')
        assert events.next(5).type == "TASK_STARTED"


def test_nothing_answers(closed_port: int):
    with (
        TaskClient(f"redis://user:secret@127.0.0.1:{closed_port}/0", topic="tasks") as client,
        pytest.raises(BrokerUnreachableError) as caught,
    ):
        client.workers()
    assert f"redis://127.0.0.1:{closed_port}/0" in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("option", ["foo=1", "socket_timeout=soon"])
def test_unusable_address(closed_port: int, option: str):
    with pytest.raises(BrokerRefusedError, match="cannot be used"):
        TaskClient(f"redis://127.0.0.1:{closed_port}/0?{option}", topic="tasks")


def test_wrong_password(broker_url: str):
    url = broker_url.replace("redis://", "redis://nobody:secret@")
    with TaskClient(url, topic="tasks") as client, pytest.raises(BrokerRefusedError) as caught:
        client.task("t")
    assert "secret" not in str(caught.value)


def test_probe_of_a_good_broker(broker_url: str, server: redis.Redis):
    report = probe_broker(broker_url, "tasks")
    assert report.version.startswith("valkey ")
    assert report.denied == ()
    assert report.unchecked == ()
    assert report.pubsub_limit_bytes == 32 * 1024**2
    assert abs(report.clock_ahead_sec) < 5
    assert server.keys("*") == []


def test_probe_of_a_user_without_rights(broker_url: str, server: redis.Redis):
    server.acl_setuser(
        "weak", enabled=True, passwords=["+pw"], categories=["+@all"], keys=["task:*"], channels=["tasks"]
    )
    try:
        report = probe_broker(broker_url.replace("redis://", "redis://weak:pw@"), "tasks")
    finally:
        server.acl_deluser("weak")
    text = "\n".join(report.denied)
    assert "key" in text
    assert "subscribe:" in text
    assert "publish:" in text
    assert "pw@" not in text
