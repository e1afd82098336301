"""Executors whose own code fails in the daemon, where specs are validated."""

from __future__ import annotations

from pydantic import model_validator

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.task_spec import TaskSpec


class AngrySpec(TaskSpec):
    """Raises something that pydantic does not catch."""

    @model_validator(mode="before")
    @classmethod
    def _raise(cls, value: object) -> object:
        del value
        raise KeyError("validator")


class AngryCheck(Executor[AngrySpec]):
    """Its spec cannot be read."""

    spec_type = AngrySpec

    def run(self, task: ExecutorTask[AngrySpec]) -> TaskOutput:
        raise AssertionError(task.task_id)


class AngryKey(Executor[TaskSpec]):
    """Its engine key cannot be made."""

    spec_type = TaskSpec

    @classmethod
    def engine_key(cls, spec: TaskSpec) -> str:
        raise KeyError(f"no key for {spec.task_type}")

    def run(self, task: ExecutorTask[TaskSpec]) -> TaskOutput:
        raise AssertionError(task.task_id)
