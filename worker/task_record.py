"""One accepted task from receipt to end. The only place where its state changes; illegal moves raise."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from executors.child_messages import RunTask
from executors.contract import Failure, JsonObject, TaskOutput
from orchestrator_client.messages import TaskEvent, now_iso
from worker.results_folder import RESULT_FILE
from worker.task_preparation import Folder, PreparedTask

State = Literal["QUEUED", "RUNNING", "SUCCEEDED", "FAILED"]
_MOVES: dict[State, tuple[State, ...]] = {
    "QUEUED": ("RUNNING", "SUCCEEDED", "FAILED"),
    "RUNNING": ("QUEUED", "SUCCEEDED", "FAILED"),
    "SUCCEEDED": (),
    "FAILED": (),
}
_TAIL_IN_ERROR = 5


class IllegalMoveError(Exception):
    """A task was moved to a state that it cannot reach from where it is: a fault of the daemon."""


@dataclass(frozen=True)
class Success:
    """The executor returned.

    Attributes:
        output: what it returned.
        run_sec: seconds of the run alone.
        load_sec: seconds of the load; 0 when the engine was warm.
        warm: whether the engine had everything loaded.
    """

    output: TaskOutput
    run_sec: float
    load_sec: float
    warm: bool


Outcome = Success | Failure


@dataclass
class TaskRecord:
    """A task that the journal holds.

    Attributes:
        task_id: its id.
        dispatch: the journal's token of this dispatch.
        kind: its type, for people.
        received_at: seconds since the epoch.
        received: the same moment on the monotonic clock.
        dispatched_at: the orchestrator's time stamp, echoed in events.
        prepared: what was prepared at intake; None when it is too large to be kept while it waits.
        experiment_id: of a tuning manager's task; None for all others.
        engine_key: which engine it needs.
        concurrent: whether that engine runs several tasks at once.
        order: what the engine gets, with its inputs, once these are here.
        put_backs: how often its run was given up because of another task, and it waited again.
        keeps_result: whether its folder holds an earlier result that was not delivered, which its end must not replace.
    """

    task_id: str
    dispatch: str
    kind: str
    received_at: float
    received: float = field(default_factory=time.monotonic)
    dispatched_at: str | None = None
    prepared: PreparedTask | None = None
    experiment_id: int | str | None = None
    engine_key: str = ""
    concurrent: bool = False
    keeps_result: bool = False
    order: RunTask | None = None
    put_backs: int = 0
    state: State = "QUEUED"
    accepted_iso: str = field(default_factory=now_iso)
    started_iso: str = ""
    finished_iso: str = ""
    started: float | None = None
    finished: float | None = None

    def begin(self) -> None:
        """The run begins."""
        self._move("RUNNING")
        self.started = time.monotonic()
        self.started_iso = now_iso()

    def put_back(self) -> None:
        """The run was given up, and not because of this task: it waits again."""
        self._move("QUEUED")
        self.put_backs += 1
        self.started, self.started_iso = None, ""

    def finish(self, outcome: Outcome) -> None:
        """The run is over, or never was."""
        self._move("SUCCEEDED" if isinstance(outcome, Success) else "FAILED")
        self.finished = time.monotonic()
        self.finished_iso = now_iso()

    def _move(self, to: State) -> None:
        if to not in _MOVES[self.state]:
            raise IllegalMoveError(f"task {self.task_id} cannot go from {self.state} to {to}")
        self.state = to

    @property
    def runtime_sec(self) -> float:
        """Seconds between begin and end; 0 if it never began."""
        return 0.0 if self.started is None or self.finished is None else self.finished - self.started

    def queued_fields(self, worker_id: str) -> dict[str, str]:
        """The hash `task:<id>` when it is accepted."""
        return {
            "task_id": self.task_id,
            "status": self.state,
            "task_type": self.kind,
            "worker_id": worker_id,
            "accepted_at": self.accepted_iso,
            "error": "",
            "reason": "",
            "hint": "",
        }

    def started_fields(self) -> dict[str, str]:
        """What changes in the hash when it begins."""
        fields = {"status": self.state, "started_at": self.started_iso}
        return fields | ({"progress_message": ""} if self.put_backs else {})

    def put_back_fields(self, why: str) -> dict[str, str]:
        """What changes in the hash when it waits again."""
        nothing_done = {"started_at": "", "progress_done": "", "progress_total": "", "progress_unit": ""}
        return {"status": self.state, "progress_message": why, **nothing_done}

    def started_event(self, worker_id: str) -> TaskEvent:
        """TASK_STARTED (WIRE 2.2)."""
        payload: JsonObject = {"taskType": self.kind, "started_at": self.started_iso, **self._dispatched()}
        return TaskEvent(type="TASK_STARTED", task_id=self.task_id, worker_id=worker_id, payload=payload)

    def final_event(self, worker_id: str, outcome: Outcome, folder: Folder) -> TaskEvent:
        """TASK_SUCCEEDED or TASK_FAILED (WIRE 2.2)."""
        payload: JsonObject = {
            "taskType": self.kind,
            "runtime_sec": round(self.runtime_sec, 6),
            "started_at": self.started_iso or self.finished_iso,
            "finished_at": self.finished_iso,
            "result_path": str(folder.path / RESULT_FILE),
            **self._dispatched(),
        }
        if self.experiment_id is not None:
            payload["experiment_id"] = self.experiment_id
        if isinstance(outcome, Success):
            payload["engine"] = "warm" if outcome.warm else "cold"
            payload |= _figures(outcome.output.result)
            return TaskEvent(type="TASK_SUCCEEDED", task_id=self.task_id, worker_id=worker_id, payload=payload)
        payload |= {"reason": outcome.reason, "hint": outcome.hint, "retryable": outcome.retryable}
        return TaskEvent(
            type="TASK_FAILED",
            task_id=self.task_id,
            worker_id=worker_id,
            error=error_text(outcome),
            payload=payload,
        )

    def final_fields(self, outcome: Outcome, folder: Folder) -> dict[str, str]:
        """What changes in the hash when it ends."""
        fields = {
            "status": self.state,
            "finished_at": self.finished_iso,
            "result_path": str(folder.path / RESULT_FILE),
        }
        if isinstance(outcome, Success):
            # What an earlier end of the same task has left there goes.
            return fields | {"engine": "warm" if outcome.warm else "cold", "error": "", "reason": "", "hint": ""}
        return fields | {"error": error_text(outcome), "reason": outcome.reason, "hint": outcome.hint}

    def _dispatched(self) -> JsonObject:
        return {"dispatched_at": self.dispatched_at} if self.dispatched_at else {}


def _figures(result: JsonObject) -> JsonObject:
    """What tuning managers record of a result (WIRE 2.5): its numbers, and its score if it has one."""
    found: JsonObject = {}
    for key in ("metrics", "train_metrics", "usage"):
        section = result.get(key)
        if isinstance(section, dict):
            numbers: JsonObject = {name: value for name, value in section.items() if isinstance(value, int | float)}
            found["metrics"] = numbers
            break
    score = result.get("objective_score")
    return found | ({"objective_score": score} if isinstance(score, int | float) else {})


def error_text(failure: Failure) -> str:
    """The `error` of an event: the message, and the engine's last lines where it ended badly."""
    if not failure.log_tail:
        return failure.message
    return "\n".join([failure.message, "last lines of the engine's log:", *failure.log_tail[-_TAIL_IN_ERROR:]])
