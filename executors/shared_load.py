"""The load of an engine that several tasks wait for: one of them begins it, and its end is for all.

What is wrong with one task's own spec or data is that task's failure alone: the next one loads with its own. The load
has a thread of its own, so that the task which began it may be stopped like any other while others wait.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import Any, Final

from executors.contract import Executor, ExecutorTask, LogLevel, RunReport
from executors.errors import ExecutorError, Reason, TaskCancelledError

_POLL_SEC: Final = 0.1
"""How often a task that waits for a load looks whether it was cancelled meanwhile."""
_OWN_FAULTS: Final[frozenset[Reason]] = frozenset({"bad_spec", "bad_data", "cancelled"})
"""What ends a load because of the task whose spec was loaded; all else would meet every task of the engine."""


@dataclass
class _Attempt:
    """One call of `load`, with the spec of the task `by`."""

    by: str
    over: bool = False
    error: BaseException | None = None


class SharedLoad:
    """Loads an executor once.

    Args:
        executor: what is loaded.
    """

    def __init__(self, executor: Executor[Any]) -> None:
        self._executor = executor
        self._loaded = False
        self._error: BaseException | None = None
        """What ended the load for all."""
        self._attempt: _Attempt | None = None
        self._waiting: dict[str, RunReport] = {}
        self._changed = threading.Condition()

    @property
    def hopeful(self) -> bool:
        """Whether the executor is loaded, or may be soon because a task waits for it."""
        with self._changed:
            return self._loaded or (self._error is None and bool(self._waiting))

    def ensure(self, task: ExecutorTask[Any]) -> bool:
        """Load, or wait for the load; False if all was loaded before.

        Raises:
            BaseException: what the load raised: to the task whose fault it is, else to every task that waits for it.
        """
        if self._loaded:
            return False
        if not self._executor.concurrent:
            self._executor.load(task)
            self._loaded = True
            return True
        with self._changed:
            self._waiting[task.task_id] = task.report
            try:
                self._wait(task)
            finally:
                del self._waiting[task.task_id]
                self._changed.notify_all()
        return True

    def reports(self) -> list[RunReport]:
        """Of all that wait."""
        with self._changed:
            return list(self._waiting.values())

    def _wait(self, task: ExecutorTask[Any]) -> None:
        """Begin attempts until one succeeds; holds the lock, but not while it waits."""
        while not self._loaded:
            if self._error is not None:
                raise self._error
            attempt = self._attempt
            if attempt is None:
                task.report.raise_if_cancelled()
                self._begin(task)
            elif attempt.over and attempt.by == task.task_id:
                self._attempt = None
                assert attempt.error is not None  # noqa: S101 - else all would be loaded
                raise attempt.error
            elif len(self._waiting) > 1:  # the last one stays: nobody else could end a load that does not obey
                self._leave_if_cancelled(task, attempt)
            self._changed.wait(_POLL_SEC)

    def _leave_if_cancelled(self, task: ExecutorTask[Any], attempt: _Attempt) -> None:
        if task.report.cancelled and attempt.by == task.task_id:
            attempt.by = ""  # its end, if that was this task's fault, is nobody's then
        task.report.raise_if_cancelled()

    def _begin(self, task: ExecutorTask[Any]) -> None:
        attempt = _Attempt(task.task_id)
        loading = replace(task, report=_LoadReport(self))
        threading.Thread(target=self._load, args=(loading, attempt), name="load", daemon=True).start()
        self._attempt = attempt

    def _load(self, task: ExecutorTask[Any], attempt: _Attempt) -> None:
        error: BaseException | None = None
        try:
            self._executor.load(task)
        except BaseException as raised:  # noqa: BLE001 - those that wait raise it
            error = raised
        with self._changed:
            attempt.over, attempt.error = True, error
            if error is None:
                self._loaded = True
            elif not (isinstance(error, ExecutorError) and error.reason in _OWN_FAULTS):
                self._error = error
            elif not attempt.by:
                self._attempt = None
            self._changed.notify_all()


class _LoadReport:
    """The `RunReport` of a load: its news is for all that wait, and it is cancelled when all of them are."""

    def __init__(self, load: SharedLoad) -> None:
        self._load = load

    def progress(
        self,
        done: float,
        total: float | None = None,
        *,
        unit: str = "items",
        message: str = "",
        metrics: dict[str, float] | None = None,
    ) -> None:
        """See `RunReport.progress`."""
        for report in self._load.reports():
            report.progress(done, total, unit=unit, message=message, metrics=metrics)

    def log(self, level: LogLevel, message: str) -> None:
        """See `RunReport.log`; one task's log is enough."""
        for report in self._load.reports()[:1]:
            report.log(level, message)

    @property
    def cancelled(self) -> bool:
        """See `RunReport.cancelled`."""
        return all(report.cancelled for report in self._load.reports())

    def raise_if_cancelled(self) -> None:
        """See `RunReport.raise_if_cancelled`."""
        if self.cancelled:
            raise TaskCancelledError("the tasks that waited for the load were asked to stop")
