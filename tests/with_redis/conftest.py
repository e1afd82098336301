"""A scripted worker: real Redis, real pub/sub, and behaviour that a test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import redis

from orchestrator_client.connection import sync_client
from orchestrator_client.messages import TaskEvent

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

    def tell(self, kind: str, task_id: str, error: str | None = None, **payload: Any) -> None:
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
