"""Submitting a task and waiting for its end: what `submit --wait` and the demo have in common."""

from __future__ import annotations

import time
from typing import Final, Protocol

from orchestrator_client.errors import BrokerUnreachableError
from orchestrator_client.task_client import TaskClient, TaskEvents, TaskOrder
from orchestrator_client.task_states import TaskNews, TaskProgress, TaskState

ACCEPT_WITHIN_SEC: Final = 10.0
_LOOK_EVERY_SEC: Final = 0.5
_WORKER_LOOK_EVERY_SEC: Final = 15.0
_HASH_LAG_SEC: Final = 3.0
"""After a final event, how long its hash may take to say the same."""
_LONGEST_OUTAGE_SEC: Final = 60.0


class NotTakenError(Exception):
    """Nobody listens, or nobody took the task."""


class StillRunningError(Exception):
    """The time to wait is over."""


class WatchView(Protocol):
    """Shows a person what happens to a task."""

    def status(self, text: str) -> None:
        """What the task does now: queued, running."""
        ...

    def progress(self, progress: TaskProgress) -> None:
        """How far it is."""
        ...

    def note(self, text: str) -> None:
        """Something that is not as usual, but no end."""
        ...

    def check(self) -> None:
        """Called some times a second; raise to end the waiting."""
        ...


def submit_order(client: TaskClient, order: TaskOrder, events: TaskEvents, view: WatchView) -> TaskState:
    """Publish a task and wait until a worker has taken it.

    Args:
        client: the broker.
        order: the task.
        events: the task's events, subscribed to before.
        view: asked to `check` meanwhile.

    Returns:
        The task's first known state, which may be its end.

    Raises:
        NotTakenError: the text says what to do.
    """
    if client.submit(order) == 0:
        raise NotTakenError("no worker listens on this topic: start one (flowmesh-worker run) and submit again")
    deadline = time.monotonic() + ACCEPT_WITHIN_SEC
    while time.monotonic() < deadline:
        view.check()
        if (state := client.task(order.task_id)) is not None:
            return state
        news = events.next(0.1)
        if news is not None and news.type in {"TASK_FAILED", "TASK_SUCCEEDED"}:
            return _after(news, client, order.task_id)
    raise NotTakenError(
        f"no worker took task {order.task_id} within {ACCEPT_WITHIN_SEC:.0f} s, though somebody listens: "
        "`flowmesh-worker workers` shows who is alive, `flowmesh-worker doctor` why one might not hear"
    )


def order_delivery(client: TaskClient, task_id: str, before: TaskState | None, view: WatchView) -> None:
    """Ask for another delivery and wait until the worker that has the result begins it.

    Raises:
        NotTakenError: nobody has one that failed; the text says what to do.
    """
    if client.deliver(task_id) == 0:
        raise NotTakenError("no worker listens: start the one that ran the task, with the same RESULTS_DIR")
    deadline = time.monotonic() + ACCEPT_WITHIN_SEC
    while time.monotonic() < deadline:
        view.check()
        state = client.task(task_id)
        if state is not None and (before is None or _moved(before, state)):
            return
        time.sleep(0.05)
    ran_on = before.worker_id if before is not None else ""
    raise NotTakenError(
        f"no worker has a result of task {task_id} whose delivery failed; "
        + (f"it ran on {ran_on}: is that worker running?" if ran_on else "is the worker that ran it running?")
    )


def _moved(before: TaskState, now: TaskState) -> bool:
    return (now.status, now.finished_at) != (before.status, before.finished_at)


def wait_for_end(
    client: TaskClient, task_id: str, events: TaskEvents, view: WatchView, *, timeout_sec: float | None
) -> TaskState:
    """Wait until a task has ended, showing its progress; an outage of the broker of up to a minute is survived.

    Raises:
        StillRunningError: `timeout_sec` is over.
        BrokerUnreachableError: the outage lasts.
    """
    started = time.monotonic()
    reachable_at = started
    worker_seen_at = started
    shown = ""
    while timeout_sec is None or time.monotonic() - started < timeout_sec:
        view.check()
        try:
            news = events.next(_LOOK_EVERY_SEC)
            state = client.task(task_id)
            if state is not None and time.monotonic() - worker_seen_at > _WORKER_LOOK_EVERY_SEC:
                worker_seen_at = time.monotonic()
                _note_dead_worker(client, state.worker_id, view)
        except BrokerUnreachableError as error:
            if time.monotonic() - reachable_at > _LONGEST_OUTAGE_SEC:
                raise
            view.note(f"{error}; trying again")
            time.sleep(_LOOK_EVERY_SEC)
            continue
        reachable_at = time.monotonic()
        if state is not None and state.ended:
            return state
        if news is not None and news.type in {"TASK_FAILED", "TASK_SUCCEEDED"}:
            return _after(news, client, task_id)
        if state is not None and state.status != shown:
            shown = state.status
            view.status(f"{shown.lower()} on {state.worker_id}")
        if news is not None and news.type == "TASK_PROGRESS":
            view.progress(news.progress)
        elif state is not None and state.progress != TaskProgress():
            view.progress(state.progress)
    raise StillRunningError(f"task {task_id} has not ended after {timeout_sec:.0f} s; it goes on")


def _after(news: TaskNews, client: TaskClient, task_id: str) -> TaskState:
    """The end as the hash tells it; if the hash lags or is lost, as the event does."""
    deadline = time.monotonic() + _HASH_LAG_SEC
    while time.monotonic() < deadline:
        state = client.task(task_id)
        if state is not None and state.ended:
            return state
        time.sleep(0.05)
    return TaskState(
        task_id=task_id,
        status="SUCCEEDED" if news.type == "TASK_SUCCEEDED" else "FAILED",
        worker_id=news.worker_id,
        error=news.error,
        reason=news.detail("reason"),
        hint=news.detail("hint"),
    )


def _note_dead_worker(client: TaskClient, worker_id: str, view: WatchView) -> None:
    if worker_id and not any(worker.worker_id == worker_id and worker.alive for worker in client.workers()):
        view.note(f"worker {worker_id} has no heartbeat any more; the task goes on once it is started again")
