"""Resident memory of the daemon alone (its engine is a process of its own), idle: fresh, and after many tasks."""

from __future__ import annotations

from typing import Final

import psutil

from benchmarks.live_worker import Broker, running_worker
from benchmarks.noop_throughput import burst
from benchmarks.report_table import Row, against_target

_TARGET_MB: Final = 80.0
_MB: Final = 1e6


def measure(broker: Broker, *, tasks: int) -> list[Row]:
    """RSS against the target; PSS and USS as details."""
    with running_worker(broker, "memory") as worker:
        fresh = _megabytes(worker.process.pid)
        burst(worker, "m", tasks)
        used = _megabytes(worker.process.pid)
    return [
        against_target("idle memory (RSS), fresh", fresh["rss"], ("<", _TARGET_MB), "MB", fresh),
        against_target(f"idle memory (RSS), after {tasks:,} tasks", used["rss"], ("<", _TARGET_MB), "MB", used),
    ]


def _megabytes(pid: int) -> dict[str, float]:
    facts = psutil.Process(pid).memory_full_info()
    return {"rss": facts.rss / _MB, "pss": facts.pss / _MB, "uss": facts.uss / _MB}
