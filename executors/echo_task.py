"""`taskType: echo` gives the spec back (WIRE 4.8). The smallest executor: copy it to begin your own."""

from __future__ import annotations

import re

from pydantic import JsonValue

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.task_spec import TaskSpec

_SECRET = re.compile(r"authorization|token$|secret|passw|api_?key", re.IGNORECASE)


class EchoSpec(TaskSpec):
    """Anything goes."""

    any_key_goes = True


class EchoTask(Executor[EchoSpec]):
    """Returns the spec it was given."""

    spec_type = EchoSpec
    exclusive = False

    def run(self, task: ExecutorTask[EchoSpec]) -> TaskOutput:
        """Return `{"ok": true, "echo": <spec>}` (WIRE 5.2), secrets masked (WIRE 9.38)."""
        return TaskOutput(result={"ok": True, "echo": _without_secrets(task.sent_spec)})


def _without_secrets(value: JsonValue) -> JsonValue:
    if isinstance(value, dict):
        return {key: "***" if _SECRET.search(key) else _without_secrets(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_secrets(part) for part in value]
    return value
