"""What a person or a program does with tasks from outside: submit, watch, cancel, list the workers. Blocking calls."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from redis.client import PubSub
from redis.exceptions import AuthenticationError, AuthorizationError, RedisError

from orchestrator_client import channels
from orchestrator_client.connection import DISCONNECTED, redacted, sync_client
from orchestrator_client.errors import BrokerRefusedError, BrokerUnreachableError
from orchestrator_client.messages import JsonObject, now_iso
from orchestrator_client.task_states import (
    TaskNews,
    TaskState,
    WorkerState,
    decoded,
    read_news,
    read_task,
    read_worker,
)

_SUBSCRIBE_TIMEOUT_SEC = 5.0


@dataclass(frozen=True)
class TaskOrder:
    """A task to submit.

    Attributes:
        task: the whole task: `spec` and, if the author gave them, `apiVersion`, `kind`, `metadata`.
        worker_id: the worker that shall run it; empty: whichever claims it first.
        task_id: a fresh UUID unless the caller has one.
    """

    task: JsonObject
    worker_id: str = ""
    task_id: str = field(default_factory=lambda: str(uuid.uuid4()))

    def encode(self) -> bytes:
        """The dispatch envelope (WIRE 3); `assigned_worker` is left out when nobody in particular is meant.

        Raises:
            ValueError: a number is NaN or infinite.
        """
        spec = self.task.get("spec")
        envelope: JsonObject = {
            "task_id": self.task_id,
            "task": self.task,
            "task_type": spec.get("taskType") if isinstance(spec, dict) else None,
            "dispatched_at": now_iso(),
            "parent_task_id": None,
        }
        if self.worker_id:
            envelope["assigned_worker"] = self.worker_id
        return json.dumps(envelope, ensure_ascii=False, allow_nan=False).encode()


@contextmanager
def talking(address: str) -> Iterator[None]:
    """Turn redis-py's many errors into our two, with the address in the text."""
    try:
        yield
    except (AuthenticationError, AuthorizationError) as error:  # both count as connection errors in redis-py
        raise BrokerRefusedError(f"the broker at {address} refused the connection: {error}") from error
    except DISCONNECTED as error:
        raise BrokerUnreachableError(f"no broker answers at {address}: {str(error).rstrip('.')}") from error
    except RedisError as error:
        raise BrokerRefusedError(f"the broker at {address} refused the command: {error}") from error


class TaskEvents:
    """The events of one task, from the moment of the subscription. Made by `TaskClient.events`.

    Events are a convenience: pub/sub forgets what nobody heard, so a caller that waits for an end reads the task's
    hash as well.
    """

    def __init__(self, pubsub: PubSub, task_id: str, address: str) -> None:
        self._pubsub = pubsub
        self._task_id = task_id
        self._address = address

    def next(self, timeout_sec: float) -> TaskNews | None:
        """Wait for the task's next event; None when the time is over.

        Raises:
            BrokerUnreachableError: the connection broke; the next call tries to subscribe anew.
        """
        deadline = time.monotonic() + timeout_sec
        while (left := deadline - time.monotonic()) > 0:
            with talking(self._address):
                message = self._pubsub.get_message(ignore_subscribe_messages=True, timeout=left)
            news = read_news(message["data"]) if message else None
            if news is not None and news.task_id == self._task_id:
                return news
        return None


class TaskClient:
    """A connection to the broker for the people's side of it.

    Every method raises `BrokerUnreachableError` when no broker answers and `BrokerRefusedError` when it says no; the
    text is one line with the address, without credentials.

    Args:
        url: the broker.
        topic: the channel that workers take tasks from.
    """

    def __init__(self, url: str, *, topic: str) -> None:
        self.address = redacted(url)
        self._topic = topic
        self._redis = sync_client(url)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()
        self._redis.connection_pool.disconnect()

    def submit(self, order: TaskOrder) -> int:
        """Publish a task; returns how many programs listen on the topic. Whether one took it shows in `task`."""
        return self._publish(self._topic, order.encode())

    def cancel(self, task_id: str) -> int:
        """Ask for the end of a task, queued or running; returns how many workers heard it."""
        return self._control("CANCEL", task_id)

    def deliver(self, task_id: str) -> int:
        """Ask for another delivery of a finished result that was refused; returns how many workers heard it."""
        return self._control("DELIVER", task_id)

    def task(self, task_id: str) -> TaskState | None:
        """A task's state; None when no worker has accepted it, or it ended longer ago than the hash lives."""
        with talking(self.address):
            raw = self._redis.hgetall(channels.task_key(task_id))
        return read_task(task_id, raw)

    def workers(self) -> list[WorkerState]:
        """All registered workers by name, also those whose heartbeat has ended."""
        with talking(self.address):
            ids = sorted(decoded(member) for member in self._redis.smembers(channels.WORKER_IDS))
            pipe = self._redis.pipeline(transaction=False)
            for worker_id in ids:
                pipe.hgetall(channels.worker_key(worker_id))
                pipe.ttl(channels.heartbeat_key(worker_id))
            # Another system keeps a string under the same key (WIRE 1.4); that must not hide the other workers.
            answers = pipe.execute(raise_on_error=False)
        return [_worker(*row) for row in zip(ids, answers[::2], answers[1::2], strict=True)]

    @contextmanager
    def events(self, task_id: str) -> Iterator[TaskEvents]:
        """Subscribe to a task's events; nothing that is published after this has begun is missed."""
        pubsub = self._redis.pubsub()  # type: ignore[no-untyped-call]  # a gap in redis-py's types
        try:
            with talking(self.address):
                pubsub.subscribe(channels.TASK_EVENTS)
                if pubsub.get_message(timeout=_SUBSCRIBE_TIMEOUT_SEC) is None:
                    raise BrokerUnreachableError(f"the broker at {self.address} does not confirm a subscription")
            yield TaskEvents(pubsub, task_id, self.address)
        finally:
            pubsub.close()

    def _control(self, kind: str, task_id: str) -> int:
        return self._publish(channels.TASK_CONTROL, json.dumps({"type": kind, "task_id": task_id}).encode())

    def _publish(self, channel: str, body: bytes) -> int:
        with talking(self.address):
            return int(self._redis.publish(channel, body))


def _worker(worker_id: str, raw: object, ttl: object) -> WorkerState:
    return read_worker(worker_id, raw if isinstance(raw, dict) else None, ttl if isinstance(ttl, int) else -2)
