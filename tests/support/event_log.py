"""Everything that is published on the event channels, heard by a thread of the test."""

from __future__ import annotations

import json
import threading
from typing import Any

import redis

Event = dict[str, Any]
FINAL = ("TASK_SUCCEEDED", "TASK_FAILED")
_RETRY_SEC = 0.1


class EventLog:
    """Listens from its making to `close`, also across restarts of the server."""

    def __init__(self, url: str) -> None:
        self.events: list[tuple[str, Event]] = []
        self.raw: list[str] = []
        self._client = redis.Redis.from_url(url, protocol=2, decode_responses=True)
        self._listening = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()
        self.wait_listening()

    def wait_listening(self) -> None:
        assert self._listening.wait(20), "the test's own listener did not get its subscription confirmed"

    def close(self) -> None:
        self._stop.set()
        self._thread.join(20)
        self._client.close()
        self._client.connection_pool.disconnect()

    def on(self, channel: str, kind: str = "") -> list[Event]:
        """What came on a channel, in order; of one type if `kind` is given."""
        return [event for where, event in self.events if where == channel and kind in {"", event.get("type")}]

    def of_task(self, task_id: str) -> list[Event]:
        return [event for event in self.on("tasks.events") if event["task_id"] == task_id]

    def ends(self, task_id: str) -> list[Event]:
        """Final events of a task."""
        return [event for event in self.of_task(task_id) if event["type"] in FINAL]

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                with self._client.pubsub() as pubsub:
                    pubsub.psubscribe("tasks.events", "workers.events", "channel:*")
                    self._listen(pubsub)
            except redis.RedisError:
                self._listening.clear()
                self._stop.wait(_RETRY_SEC)

    def _listen(self, pubsub: redis.client.PubSub) -> None:
        confirmed = 0
        while not self._stop.is_set():
            message = pubsub.get_message(timeout=0.1)
            if message is None:
                continue
            if message["type"] == "psubscribe":
                confirmed += 1
                if confirmed == 3:
                    self._listening.set()
            elif message["type"] == "pmessage":
                self.raw.append(message["data"])
                self.events.append((message["channel"], json.loads(message["data"])))
