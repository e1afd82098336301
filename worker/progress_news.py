"""News of how far a task is, for `tasks.events` and the hash `task:<id>`; at most a few a second for each task."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Final

from executors.child_messages import Progress
from executors.contract import JsonObject
from orchestrator_client.messages import TaskEvent
from worker.event_publisher import EventPublisher

_EVERY_SEC: Final = 0.25


@dataclass
class _Last:
    at: float
    complete: bool


class ProgressNews:
    """Passes on what executors report, and what happens to a task before and after its run.

    Args:
        worker_id: this worker.
        publisher: who says it.
    """

    def __init__(self, worker_id: str, publisher: EventPublisher) -> None:
        self._worker_id = worker_id
        self._publisher = publisher
        self._last: dict[str, _Last] = {}

    def tell(self, kind: str, progress: Progress) -> None:
        """Say how far a task of some kind is, unless the last news of it is too young."""
        now = time.monotonic()
        complete = progress.done == progress.total
        last = self._last.get(progress.task_id)
        if last is not None and now - last.at < _EVERY_SEC and (not complete or last.complete):
            return
        self._last[progress.task_id] = _Last(now, complete)
        payload: JsonObject = {
            "taskType": kind,
            "done": progress.done,
            "total": progress.total,
            "unit": progress.unit,
            "message": progress.message,
            "metrics": {**progress.metrics},
        }
        fields = {
            "progress_done": f"{progress.done:.12g}",
            "progress_total": "" if progress.total is None else f"{progress.total:.12g}",
            "progress_unit": progress.unit,
            "progress_message": progress.message,
        }
        event = TaskEvent(type="TASK_PROGRESS", task_id=progress.task_id, worker_id=self._worker_id, payload=payload)
        self._publisher.task_progress(event, fields)

    def forget(self, task_id: str) -> None:
        """A stage of a task is over: its next news is said at once."""
        self._last.pop(task_id, None)


class ByteNews:
    """Progress of one long transfer or archive, in bytes with an estimate of the rest; silent in its first second.

    Args:
        news: where it is said.
        task_id: whose it is.
        kind: the task's type.
        doing: what is going on, for example `uploading final_model.tar.gz`.
    """

    _SILENT_SEC: Final = 1.0

    def __init__(self, news: ProgressNews, task_id: str, kind: str, doing: str) -> None:
        self._news = news
        self._task_id = task_id
        self._kind = kind
        self._doing = doing
        self._began = time.monotonic()
        self._spoke = False

    def tell(self, done: int, total: int | None) -> None:
        """So many bytes are done."""
        elapsed = time.monotonic() - self._began
        if elapsed < self._SILENT_SEC and not self._spoke:
            return
        self._spoke = True
        message, metrics = self._doing, {}
        if total and done:
            eta_sec = round(elapsed * (total - done) / done, 1)
            metrics = {"eta_sec": eta_sec, "bytes_per_sec": round(done / elapsed, 1)}
            message = f"{self._doing}: {done / total:.0%}, {eta_sec:.0f} s left"
        self._news.tell(
            self._kind,
            Progress(task_id=self._task_id, done=done, total=total, unit="bytes", message=message, metrics=metrics),
        )
