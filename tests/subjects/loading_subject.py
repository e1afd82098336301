"""An executor that loads something, and tells how often it did."""

from __future__ import annotations

import os
import time

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.errors import ModelLoadError
from executors.task_spec import TaskSpec


class LoadingSpec(TaskSpec):
    """`weights` decides what is loaded."""

    weights: str
    load_sec: float = 0.0
    fail_load: bool = False
    run_sec: float = 0.0


class Loading(Executor[LoadingSpec]):
    """Counts its loads and runs."""

    spec_type = LoadingSpec

    def __init__(self) -> None:
        self._loaded: list[str] = []
        self._runs = 0

    @classmethod
    def engine_key(cls, spec: LoadingSpec) -> str:
        return spec.weights

    def load(self, task: ExecutorTask[LoadingSpec]) -> None:
        task.report.progress(0, 1, message="loading")
        time.sleep(task.spec.load_sec)
        if task.spec.fail_load:
            raise ModelLoadError(f"spec.weights is {task.spec.weights!r}: no such weights", hint="name others")
        self._loaded.append(task.spec.weights)

    def run(self, task: ExecutorTask[LoadingSpec]) -> TaskOutput:
        task.report.progress(0, 1, message="running")
        time.sleep(task.spec.run_sec)
        self._runs += 1
        return TaskOutput(result={"ok": True, "pid": os.getpid(), "loaded": [*self._loaded], "runs": self._runs})


class SecondLoading(Loading):
    """Another kind of task with equal keys."""
