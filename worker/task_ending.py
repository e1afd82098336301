"""What follows a run: results on disk, then the journal, then the announcement. Never in another order."""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import dataclass, replace

import structlog
from pydantic import JsonValue

from executors.contract import Failure, JsonObject
from worker.event_publisher import EventPublisher
from worker.results_folder import ResultToWrite, write_results
from worker.task_journal import JournalError, OwedEvent, State, TaskJournal
from worker.task_preparation import Folder, PreparedTask
from worker.task_record import Outcome, Success, TaskRecord, error_text

log = structlog.get_logger()

NOT_IN_JOURNAL = -1
_MOST_AT_ONCE = 64


@dataclass(frozen=True)
class EndedTask:
    """A task whose end is durable and not announced yet."""

    record: TaskRecord
    outcome: Outcome
    folder: Folder
    owed: OwedEvent


@dataclass(frozen=True)
class _Waiting:
    """An outcome whose results are to be written."""

    record: TaskRecord
    outcome: Outcome
    folder: Folder
    prepared: PreparedTask | None
    ended: asyncio.Future[EndedTask]


class TaskEnding:
    """Brings tasks to their end. Those that end while others are being written share the next turn on the disk.

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
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None

    async def record(
        self, record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None
    ) -> EndedTask:
        """Write the results and make the end durable. The outcome may change: results that cannot be written fail."""
        ended: asyncio.Future[EndedTask] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(record, outcome, folder, prepared, ended))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        return await ended

    async def _write_waiting(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST_AT_ONCE], self._waiting[_MOST_AT_ONCE:]
            try:
                errors = await asyncio.to_thread(_write, batch)
                ends = await self._make_durable(
                    [self._end(each, error) for each, error in zip(batch, errors, strict=True)]
                )
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                for each in batch:
                    each.ended.set_exception(error)
            else:
                for each, end in zip(batch, ends, strict=True):
                    each.ended.set_result(end)

    def _end(self, each: _Waiting, error: Exception | None) -> EndedTask:
        record, outcome, folder = each.record, each.outcome, each.folder
        if error is not None:
            log.error(
                "cannot write results",
                action="results", task_id=record.task_id, folder=str(folder.path), error=str(error),
            )  # fmt: skip
            if isinstance(outcome, Success):
                outcome = _unwritten(folder, error)
        record.finish(outcome)
        event = record.final_event(self._worker_id, outcome, folder).encode()
        return EndedTask(record, outcome, folder, OwedEvent(NOT_IN_JOURNAL, record.task_id, record.dispatch, event))

    async def _make_durable(self, ends: list[EndedTask]) -> list[EndedTask]:
        entries: list[tuple[OwedEvent, State]] = [
            (end.owed, "succeeded" if isinstance(end.outcome, Success) else "failed") for end in ends
        ]
        try:
            numbers = await self._journal.end(entries)
        except JournalError as error:
            # The ends are not durable, but saying nothing would lose the tasks for certain.
            log.error("ends of tasks are not in the journal", action="journal", tasks=len(ends), error=str(error))
            return ends
        return [replace(end, owed=replace(end.owed, seq=number)) for end, number in zip(ends, numbers, strict=True)]

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


def _unwritten(folder: Folder, error: Exception) -> Failure:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Failure(
        reason="disk_full" if full else "result_write",
        message=f"the results cannot be written to {folder.path}: {text}",
        hint="free disk space on the worker" if full else "check RESULTS_DIR and its permissions on the worker",
        retryable=True,
    )


def _write(batch: list[_Waiting]) -> list[Exception | None]:
    """Write all results of some tasks. Returns each task's first error."""
    results: list[ResultToWrite] = []
    owner: list[int] = []
    for number, each in enumerate(batch):
        own = _results(each)
        results += own
        owner += [number] * len(own)
    errors: list[Exception | None] = [None] * len(batch)
    for number, error in zip(owner, write_results(results), strict=True):
        errors[number] = errors[number] or error
    return errors


def _results(each: _Waiting) -> list[ResultToWrite]:
    """A task's results. Children first: whoever sees the parent's result finds the children's."""
    record, outcome, prepared = each.record, each.outcome, each.prepared
    timings = _timings(record, outcome)
    warnings: list[JsonValue] = [*(prepared.warnings if prepared else [])]
    children: list[ResultToWrite] = []
    if isinstance(outcome, Success):
        warnings += outcome.output.warnings
        if prepared is not None:
            children = _children(outcome, prepared, timings)
        result = {**outcome.output.result, "task_id": record.task_id, "timings": timings, "warnings": warnings}
    else:
        result = {**failed_result(record.task_id, outcome), "timings": timings, "warnings": warnings}
    return [*children, ResultToWrite(each.folder.path, record.task_id, result, each.folder.required)]


def _children(outcome: Success, prepared: PreparedTask, timings: JsonObject) -> list[ResultToWrite]:
    results = []
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
        results.append(ResultToWrite(folder.path, child_id, result, folder.required))
    for child_id, failed in prepared.failed_children.items():
        result = failed_result(child_id, failed.failure)
        results.append(ResultToWrite(failed.folder.path, child_id, result, failed.folder.required))
    return results


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
