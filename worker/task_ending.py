"""What follows a run: results on disk, then the journal, then (over HTTP) the delivery, then the announcement.

Never in another order. A result that has to reach an orchestrator is handed to `worker.task_delivery` in the same
transaction that ends the run, so that finished work is not computed again because of its delivery.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import structlog

from executors.contract import Artifact, Failure, JsonObject
from orchestrator_client.messages import TaskEvent
from worker.delivery_plan import DeliveryJob, DeliveryPlan, DeliveryProgress, Package, Posting
from worker.event_publisher import EventPublisher
from worker.journal_tables import OwedEvent, State, StoredDelivery
from worker.result_content import artifact_fault, results_of
from worker.results_folder import ResultToWrite, drop_partial, write_results
from worker.task_journal import JournalError, TaskJournal
from worker.task_preparation import Folder, PreparedTask
from worker.task_record import Outcome, Success, TaskRecord, error_text

log = structlog.get_logger()

NOT_IN_JOURNAL = -1
_MOST_AT_ONCE = 64
_CATCH_UP_SEC = 1.0
_NOT_WORTH_SENDING: Final = frozenset({"worker_shutdown", "cancelled"})
"""Failures whose end is said at once: nobody needs a summary of them."""


@dataclass(frozen=True)
class EndedTask:
    """A task whose end is durable and not announced yet.

    Attributes:
        owed: its final event.
        fields: what the hash `task:<id>` says of it.
        received: when it came, on the monotonic clock.
        failure: why it failed; None if it succeeded.
        facts: for the log.
    """

    owed: OwedEvent
    fields: dict[str, str]
    received: float
    failure: Failure | None
    facts: dict[str, str | float]


@dataclass(frozen=True)
class _Waiting:
    """An outcome whose results are to be written."""

    record: TaskRecord
    outcome: Outcome
    folder: Folder
    prepared: PreparedTask | None
    ended: asyncio.Future[EndedTask | DeliveryJob]


class TaskEnding:
    """Brings tasks to their end. Those that end while others are being written share the next turn on the disk.

    Args:
        worker_id: this worker.
        journal: where ends are recorded.
        publisher: who announces them.
        min_turnaround_sec: least time between receipt and announcement (WIRE 9.13).
        on_announced: called with task id and success after each announcement.
    """

    def __init__(
        self,
        worker_id: str,
        journal: TaskJournal,
        publisher: EventPublisher,
        min_turnaround_sec: float,
        on_announced: Callable[[str, bool], None] = lambda _task_id, _succeeded: None,
    ) -> None:
        self._worker_id = worker_id
        self._journal = journal
        self._publisher = publisher
        self._min_turnaround_sec = min_turnaround_sec
        self._on_announced = on_announced
        self._waiting: list[_Waiting] = []
        self._writing: asyncio.Task[None] | None = None
        self._unwritten: deque[Callable[[], Awaitable[object]]] = deque()
        self._catching_up: asyncio.Task[None] | None = None
        # Of its own: lookups of names, digests and the like must not keep a task's end waiting.
        self._disk = ThreadPoolExecutor(1, thread_name_prefix="results")

    async def record(
        self, record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None
    ) -> EndedTask | DeliveryJob:
        """Write the results and make the end durable. The outcome may change: results that cannot be written fail.

        Returns:
            The end, to be announced; or what has to be delivered before.
        """
        ended: asyncio.Future[EndedTask | DeliveryJob] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(record, outcome, folder, prepared, ended))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_waiting())
        return await ended

    async def give_up(self, task_id: str, dispatch: str, failure: Failure, *, keep: bool = False) -> EndedTask:
        """Make the end of a task durable that cannot be ended as it should, because something of ours broke.

        Args:
            task_id: the task.
            dispatch: the journal's token.
            failure: what to say.
            keep: whether an earlier result that was not delivered stays.
        """
        event = TaskEvent(
            type="TASK_FAILED",
            task_id=task_id,
            worker_id=self._worker_id,
            error=failure.message,
            payload={"reason": failure.reason, "hint": failure.hint, "retryable": failure.retryable},
        )
        fields = {"status": "FAILED", "error": failure.message, "reason": failure.reason, "hint": failure.hint}
        owed = OwedEvent(NOT_IN_JOURNAL, task_id, dispatch, event.encode())
        return await self._end_in_journal(EndedTask(owed, fields, 0.0, failure, {}), keep=keep)

    async def conclude(self, job: DeliveryJob, failure: Failure | None, *, keep: bool = False) -> EndedTask:
        """Make the end of a delivery durable.

        Args:
            job: the delivery.
            failure: why it failed; None if it succeeded, or if its plan is to say a failure anyway.
            keep: whether it can be tried again later.
        """
        plan = job.plan
        event, fields = plan.event.encode(), plan.fields
        if failure is not None:
            told, fields = plan.failed_event(failure, error_text(failure))
            event = told.encode()
        if failure is None and plan.best_effort:
            failure = Failure(reason="executor_error", message=fields.get("error", ""))
        owed = OwedEvent(NOT_IN_JOURNAL, plan.task_id, plan.dispatch, event)
        facts: dict[str, str | float] = {"delivered_sec": round(time.time() - job.since, 3)}
        fields = {**fields, "progress_message": ""}  # what went wrong on the way does not matter any more
        return await self._end_in_journal(EndedTask(owed, fields, job.received, failure, facts), keep=keep)

    async def _end_in_journal(self, ended: EndedTask, *, keep: bool) -> EndedTask:
        state: State = "succeeded" if ended.failure is None else "failed"
        try:
            number = await self._journal.end_delivery(ended.owed, state, keep=keep)
        except JournalError as error:
            text = "the end of a task is not in the journal yet"
            log.error(text, action="journal", task_id=ended.owed.task_id, error=str(error))
            self._write_later(lambda: self._journal.end_delivery(ended.owed, state, keep=keep))
            return ended
        return replace(ended, owed=replace(ended.owed, seq=number))

    def _write_later(self, write: Callable[[], Awaitable[object]]) -> None:
        """Try again until the journal takes it: what it does not know as ended it would not accept again."""
        self._unwritten.append(write)
        if self._catching_up is None or self._catching_up.done():
            self._catching_up = asyncio.create_task(self._catch_up())

    async def _catch_up(self) -> None:
        while self._unwritten:
            await asyncio.sleep(_CATCH_UP_SEC)
            with contextlib.suppress(JournalError):  # it was logged once
                await self._unwritten[0]()
                self._unwritten.popleft()
        log.info("the journal has all ends again", action="journal")

    async def announce(self, ended: EndedTask) -> None:
        """Say it, but not sooner than `min_turnaround_sec` after the receipt."""
        early = ended.received + self._min_turnaround_sec - time.monotonic()
        if early > 0:
            await asyncio.sleep(early)
        self._publisher.task_ended(ended.owed, ended.fields)
        task_id, failure = ended.owed.task_id, ended.failure
        if failure is None:
            log.info("task succeeded", action="task_end", task_id=task_id, **ended.facts)
        else:
            reason = ended.fields.get("reason", failure.reason)
            log.warning("task failed", action="task_end", task_id=task_id, reason=reason, error=failure.message)
        self._on_announced(task_id, failure is None)

    async def _write_waiting(self) -> None:
        loop = asyncio.get_running_loop()
        while self._waiting:
            batch, self._waiting = self._waiting[:_MOST_AT_ONCE], self._waiting[_MOST_AT_ONCE:]
            try:
                faults = await loop.run_in_executor(self._disk, _write, batch)
                ending = [
                    (each, end)
                    for each, fault in zip(batch, faults, strict=True)
                    if (end := self._end_of(each, fault)) is not None
                ]
                durable = await self._make_durable([end for _, end in ending])
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                for each in batch:
                    if not each.ended.done():
                        each.ended.set_exception(error)
            else:
                # Only now: a kill before the journal has the end runs the task again, which may go on behind them.
                done = [each.folder.path for each, fault in zip(batch, faults, strict=True) if _succeeded(each, fault)]
                loop.run_in_executor(self._disk, _drop_partials, done)  # nobody waits for it
                for (each, _), end in zip(ending, durable, strict=True):
                    each.ended.set_result(end)

    def _end_of(self, each: _Waiting, fault: Failure | None) -> EndedTask | DeliveryJob | None:
        """One task's end; None if it broke, which only this task may feel."""
        try:
            return self._end(each, fault)
        except Exception as error:  # noqa: BLE001 - whoever waits gets it
            each.ended.set_exception(error)
            return None

    def _end(self, each: _Waiting, fault: Failure | None) -> EndedTask | DeliveryJob:
        record, outcome, folder = each.record, each.outcome, each.folder
        if fault is not None:
            log.error("cannot write results", action="results", task_id=record.task_id, error=fault.message)
            if isinstance(outcome, Success):
                outcome = fault
        record.finish(outcome)
        event = record.final_event(self._worker_id, outcome, folder)
        fields = record.final_fields(outcome, folder)
        if fault is None and not record.keeps_result:
            plan = _plan(each, event.encode().decode(), event.payload, fields)
            if plan is not None:
                return DeliveryJob(plan, received=record.received)
        failure = None if isinstance(outcome, Success) else outcome
        facts: dict[str, str | float] = {}
        if isinstance(outcome, Success):
            facts = {"run_sec": round(outcome.run_sec, 3), "engine": "warm" if outcome.warm else "cold"}
        owed = OwedEvent(NOT_IN_JOURNAL, record.task_id, record.dispatch, event.encode())
        return EndedTask(owed, fields, record.received, failure, facts)

    async def _make_durable(self, ends: list[EndedTask | DeliveryJob]) -> list[EndedTask | DeliveryJob]:
        final = [end for end in ends if isinstance(end, EndedTask)]
        entries: list[tuple[OwedEvent, State]] = [
            (end.owed, "succeeded" if end.failure is None else "failed") for end in final
        ]
        deliveries = [stored(end) for end in ends if isinstance(end, DeliveryJob)]
        try:
            numbers = iter(await self._journal.end(entries, deliveries))
        except JournalError as error:
            # The ends are not durable, but saying nothing would lose the tasks for certain.
            log.error("ends of tasks are not in the journal yet", action="journal", tasks=len(ends), error=str(error))
            self._write_later(lambda: self._journal.end(entries, deliveries))
            return ends
        return [
            replace(end, owed=replace(end.owed, seq=next(numbers))) if isinstance(end, EndedTask) else end
            for end in ends
        ]


def stored(job: DeliveryJob) -> StoredDelivery:
    """A delivery as the journal keeps it."""
    plan, progress = job.plan.model_dump_json().encode(), job.progress.model_dump_json().encode()
    return StoredDelivery(job.plan.task_id, job.plan.dispatch, job.plan.work, plan, progress, job.since)


def job_of(delivery: StoredDelivery) -> DeliveryJob:
    """A delivery read back from the journal.

    Raises:
        pydantic.ValidationError: another version wrote it.
    """
    plan = DeliveryPlan.model_validate_json(delivery.plan).model_copy(update={"dispatch": delivery.dispatch})
    return DeliveryJob(plan, DeliveryProgress.model_validate_json(delivery.progress), since=delivery.since)


def _plan(each: _Waiting, event: str, payload: JsonObject, fields: dict[str, str]) -> DeliveryPlan | None:
    """What has to be delivered; None if the results stay here as they are."""
    prepared, outcome, record = each.prepared, each.outcome, each.record
    own = Posting(
        task_id=record.task_id,
        folder=each.folder.path,
        required=each.folder.required,
        destination=each.folder.destination,
    )
    metadata = {key: value for key, value in payload.items() if key not in {"result_path", "hint"}}
    postings: tuple[Posting, ...] = (own,)
    packages: tuple[Package, ...] = ()
    if isinstance(outcome, Success) and prepared is not None:
        packages = _packages(own, outcome.output.artifacts)
        folders = prepared.child_folders | {key: failed.folder for key, failed in prepared.failed_children.items()}
        children = [
            Posting(task_id=key, folder=folder.path, required=folder.required, destination=folder.destination)
            for key, folder in folders.items()
        ]
        postings = (*children, own)
        for posting in children:
            output = outcome.output.children.get(posting.task_id)
            packages += _packages(posting, output.artifacts) if output is not None else ()
    elif isinstance(outcome, Failure) and outcome.reason in _NOT_WORTH_SENDING:
        return None
    if not packages and not any(posting.destination for posting in postings):
        return None
    return DeliveryPlan(
        task_id=record.task_id,
        dispatch=record.dispatch,
        kind=record.kind,
        postings=postings,
        packages=packages,
        event=event,
        fields=fields,
        metadata=metadata,
        best_effort=isinstance(outcome, Failure),
        work=prepared.work if prepared is not None else "",
    )


def _packages(posting: Posting, artifacts: tuple[Artifact, ...]) -> tuple[Package, ...]:
    return tuple(
        Package(task_id=posting.task_id, path=each.path, key=each.key, kind=each.kind)
        for each in artifacts
        if posting.destination is not None or (each.archive_always and each.kind == "folder")
    )


def _write(batch: list[_Waiting]) -> list[Failure | None]:
    """Write all results of some tasks. Returns why each task's cannot be written; one task's fault is its own."""
    faults: list[Failure | None] = []
    results: list[ResultToWrite] = []
    owner: list[int] = []
    for number, each in enumerate(batch):
        try:
            fault = _artifact_fault(each)
            own = results_of(each.record, fault or each.outcome, each.folder, each.prepared)
        except Exception as error:  # noqa: BLE001 - it becomes the task's failure
            fault, own = _unwritten(each.folder, error), []
        faults.append(fault)
        if not each.record.keeps_result:
            results += own
            owner += [number] * len(own)
    for number, trouble in zip(owner, write_results(results), strict=True):
        if trouble is not None:
            faults[number] = faults[number] or _unwritten(batch[number].folder, trouble)
    return faults


def _succeeded(each: _Waiting, fault: Failure | None) -> bool:
    return fault is None and isinstance(each.outcome, Success)


def _drop_partials(folders: list[Path]) -> None:
    for folder in folders:
        drop_partial(folder)


def _artifact_fault(each: _Waiting) -> Failure | None:
    if not isinstance(each.outcome, Success):
        return None
    children = each.prepared.child_folders if each.prepared is not None else {}
    return artifact_fault(each.outcome, each.folder.path, children)


def _unwritten(folder: Folder, error: Exception) -> Failure:
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return Failure(
        reason="disk_full" if full else "result_write",
        message=f"the results cannot be written to {folder.path}: {text}",
        hint="free disk space on the worker" if full else "check RESULTS_DIR and its permissions on the worker",
        retryable=True,
    )
