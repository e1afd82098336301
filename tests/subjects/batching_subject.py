"""An executor that runs several tasks at once, in whatever way `spec.act` says, and tells how many there were."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.errors import ModelLoadError
from executors.task_spec import TaskSpec

LONG_SEC = 600
_POLL_SEC = 0.01


class BatchingSpec(TaskSpec):
    """`model` decides what is loaded, and so which tasks may run together.

    Attributes:
        act: what the run does; all but "deaf" hear a cancel.
        until: wait until this file exists before acting.
        load_until: the load waits for this file.
        load: how the load ends; "obedient": when its task is cancelled.
        filler: makes the task large.
    """

    model: str = "small"
    act: Literal["fine", "raise", "kill", "exit", "no_memory", "deaf"] = "fine"
    until: Path | None = None
    load_until: Path | None = None
    load: Literal["fine", "raise", "obedient"] = "fine"
    filler: str = ""


Task = ExecutorTask[BatchingSpec]


class Batching(Executor[BatchingSpec]):
    """Counts the tasks that are inside."""

    spec_type = BatchingSpec
    concurrent = True

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._most = 0
        self._loads = 0

    @classmethod
    def engine_key(cls, spec: BatchingSpec) -> str:
        return spec.model

    def load(self, task: Task) -> None:
        self._loads += 1
        task.report.progress(0, 1, message="loading")
        while task.spec.load == "obedient":
            task.report.raise_if_cancelled()
            time.sleep(_POLL_SEC)
        _wait_for(task.spec.load_until, lambda: None)
        if task.spec.load == "raise":
            raise ModelLoadError(f"spec.model is {task.spec.model!r}: no such model", hint="name another")

    def run(self, task: Task) -> TaskOutput:
        with self._lock:
            self._inside += 1
            self._most = max(self._most, self._inside)
        try:
            os.write(1, f"{task.task_id} is inside\n".encode())  # at once: `print` of several threads mixes lines
            task.report.progress(0, 1, message=f"inside {task.task_id}")
            hears = (lambda: None) if task.spec.act == "deaf" else task.report.raise_if_cancelled
            _wait_for(task.spec.until, hears)
            _ACTS[task.spec.act](task)
            most, loads = self._most, self._loads
            return TaskOutput(
                result={"ok": True, "own": task.task_id, "most": most, "loads": loads, "pid": os.getpid()}
            )
        finally:
            with self._lock:
                self._inside -= 1


def _wait_for(file: Path | None, check: Callable[[], None]) -> None:
    while file is not None and not file.exists():
        check()
        time.sleep(_POLL_SEC)


def _fine(task: Task) -> None:
    del task


def _raise(task: Task) -> None:
    raise ValueError(f"the subject {task.task_id} raises")


def _no_memory(task: Task) -> None:
    raise MemoryError(task.task_id)


def _kill(task: Task) -> None:
    del task
    os.kill(os.getpid(), signal.SIGKILL)


def _exit(task: Task) -> None:
    del task
    sys.exit(3)


def _deaf(task: Task) -> None:
    del task
    time.sleep(LONG_SEC)


_ACTS: dict[str, Callable[[Task], None]] = {
    "fine": _fine, "raise": _raise, "kill": _kill, "exit": _exit, "no_memory": _no_memory, "deaf": _deaf,
}  # fmt: skip
