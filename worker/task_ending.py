"""What follows a run: results on disk, then the journal, then the announcement. Never in another order."""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import dataclass

import structlog
from pydantic import JsonValue

from executors.contract import Failure, JsonObject
from worker.event_publisher import EventPublisher
from worker.results_folder import write_result
from worker.task_journal import JournalError, OwedEvent, State, TaskJournal
from worker.task_preparation import Folder, PreparedTask
from worker.task_record import Outcome, Success, TaskRecord, error_text

log = structlog.get_logger()

NOT_IN_JOURNAL = -1


@dataclass(frozen=True)
class EndedTask:
    """A task whose end is durable and not announced yet."""

    record: TaskRecord
    outcome: Outcome
    folder: Folder
    owed: OwedEvent


class TaskEnding:
    """Brings tasks to their end.

    Args:
        worker_id: this worker.
        journal: where ends are recorded.
        publisher: who announces them.
        min_turnaround_sec: least time between receipt and announcement (WIRE 9.13).
    """

    def __init__(
        self, worker_id: str, journal: TaskJournal, publisher: EventPublisher, min_turnaround_sec: float
    ) -> None:
        self._worker_id = worker_id
        self._journal = journal
        self._publisher = publisher
        self._min_turnaround_sec = min_turnaround_sec

    async def record(
        self, record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None
    ) -> EndedTask:
        """Write the results and make the end durable. The outcome may change: results that cannot be written fail."""
        try:
            await asyncio.to_thread(_write, record, outcome, folder, prepared)
        except OSError as error:
            log.error(
                "cannot write results",
                action="results", task_id=record.task_id, folder=str(folder.path), error=str(error),
            )  # fmt: skip
            if isinstance(outcome, Success):
                outcome = _unwritten(folder, error)
        record.finish(outcome)
        body = record.final_event(self._worker_id, outcome, folder).encode()
        try:
            state: State = "succeeded" if isinstance(outcome, Success) else "failed"
            number = await self._journal.end(record.task_id, record.dispatch, state, body)
        except JournalError as error:
            # The end is not durable, but saying nothing would lose the task for certain.
            log.error(
                "the end of a task is not in the journal", action="journal", task_id=record.task_id, error=str(error)
            )
            number = NOT_IN_JOURNAL
        return EndedTask(record, outcome, folder, OwedEvent(number, record.task_id, record.dispatch, body))

    async def announce(self, ended: EndedTask) -> None:
        """Say it, but not sooner than `min_turnaround_sec` after the receipt."""
        record, outcome = ended.record, ended.outcome
        early = record.received + self._min_turnaround_sec - time.monotonic()
        if early > 0:
            await asyncio.sleep(early)
        self._publisher.task_ended(ended.owed, record.final_fields(outcome, ended.folder))
        if isinstance(outcome, Success):
            log.info(
                "task succeeded",
                action="task_end", task_id=record.task_id, run_sec=round(outcome.run_sec, 3),
                engine="warm" if outcome.warm else "cold",
            )  # fmt: skip
        else:
            log.warning(
                "task failed",
                action="task_end", task_id=record.task_id, reason=outcome.reason, error=outcome.message,
            )  # fmt: skip


def _unwritten(folder: Folder, error: OSError) -> Failure:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return Failure(
        reason="disk_full" if full else "result_write",
        message=f"the results cannot be written to {folder.path}: {error.strerror or error}",
        hint="free disk space on the worker" if full else "check RESULTS_DIR and its permissions on the worker",
        retryable=True,
    )


def _write(record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None) -> None:
    """Children first, then the task itself: whoever sees the parent's result finds the children's."""
    timings = _timings(record, outcome)
    warnings: list[JsonValue] = [*(prepared.warnings if prepared else [])]
    if isinstance(outcome, Success):
        warnings += outcome.output.warnings
        if prepared is not None:
            _write_children(outcome, prepared, timings)
        result = {**outcome.output.result, "task_id": record.task_id, "timings": timings, "warnings": warnings}
    else:
        result = {**failed_result(record.task_id, outcome), "timings": timings, "warnings": warnings}
    write_result(folder.path, record.task_id, result, folder.required)


def _write_children(outcome: Success, prepared: PreparedTask, timings: JsonObject) -> None:
    for child_id, folder in prepared.child_folders.items():
        output = outcome.output.children.get(child_id)
        if output is not None and output.result is not None:
            result = {**output.result, "task_id": child_id, "timings": timings, "warnings": []}
        elif output is not None and output.failure is not None:
            result = failed_result(child_id, output.failure)
        else:
            silent = Failure(
                reason="executor_error", message=f"the executor returned nothing for merged child {child_id}"
            )
            result = failed_result(child_id, silent)
        write_result(folder.path, child_id, result, folder.required)
    for child_id, failed in prepared.failed_children.items():
        write_result(failed.folder.path, child_id, failed_result(child_id, failed.failure), failed.folder.required)


def failed_result(task_id: str, failure: Failure) -> JsonObject:
    """`responses.json` of a task that failed."""
    return {
        "ok": False,
        "task_id": task_id,
        "error": error_text(failure),
        "reason": failure.reason,
        "hint": failure.hint,
        "retryable": failure.retryable,
        "log_tail": list(failure.log_tail),
    }


def _timings(record: TaskRecord, outcome: Outcome) -> JsonObject:
    timings: JsonObject = {"queue_sec": round((record.started or time.monotonic()) - record.received, 6)}
    if isinstance(outcome, Success):
        timings["load_sec"] = round(outcome.load_sec, 6)
        timings["run_sec"] = round(outcome.run_sec, 6)
        timings["engine"] = "warm" if outcome.warm else "cold"
    return timings
