"""Every Redis key and channel name, in one place (WIRE 1 and 2)."""

from __future__ import annotations

from typing import Final

WORKER_IDS: Final = "workers:ids"
"""Set of worker ids: the only list that the orchestrator scans (WIRE 1.1)."""

TASK_EVENTS: Final = "tasks.events"
WORKER_EVENTS: Final = "workers.events"
TASK_CONTROL: Final = "tasks.control"
"""Where `{"type": "CANCEL" or "DELIVER", "task_id": …}` is published; ours, the orchestrator knows neither."""

TASK_STATUS_TTL_SEC: Final = 24 * 3600
CLAIM_TTL_SEC: Final = 24 * 3600


def worker_key(worker_id: str) -> str:
    """Hash with a worker's registration (WIRE 1.2)."""
    return f"worker:{worker_id}"


def heartbeat_key(worker_id: str) -> str:
    """String with a TTL; a worker without it is dead (WIRE 1.1)."""
    return f"worker:{worker_id}:hb"


def heartbeat_ttl_sec(interval_sec: int) -> int:
    """TTL of the heartbeat key in seconds (WIRE 1.1)."""
    return max(4 * interval_sec, 120)


def worker_channel(worker_id: str) -> str:
    """Lifecycle events of one worker (WIRE 2.5)."""
    return f"channel:worker:{worker_id}"


def results_channel(task_id: str) -> str:
    """Where the end of one task is told to tuning managers (WIRE 2.5)."""
    return f"channel:results:{task_id}"


def task_key(task_id: str) -> str:
    """Hash with a task's state for people and tools; lives `TASK_STATUS_TTL_SEC` after its last change."""
    return f"task:{task_id}"


def claim_key(task_id: str) -> str:
    """String that holds the id of the worker that claimed a task which was assigned to nobody."""
    return f"task:{task_id}:claim"
