"""The order of a task's life: wait → inputs → run → end → deliver.

One task runs at a time, or several that share an engine which can do that. Ends are written, and results delivered,
while the next one runs; inputs of the next one are fetched meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Final

import structlog

from executors.child_messages import Progress, RunTask
from executors.contract import Failure
from orchestrator_client.messages import decode_envelope, decode_head
from worker.backlog import Backlog
from worker.delivery_plan import DeliveryJob
from worker.engine_end import EngineEnd, failure_of
from worker.engine_pool import EnginePool
from worker.event_publisher import EventPublisher
from worker.progress_news import ProgressNews
from worker.results_folder import prepare
from worker.running_tasks import RunningTasks
from worker.settings import Settings
from worker.task_delivery import TaskDelivery
from worker.task_ending import TaskEnding
from worker.task_execution import Displaced, TaskExecution
from worker.task_inputs import InputProgress, TaskInputs
from worker.task_journal import JournalError, TaskJournal
from worker.task_preparation import Folder, PreparedTask, RejectedError, TaskPreparation
from worker.task_record import Outcome, TaskRecord
from worker.worker_presence import WorkerPresence

_MOST_PUT_BACKS: Final = 2
"""How often a task runs again because its engine was ended for another one's sake."""
_MOST_UNWRITTEN_ENDS: Final = 64
"""Ended tasks whose results may be on their way to disk while the next task runs."""

log = structlog.get_logger()


@dataclass(frozen=True)
class RunnerParts:
    """What the runner works with."""

    settings: Settings
    worker_id: str
    preparation: TaskPreparation
    pool: EnginePool
    journal: TaskJournal
    publisher: EventPublisher
    presence: WorkerPresence
    news: ProgressNews
    ending: TaskEnding
    delivery: TaskDelivery
    inputs: TaskInputs


class TaskRunner:
    """Runs what was accepted, in the order that `worker.backlog` makes."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._open: dict[str, TaskRecord] = {}
        settings = parts.settings
        self._backlog = Backlog(settings.worker_max_queue_skips, settings.worker_max_batched_tasks)
        self._running = RunningTasks()
        self._changed = asyncio.Event()
        """Set when a task begins to wait, and when one has run."""
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._none_arriving = asyncio.Event()
        self._none_arriving.set()
        self._ends: set[asyncio.Task[None]] = set()
        self._unwritten = asyncio.Semaphore(_MOST_UNWRITTEN_ENDS)
        self._draining = False
        self._arriving = 0

    @property
    def open_tasks(self) -> int:
        """How many accepted tasks have not ended."""
        return len(self._open)

    @property
    def arriving(self) -> bool:
        """Whether messages for this worker are being accepted."""
        return self._arriving > 0

    def expect(self, arrivals: int) -> None:
        """Some messages for this worker are being accepted (or, negative, have been): do not look idle meanwhile."""
        self._arriving += arrivals
        if self._arriving:
            self._none_arriving.clear()
        else:
            self._none_arriving.set()
        self._show_status()

    def enqueue(self, record: TaskRecord) -> None:
        """Take over an accepted task."""
        self._admit(record)
        if self._draining:
            self._end_soon(record, failure_of(EngineEnd("worker_shutdown")), self._folder(record), record.prepared)
            return
        self._backlog.add(record)
        self._changed.set()
        self._fetch_ahead()

    def deliver(self, record: TaskRecord, job: DeliveryJob) -> None:
        """Take over an accepted task whose work is done already: only its delivery failed before."""
        self._parts.publisher.task_queued(record.task_id, record.queued_fields(self._parts.worker_id))
        self._parts.delivery.begin(job)

    def reject(self, record: TaskRecord, failure: Failure, folder: Folder | None = None) -> None:
        """End an accepted task that cannot run; its failure goes to `folder`, if there is one of its own."""
        self._admit(record)
        self._end_soon(record, failure, folder or self._folder(record), None)

    def cancel(self, task_id: str) -> bool:
        """Stop a task that waits or runs; False if there is none of that id."""
        record = self._backlog.remove(task_id)
        if record is not None:
            self._end_soon(record, failure_of(EngineEnd("cancelled")), self._folder(record), record.prepared)
            return True
        return self._running.stop(task_id, "cancelled") or self._parts.delivery.cancel(task_id)

    async def run(self) -> None:
        """Run tasks until cancelled."""
        async with asyncio.TaskGroup() as runs:
            while True:
                running = self._running
                record = self._backlog.take(running.engine_key, len(running), self._parts.pool.warm_keys())
                if record is None:
                    self._changed.clear()
                    await self._changed.wait()
                else:
                    running.add(record)
                    runs.create_task(self._run_one(record))

    async def drain(self, grace_sec: float, hurry: asyncio.Event) -> None:
        """Take no more, give the running tasks their time, then stop them; returns when every task has ended.

        What is being accepted just now still gets its end here: it is in the journal, or about to be.
        """
        self._draining = True
        await self._none_arriving.wait()
        for record in self._backlog.clear():
            self._end_soon(record, failure_of(EngineEnd("worker_shutdown")), self._folder(record), record.prepared)
        deadline = time.monotonic() + grace_sec
        hurrying = asyncio.ensure_future(hurry.wait())
        done = asyncio.ensure_future(self._none_open.wait())
        while self._running and not hurry.is_set() and time.monotonic() < deadline:
            await asyncio.wait(
                {hurrying, done}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if done.done():
                break
        hurrying.cancel()
        self._running.stop_all("worker_shutdown")
        await done

    async def _run_one(self, record: TaskRecord) -> None:
        """Run a task that is among the running ones, to its end."""
        try:
            prepared = record.prepared = record.prepared or await self._prepare_again(record)
            _make_folders(prepared)
            outcome = await self._execute(record, prepared)
            if isinstance(outcome, Displaced):
                if self._put_back(record, outcome):
                    return
                outcome = failure_of(EngineEnd("worker_shutdown")) if self._draining else outcome.failure
            await self._unwritten.acquire()
            self._end_soon(record, outcome, prepared.folder, prepared, slot=True)
        except RejectedError as error:
            self._end_soon(record, error.failure, self._folder(record), record.prepared)
        except JournalError as error:
            failure = Failure(
                reason="disk_full", message=str(error), hint="check RESULTS_DIR on the worker", retryable=True
            )
            self._end_soon(record, failure, self._folder(record), record.prepared)
        except Exception as error:  # a fault of ours, which must not take the other tasks with it
            log.exception("a task could not be begun", action="task_run", task_id=record.task_id)
            self._end_soon(record, broken(error), self._folder(record), record.prepared)
        finally:
            self._running.remove(record)
            self._changed.set()

    def _put_back(self, record: TaskRecord, displaced: Displaced) -> bool:
        """Let a task wait again whose engine was ended because of another one; False if it has to end."""
        if self._draining or record.put_backs >= _MOST_PUT_BACKS:
            return False
        why = f"waits again: its engine was ended because of task {displaced.by}, which ran in it at the same time"
        self._parts.journal.take_back_start(record.task_id)
        record.put_back()
        self._parts.publisher.task_fields(record.task_id, record.put_back_fields(why))
        self._backlog.put_back(record)
        log.warning("the task runs again", action="task_put_back", task_id=record.task_id, by=displaced.by)
        return True

    async def _execute(self, record: TaskRecord, prepared: PreparedTask) -> Outcome | Displaced:
        execution = TaskExecution(
            prepared,
            self._parts.pool,
            self._parts.settings.worker_cancel_grace_sec,
            lambda progress: self._parts.news.tell(record.kind, progress),
            lambda: self._order(record, prepared),
        )
        self._running.begin(record, execution)
        self._parts.journal.note_start(record.task_id)
        record.begin()
        self._parts.presence.set_running(record.task_id)
        self._parts.publisher.task_started(record.started_event(self._parts.worker_id), record.started_fields())
        if not record.put_backs:
            self._parts.presence.job_started(record.task_id)
        log.info("task started", action="task_start", task_id=record.task_id, task_type=record.kind)
        if self._draining:
            execution.stop("worker_shutdown", grace_sec=0.0)
        self._fetch_ahead()
        await asyncio.sleep(0)  # lets TASK_STARTED go out before the engine gets its work
        try:
            return await execution.run()
        except Exception as error:  # a fault of ours, which must not take the other tasks with it
            log.exception("a run broke", action="task_run", task_id=record.task_id)
            return broken(error)
        finally:
            self._parts.news.forget(record.task_id)

    async def _order(self, record: TaskRecord, prepared: PreparedTask) -> RunTask:
        """What the engine gets, with its inputs; a task that runs again has them still."""
        if record.order is None:
            record.order = await self._parts.inputs.fetch(prepared, lambda progress: self._fetching(record, progress))
        return record.order

    async def _prepare_again(self, record: TaskRecord) -> PreparedTask:
        """Large tasks are not kept in memory while they wait."""
        raw = await self._parts.journal.envelope(record.task_id)
        envelope = await asyncio.to_thread(lambda: decode_envelope(raw, decode_head(raw)))
        return self._parts.preparation.prepare(envelope)

    def _admit(self, record: TaskRecord) -> None:
        self._open[record.task_id] = record
        self._none_open.clear()
        self._parts.publisher.task_queued(record.task_id, record.queued_fields(self._parts.worker_id))
        self._show_status()

    def _folder(self, record: TaskRecord) -> Folder:
        return record.prepared.folder if record.prepared else self._parts.preparation.default_folder(record.task_id)

    def _end_soon(
        self, record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None, *, slot: bool = False
    ) -> None:
        self._parts.inputs.release(record.task_id)
        task = asyncio.create_task(self._end(record, outcome, folder, prepared, slot=slot))
        self._ends.add(task)
        task.add_done_callback(self._ends.discard)

    async def _end(
        self, record: TaskRecord, outcome: Outcome, folder: Folder, prepared: PreparedTask | None, *, slot: bool
    ) -> None:
        try:
            try:
                ended = await self._parts.ending.record(record, outcome, folder, prepared)
            finally:
                if slot:
                    self._unwritten.release()
            if isinstance(ended, DeliveryJob):
                self._parts.delivery.begin(ended)
            else:
                await self._parts.ending.announce(ended)
        except Exception as error:  # a fault of ours, which must not take the other tasks with it
            log.exception("a task could not be ended as it should", action="task_end", task_id=record.task_id)
            ending = self._parts.ending
            failure, keep = broken(error), record.keeps_result
            await ending.announce(await ending.give_up(record.task_id, record.dispatch, failure, keep=keep))
        finally:
            if self._open.get(record.task_id) is record:  # else the same id was dispatched again meanwhile
                del self._open[record.task_id]
            if not self._open:
                self._none_open.set()
            self._show_status(record.task_id)

    def _fetch_ahead(self) -> None:
        """Fetch the inputs of the task that comes next while others run."""
        following = self._backlog.peek({self._running.engine_key}) if self._running else None
        if following is not None and following.prepared is not None and following.order is None:
            self._parts.inputs.prefetch(following.prepared)

    def _fetching(self, record: TaskRecord, progress: InputProgress) -> None:
        self._parts.news.tell(
            record.kind,
            Progress(
                task_id=record.task_id,
                done=progress.done_bytes,
                total=progress.total_bytes,
                unit="bytes",
                message=f"fetching {progress.name}",
            ),
        )

    def _show_status(self, last_task: str = "") -> None:
        """IDLE only while a task could be taken: nothing waits, runs, ends or arrives (WIRE 0 step 9)."""
        if self._open or self._arriving or self._draining:
            self._parts.presence.set_busy()
        else:
            self._parts.presence.set_idle(last_task)


def _make_folders(prepared: PreparedTask) -> None:
    for folder in (prepared.folder, *prepared.child_folders.values()):
        try:
            prepare(folder.path)
        except OSError as error:
            text = f"cannot make the results folder {folder.path}: {error.strerror or error}"
            hint = "check RESULTS_DIR on the worker"
            failure = Failure(reason="result_write", message=text, hint=hint, retryable=True)
            raise RejectedError(failure) from error


def broken(error: Exception) -> Failure:
    """What a task is told when something of ours broke."""
    text = f"a fault of the worker itself: {type(error).__name__}: {error}"
    return Failure(reason="executor_error", message=text, hint="worker.log has the traceback; please report it")
