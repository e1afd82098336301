"""A task message that is for this worker, read and checked, on its way into the journal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from executors.contract import Failure
from worker.journal_tables import Acceptance, Arrival
from worker.task_preparation import Folder, PreparedTask
from worker.task_record import TaskRecord

_KEEP_PREPARED_BYTES: Final = 64 * 1024
"""Larger tasks are read from the journal again when their turn comes, so that a long queue needs little memory."""


@dataclass(frozen=True)
class ArrivedMessage:
    """A message that is ours. Exactly one of `prepared` and `failure` is set.

    Attributes:
        task_id: its task.
        kind: the task's type, for people.
        raw: as it came.
        received_at: seconds since the epoch.
        received: the same moment on the monotonic clock.
        dispatched_at: the orchestrator's time stamp.
        prepared: what can be run.
        failure: why nothing can.
        experiment_id: of a tuning manager's task.
        answer_folder: where the failure goes, if the message says that much.
    """

    task_id: str
    kind: str
    raw: bytes
    received_at: float
    received: float
    dispatched_at: str | None
    prepared: PreparedTask | None
    failure: Failure | None
    experiment_id: int | str | None = None
    answer_folder: Folder | None = None

    def wish(self) -> Arrival:
        """What the journal is asked."""
        work = self.prepared.work if self.prepared is not None else ""
        return Arrival(self.task_id, self.raw, self.received_at, work, refused=self.failure is not None)

    def record(self, acceptance: Acceptance) -> TaskRecord:
        """The task, once the journal has it."""
        keep = len(self.raw) <= _KEEP_PREPARED_BYTES
        return TaskRecord(
            task_id=self.task_id,
            dispatch=acceptance.dispatch,
            kind=self.kind,
            received_at=self.received_at,
            received=self.received,
            dispatched_at=self.dispatched_at,
            prepared=self.prepared if keep else None,
            experiment_id=self.experiment_id,
            engine_key=self.prepared.engine_key if self.prepared is not None else "",
            concurrent=self.prepared is not None and self.prepared.concurrent,
            keeps_result=acceptance.keeps_result,
        )
