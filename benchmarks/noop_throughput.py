"""Echo tasks queued at once for one worker with default settings: journal on, engine in its own process.

Tasks per second from the first PUBLISH to the last TASK_SUCCEEDED. The engine is warm: one task runs before. The
figure counts only if every task was answered exactly once and left its result on disk.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from typing import Final

import psutil

from benchmarks.broker_link import BenchError, Heard
from benchmarks.live_worker import Broker, LiveWorker, envelope_of, is_idle, publish, running_worker
from benchmarks.report_table import Row, against_target, beside

ECHO: Final = {"taskType": "echo", "note": "nothing to do"}
_TARGET_PER_SEC: Final = 500.0
_REFERENCE_PER_SEC: Final = 357.0
_WITHIN_SEC: Final = 300.0


def measure(broker: Broker, *, tasks: int, rounds: int) -> list[Row]:
    """Median of some rounds."""
    with running_worker(broker, "throughput") as worker:
        worker.run_one("warm-up", ECHO)
        daemon = psutil.Process(worker.process.pid)
        before = daemon.cpu_times()
        rates = [burst(worker, f"round{number}", tasks) for number in range(rounds)]
        after = daemon.cpu_times()
    name = f"no-op tasks, {tasks:,} queued"
    rate = statistics.median(rates)
    each = 1000 / (tasks * rounds)
    details = {
        "slowest": min(rates),
        "fastest": max(rates),
        "daemon user ms/task": (after.user - before.user) * each,
        "daemon sys ms/task": (after.system - before.system) * each,
    }
    return [
        against_target(name, rate, (">=", _TARGET_PER_SEC), "tasks/s", details),
        beside(name, ("reference system, in process, not durable", _REFERENCE_PER_SEC), rate, "tasks/s"),
    ]


def burst(worker: LiveWorker, prefix: str, tasks: int) -> float:
    """Queue tasks at once, wait for all; returns tasks per second and leaves the worker idle.

    Raises:
        BenchError: a task failed, was lost, was answered twice, or left no result.
    """
    names = [f"{prefix}-{number:05d}" for number in range(tasks)]
    messages = b"".join(publish("tasks", envelope_of(name, ECHO)) for name in names)
    started = time.perf_counter()
    deadline = started + _WITHIN_SEC
    worker.link.send_packed(messages)
    heard: list[Heard] = []
    left, last, idle = tasks, 0.0, False
    while left or not idle:
        for one in worker.events.read(deadline):
            heard.append(one)
            if b'"TASK_SUCCEEDED"' in one.body or b'"TASK_FAILED"' in one.body:
                left, last, idle = left - 1, one.at, False
            elif is_idle(one.body):
                idle = True
    if not all(worker.link.replies(tasks, deadline)):
        raise BenchError("a PUBLISH reached nobody")
    heard += worker.events.rest()
    _require_each_once(heard, names)
    missing = [name for name in names if not (worker.results / name / "responses.json").is_file()]
    if missing:
        raise BenchError(f"{len(missing)} tasks left no responses.json, for instance {missing[0]}")
    return tasks / (last - started)


def _require_each_once(heard: list[Heard], names: list[str]) -> None:
    events = [json.loads(one.body) for one in heard if one.channel == b"tasks.events"]
    failed = [event for event in events if event["type"] == "TASK_FAILED"]
    if failed:
        raise BenchError(f"{len(failed)} tasks failed, for instance {failed[0]}")
    for kind in ("TASK_STARTED", "TASK_SUCCEEDED"):
        counts = Counter(event["task_id"] for event in events if event["type"] == kind)
        wrong = [name for name in names if counts[name] != 1] + sorted(counts.keys() - set(names))
        if wrong:
            raise BenchError(f"{kind} came {counts[wrong[0]]} times for {wrong[0]}; {len(wrong)} such tasks")
