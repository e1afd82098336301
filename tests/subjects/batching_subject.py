"""An executor that runs several tasks at once, in whatever way `spec.act` says, and tells how many there were."""

from __future__ import annotations

import itertools
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

from pydantic import JsonValue

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.errors import BadSpecError, ModelLoadError
from executors.input_spec import InputRequest, JsonlSource
from executors.task_spec import TaskSpec

LONG_SEC = 600
_POLL_SEC = 0.01
_TALK_SEC = 0.1


class BatchingSpec(TaskSpec):
    """`model` decides what is loaded, and so which tasks may run together.

    Attributes:
        act: what the run does; all but "deaf" hear a cancel; "talk": print until `until` exists.
        until: wait until this file exists before acting.
        load_until: the load waits for this file.
        load: how the load ends; "obedient": when all that wait for it are cancelled; "talk" and "report": it prints or
            reports all the time.
        filler: makes the task large.
        jsonl: an input; its path is in the result.
    """

    model: str = "small"
    act: Literal["fine", "raise", "kill", "exit", "no_memory", "deaf", "talk"] = "fine"
    until: Path | None = None
    load_until: Path | None = None
    load: Literal["fine", "raise", "bad_spec", "obedient", "talk", "report"] = "fine"
    filler: str = ""
    jsonl: JsonlSource | None = None

    def inputs(self) -> tuple[InputRequest, ...]:
        return (self.jsonl.request("jsonl"),) if self.jsonl else ()


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
        steps = itertools.count(1)
        _wait_for(task.spec.load_until, lambda: _LOAD_STEPS.get(task.spec.load, _quiet)(task, next(steps)))
        if task.spec.load == "bad_spec":
            raise BadSpecError("spec.load is 'bad_spec'", hint="say something else")
        if task.spec.load == "raise":
            raise ModelLoadError(f"spec.model is {task.spec.model!r}: no such model", hint="name another")

    def run(self, task: Task) -> TaskOutput:
        with self._lock:
            self._inside += 1
            self._most = max(self._most, self._inside)
        try:
            os.write(1, f"{task.task_id} is inside\n".encode())  # at once: `print` of several threads mixes lines
            task.report.progress(0, 1, message=f"inside {task.task_id}")
            _wait_for(task.spec.until, partial(_WAITS.get(task.spec.act, _hear), task))
            _ACTS[task.spec.act](task)
            most, loads = self._most, self._loads
            inputs: dict[str, JsonValue] = {name: str(path) for name, path in task.inputs.items()}
            result = {"ok": True, "own": task.task_id, "most": most, "loads": loads, "pid": os.getpid()}
            return TaskOutput(result={**result, "inputs": inputs})
        finally:
            with self._lock:
                self._inside -= 1


def _wait_for(file: Path | None, check: Callable[[], None]) -> None:
    while file is not None and not file.exists():
        check()
        time.sleep(_POLL_SEC)


def _quiet(task: Task, step: int) -> None:
    del task, step


def _print_step(task: Task, step: int) -> None:
    os.write(1, f"{task.task_id} loads, step {step}\n".encode())
    time.sleep(_TALK_SEC)


def _report_step(task: Task, step: int) -> None:
    task.report.progress(step, message="loading")
    time.sleep(_TALK_SEC)


_LOAD_STEPS = {"talk": _print_step, "report": _report_step}


def _hear(task: Task) -> None:
    task.report.raise_if_cancelled()


def _talk(task: Task) -> None:
    os.write(1, f"{task.task_id} talks\n".encode())
    time.sleep(_TALK_SEC)


_WAITS: dict[str, Callable[[Task], None]] = {"deaf": lambda _: None, "talk": _talk}


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
    "talk": _fine,
}  # fmt: skip
