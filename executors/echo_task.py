"""`taskType: echo` gives the spec back (WIRE 4.8). The smallest executor: copy it to begin your own."""

from __future__ import annotations

from executors.contract import Executor, ExecutorTask, TaskOutput
from executors.secret_masking import without_secrets
from executors.task_spec import TaskSpec


class EchoSpec(TaskSpec):
    """Anything goes."""

    any_key_goes = True


class EchoTask(Executor[EchoSpec]):
    """Returns the spec it was given."""

    spec_type = EchoSpec
    exclusive = False

    def run(self, task: ExecutorTask[EchoSpec]) -> TaskOutput:
        """Return `{"ok": true, "echo": <spec>}` (WIRE 5.2), secrets masked (WIRE 9.38)."""
        return TaskOutput(result={"ok": True, "echo": without_secrets(task.sent_spec)})
