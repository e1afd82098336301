"""An orchestrator in a process of its own that talks only WIRE: `python scripted_orchestrator.py URL RESULTS_DIR`.

It knows nothing of our packages. Commands are lines of JSON on stdin, each answered by one line on stdout:

| command | answer |
|---|---|
| `{"do":"await_workers","count":N}` | ids of the workers that a dispatcher would choose now |
| `{"do":"dispatch","task_id":…,"spec":…,"worker":id or null}` | how many heard it |
| `{"do":"await_ends","task_ids":[…]}` | final events by task id |
| `{"do":"await_event","kind":…,"worker":…,"count":N}` | the events |
| `{"do":"report"}` | everything heard and everything wrong |
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import redis
import wire_checks

Json = dict[str, Any]
_DEADLINE_SEC = 30.0
_POLL_SEC = 0.01


def now() -> str:
    return datetime.now(UTC).isoformat()


class Orchestrator:
    """Listens, dispatches, keeps book."""

    def __init__(self, url: str, results: Path) -> None:
        self._redis = redis.Redis.from_url(url, protocol=2, decode_responses=True)
        self._results = results
        self._listening = threading.Event()
        self.heard: list[tuple[str, Json]] = []
        self.problems: list[str] = []
        self.dispatched: Counter[str] = Counter()
        self._registered: set[str] = set()
        threading.Thread(target=self._listen, daemon=True).start()
        if not self._listening.wait(_DEADLINE_SEC):
            raise SystemExit("the subscription was not confirmed")

    def await_workers(self, count: int, tags: list[str], cost: float, ttl: int) -> list[str]:
        """Wait for workers that the real dispatcher would choose, and check all that they wrote."""
        return self._wait(lambda: found if len(found := self._choosable(tags, cost, ttl)) >= count else None)

    def dispatch(self, task_id: str, spec: Json, worker: str | None) -> int:
        """Publish, and only then write RUNNING, as the real one does."""
        envelope = {
            "task_id": task_id,
            "task": {"apiVersion": "x/v1", "kind": "Any", "metadata": {"name": task_id}, "spec": spec},
            "task_type": spec.get("taskType"),
            "assigned_worker": worker,
            "dispatched_at": now(),
            "parent_task_id": None,
        }
        self.dispatched[task_id] += 1
        listeners = int(self._redis.publish("tasks", json.dumps(envelope)))
        if worker is not None:
            self._write_status(worker, "RUNNING")
        return listeners

    def await_ends(self, task_ids: list[str]) -> dict[str, Json]:
        """Wait until each task has as many final events as dispatches."""

        def look() -> dict[str, Json] | None:
            ends = {task_id: self._ends(task_id) for task_id in task_ids}
            done = all(len(events) >= self.dispatched[task_id] for task_id, events in ends.items())
            return {task_id: events[-1] for task_id, events in ends.items()} if done else None

        return self._wait(look)

    def await_event(self, kind: str, worker: str, count: int) -> list[Json]:
        """Wait for events of a type from a worker."""

        def look() -> list[Json] | None:
            found = [e for where, e in self.heard if where == "workers.events" and e.get("type") == kind]
            found = [event for event in found if event.get("worker_id") == worker]
            return found if len(found) >= count else None

        return self._wait(look)

    def report(self) -> Json:
        """Everything heard and everything wrong."""
        for task_id, times in self.dispatched.items():
            if len(self._ends(task_id)) != times:
                self.problems.append(f"{task_id}: {times} dispatches, but ends {self._ends(task_id)}")
        return {"heard": self.heard, "problems": self.problems, "keys": sorted(map(str, self._redis.keys("*")))}

    def _choosable(self, tags: list[str], cost: float, ttl: int) -> list[str]:
        found = []
        for worker_id in sorted(str(member) for member in self._redis.smembers("workers:ids")):
            fields: dict[str, str] = self._redis.hgetall(f"worker:{worker_id}")  # type: ignore[assignment]
            left = int(self._redis.ttl(f"worker:{worker_id}:hb"))
            if fields.get("status") != "IDLE" or left < 0:
                continue
            if not ttl - 3 <= left <= ttl:
                self.problems.append(f"the heartbeat key of {worker_id} has a TTL of {left} s, expected {ttl}")
            if not wire_checks.is_time(self._redis.get(f"worker:{worker_id}:hb")):
                self.problems.append(f"the heartbeat key of {worker_id} holds no time")
            self.problems += wire_checks.registration(worker_id, fields, tags, cost)
            found.append(worker_id)
        return found

    def _ends(self, task_id: str) -> list[Json]:
        events = [event for where, event in self.heard if where == "tasks.events" and event["task_id"] == task_id]
        return [event for event in events if event["type"] in {"TASK_SUCCEEDED", "TASK_FAILED"}]

    def _listen(self) -> None:
        with self._redis.pubsub() as pubsub:
            pubsub.subscribe("tasks.events", "workers.events")
            pubsub.psubscribe("channel:worker:*")
            confirmed = 0
            for message in pubsub.listen():
                if message["type"] in {"subscribe", "psubscribe"}:
                    confirmed += 1
                    if confirmed == 3:
                        self._listening.set()
                    continue
                try:
                    self._hear(message["channel"], wire_checks.parse(message["data"]))
                except (TypeError, ValueError) as error:
                    self.problems.append(f"{message['channel']}: {error}")

    def _hear(self, channel: str, event: Json) -> None:
        if channel == "tasks.events":
            self.problems += wire_checks.task_event(event)
            self._follow_task(event)
        elif channel == "workers.events":
            if event.get("payload", {}).get("from_orchestrator"):
                return
            self.problems += wire_checks.worker_event(event)
            self._follow_worker(event)
        else:
            self.problems += wire_checks.lifecycle(event)
        self.heard.append((channel, event))

    def _follow_task(self, event: Json) -> None:
        task_id, kind = event["task_id"], event["type"]
        if kind in {"TASK_SUCCEEDED", "TASK_FAILED"}:
            started = [e for where, e in self.heard if where == "tasks.events" and e["task_id"] == task_id]
            if kind == "TASK_SUCCEEDED" and not any(e["type"] == "TASK_STARTED" for e in started):
                self.problems.append(f"{task_id} succeeded before it started")
        if kind == "TASK_SUCCEEDED":
            file = self._results / task_id / "responses.json"
            if not file.is_file() or wire_checks.parse(file.read_text()).get("task_id") != task_id:
                self.problems.append(f"{task_id} succeeded, but {file} is not its result")
            self._write_status(event["worker_id"], "IDLE")

    def _follow_worker(self, event: Json) -> None:
        worker_id, kind = event["worker_id"], event["type"]
        if kind == "REGISTER":
            self._registered.add(worker_id)
            listeners = dict(self._redis.pubsub_numsub("tasks"))["tasks"]
            if listeners < len(self._registered):
                self.problems.append(f"{worker_id} registered before it was subscribed")
            if not self._redis.sismember("workers:ids", worker_id):
                self.problems.append(f"{worker_id} published REGISTER before it was in workers:ids")
        elif kind == "UNREGISTER":
            self._registered.discard(worker_id)
        elif worker_id not in self._registered:
            self.problems.append(f"{kind} of {worker_id}, which is not registered")

    def _write_status(self, worker_id: str, status: str) -> None:
        key = f"worker:{worker_id}"
        if self._redis.exists(key):
            self._redis.hset(key, mapping={"status": status, "last_seen": now()})
        message = {"type": "STATUS", "ts": now(), "worker_id": worker_id, "status": status}
        self._redis.publish("workers.events", json.dumps(message | {"payload": {"from_orchestrator": True}}))

    def _wait(self, look: Any) -> Any:  # noqa: ANN401 - what `look` gives
        deadline = time.monotonic() + _DEADLINE_SEC
        while not (found := look()):
            if time.monotonic() > deadline:
                raise TimeoutError("waited in vain")
            time.sleep(_POLL_SEC)
        return found


def main() -> None:
    """Answer commands until stdin ends."""
    orchestrator = Orchestrator(sys.argv[1], Path(sys.argv[2]))
    for line in sys.stdin:
        command = json.loads(line)
        verb = command.pop("do")
        try:
            answer = {"answer": getattr(orchestrator, verb)(**command)}
        except TimeoutError as error:
            answer = {"error": f"{verb}: {error}; problems: {orchestrator.problems}; heard: {orchestrator.heard[-20:]}"}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
