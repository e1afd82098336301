"""The tasks that run now. They all need the same engine; the backlog sees to that."""

from __future__ import annotations

from dataclasses import dataclass

from worker.task_execution import StopCause, TaskExecution
from worker.task_record import TaskRecord


@dataclass
class _Running:
    record: TaskRecord
    execution: TaskExecution | None = None
    stop_cause: StopCause | None = None
    """Why it has to stop, where that was said before its execution began."""


class RunningTasks:
    """Knows them by id, and stops them."""

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self.engine_key = ""
        """The engine key of them all; of the last ones if none runs."""

    def __len__(self) -> int:
        return len(self._running)

    def add(self, record: TaskRecord) -> None:
        """A task has its turn."""
        self._running[record.task_id] = _Running(record)
        self.engine_key = record.engine_key

    def begin(self, record: TaskRecord, execution: TaskExecution) -> None:
        """Its execution begins, unless it was stopped before."""
        running = self._running[record.task_id]
        running.execution = execution
        if running.stop_cause is not None:
            execution.stop(running.stop_cause)

    def remove(self, record: TaskRecord) -> None:
        """Its turn is over."""
        del self._running[record.task_id]

    def stop(self, task_id: str, cause: StopCause) -> bool:
        """Ask a task to stop; False if it does not run."""
        running = self._running.get(task_id)
        if running is None:
            return False
        if running.execution is not None:
            running.execution.stop(cause)
        else:
            running.stop_cause = running.stop_cause or cause
        return True

    def stop_all(self, cause: StopCause) -> None:
        """Stop all whose execution has begun, without patience."""
        for running in self._running.values():
            if running.execution is not None:
                running.execution.stop(cause, grace_sec=0.0)
