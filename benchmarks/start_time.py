"""From spawning `python worker/main.py` to hash status IDLE with the subscription confirmed.

The clock stops when STATUS IDLE is heard; the hash and PUBSUB NUMSUB are then checked. Compared, in turns, with a bare
Python that only imports the three libraries that the daemon cannot do without.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import Final

from benchmarks.live_worker import Broker, running_worker
from benchmarks.report_table import Row, against_target, beside

_BARE: Final = "redis.asyncio, pydantic_settings, structlog"
_TARGET_SEC: Final = 1.0


def measure(broker: Broker, *, starts: int) -> list[Row]:
    """Median of some starts."""
    ours, bare = [], []
    for _ in range(starts):
        with running_worker(broker, "start") as worker:
            ours.append(worker.start_sec)
        bare.append(_bare_start())
    middle = statistics.median(ours)
    details = {"fastest": min(ours), "slowest": max(ours)}
    return [
        against_target("start to IDLE, subscribed", middle, ("<", _TARGET_SEC), "s", details),
        beside("start to IDLE, subscribed", (f"python -c 'import {_BARE}'", statistics.median(bare)), middle, "s"),
    ]


def _bare_start() -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {_BARE}"], check=True, timeout=60)
    return time.perf_counter() - started
