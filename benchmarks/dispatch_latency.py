"""From PUBLISH of an envelope to hearing its TASK_STARTED, with a warm engine and a durable journal.

| way | next task | turnaround setting |
|---|---|---|
| back to back | when the last one's final event was heard | 0, or it would be paced by it |
| paced | every 250 ms, on the clock | the default |

The floor, measured in the same run and in the same two ways: the same envelope goes through the same broker to a
minimal asyncio program that commits it to SQLite (WAL, synchronous FULL) and publishes an answer.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from benchmarks.broker_link import BenchError, BrokerLink, Heard, Subscription
from benchmarks.live_worker import ROOT, Broker, LiveWorker, envelope_of, publish, running_worker
from benchmarks.noop_throughput import ECHO
from benchmarks.report_table import Row, against_target, beside, spread

_WARM_UPS: Final = 20
_WITHIN_SEC: Final = 30.0
_PACE_SEC: Final = 0.25
_TARGET_BACK_TO_BACK_MS: Final = 2.0
_TARGET_PACED_MS: Final = 4.0

OneTrip = Callable[[str], float]


def measure(broker: Broker, *, back_to_back: int, paced: int) -> list[Row]:
    """Both ways, each beside its floor."""
    with running_worker(broker, "latency", {"TASK_MIN_TURNAROUND_MS": "0"}) as worker:
        fast = _many(lambda name: _start_latency(worker, name, wait_for_end=True), back_to_back)
    with running_worker(broker, "paced") as worker:
        slow = _many(lambda name: _start_latency(worker, name, wait_for_end=False), paced, worker.events)
    with _responder(broker) as (link, answers):
        fast_floor = _many(lambda name: _floor_trip(link, answers, name), back_to_back)
        slow_floor = _many(lambda name: _floor_trip(link, answers, name), paced, answers)
    return [
        *_rows("publish to TASK_STARTED, back to back", fast, fast_floor, _TARGET_BACK_TO_BACK_MS),
        *_rows("publish to TASK_STARTED, paced", slow, slow_floor, _TARGET_PACED_MS),
    ]


def _rows(name: str, ours: list[float], floor: list[float], target_ms: float) -> list[Row]:
    mine, bare = spread(ours, 1000), spread(floor, 1000)
    return [
        against_target(f"{name}, p50", mine["p50"], ("<=", target_ms), "ms", mine),
        *(
            beside(
                f"{name}, {which}",
                ("broker echo + one durable commit", bare[which]),
                mine[which],
                "ms",
                bare if which == "p50" else None,
            )
            for which in ("p50", "p95", "p99")
        ),
    ]


def _many(trip: OneTrip, count: int, paced_on: Subscription | None = None) -> list[float]:
    """Latencies of `count` trips after some warm-ups; on the clock if there is a subscription to pause on."""
    found = [trip(f"warm-{number}") for number in range(_WARM_UPS)][:0]
    due = time.perf_counter()
    for number in range(count):
        if paced_on is not None:
            due += _PACE_SEC
            paced_on.read_quietly(due)
        found.append(trip(f"trip-{number}"))
    return found


def _start_latency(worker: LiveWorker, name: str, *, wait_for_end: bool) -> float:
    message = publish("tasks", envelope_of(name, ECHO))
    wanted = [b'"TASK_STARTED"', b'"TASK_SUCCEEDED"'] if wait_for_end else [b'"TASK_STARTED"']
    mark = name.encode()
    sent = time.perf_counter()
    worker.link.send_packed(message)
    at: list[float] = []
    while len(at) < len(wanted):
        for heard in worker.events.read(sent + _WITHIN_SEC):
            if len(at) < len(wanted) and wanted[len(at)] in heard.body and mark in heard.body:
                at.append(heard.at)
            elif b'"TASK_FAILED"' in heard.body:
                raise BenchError(f"a task failed: {heard.body.decode()}")
    worker.link.replies(1, sent + _WITHIN_SEC)
    return at[0] - sent


def _floor_trip(link: BrokerLink, answers: Subscription, name: str) -> float:
    message = publish("bench.ask", envelope_of(name, ECHO))
    sent = time.perf_counter()
    link.send_packed(message)
    found: list[Heard] = []
    while not found:
        found = answers.read(sent + _WITHIN_SEC)
    link.replies(1, sent + _WITHIN_SEC)
    return found[0].at - sent


@contextmanager
def _responder(broker: Broker) -> Iterator[tuple[BrokerLink, Subscription]]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.echo_responder",
        str(broker.port),
        str(broker.folder / "floor.sqlite3"),
    ]
    with BrokerLink(broker.port) as link, Subscription(broker.port, ("bench.answer",)) as answers:
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            answers.read(time.perf_counter() + _WITHIN_SEC)  # it says hello once it is subscribed
            yield link, answers
        finally:
            process.terminate()
            process.wait(10)
