"""The order of a task's life: wait → inputs → run → end → deliver. One task runs at a time.

Ends are written, and results delivered, while the next one runs; inputs of the next one are fetched meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

import structlog

from executors.child_messages import Progress
from executors.contract import Failure
from orchestrator_client.messages import decode_envelope, decode_head
from worker.delivery_plan import DeliveryJob
from worker.engine_end import EngineEnd, failure_of
from worker.engine_pool import EnginePool
from worker.event_publisher import EventPublisher
from worker.progress_news import ProgressNews
from worker.results_folder import prepare
from worker.settings import Settings
from worker.task_delivery import TaskDelivery
from worker.task_ending import TaskEnding
from worker.task_execution import TaskExecution
from worker.task_inputs import InputProgress, TaskInputs
from worker.task_journal import JournalError, TaskJournal
from worker.task_preparation import Folder, PreparedTask, RejectedError, TaskPreparation
from worker.task_record import Outcome, TaskRecord
from worker.worker_presence import WorkerPresence

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
    """Runs what was accepted, in order of acceptance."""

    def __init__(self, parts: RunnerParts) -> None:
        self._parts = parts
        self._open: dict[str, TaskRecord] = {}
        self._queue: deque[TaskRecord] = deque()
        self._queued = asyncio.Event()
        self._none_open = asyncio.Event()
        self._none_open.set()
        self._none_arriving = asyncio.Event()
        self._none_arriving.set()
        self._ends: set[asyncio.Task[None]] = set()
        self._unwritten = asyncio.Semaphore(_MOST_UNWRITTEN_ENDS)
        self._current: TaskExecution | None = None
        self._current_id = ""
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
        self._queue.append(record)
        self._queued.set()
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
        for record in self._queue:
            if record.task_id == task_id:
                self._queue.remove(record)
                self._end_soon(record, failure_of(EngineEnd("cancelled")), self._folder(record), record.prepared)
                return True
        if self._current is not None and self._current_id == task_id:
            self._current.stop("cancelled")
            return True
        return self._parts.delivery.cancel(task_id)

    async def run(self) -> None:
        """Run tasks until cancelled."""
        while True:
            while not self._queue:
                self._queued.clear()
                await self._queued.wait()
            record = self._queue.popleft()
            try:
                await self._run_one(record)
            except Exception as error:  # a fault of ours, which must not take the other tasks with it
                log.exception("a task could not be begun", action="task_run", task_id=record.task_id)
                self._current, self._current_id = None, ""
                self._end_soon(record, broken(error), self._folder(record), record.prepared)

    async def drain(self, grace_sec: float, hurry: asyncio.Event) -> None:
        """Take no more, give the running task its time, then stop it; returns when every task has ended.

        What is being accepted just now still gets its end here: it is in the journal, or about to be.
        """
        self._draining = True
        await self._none_arriving.wait()
        while self._queue:
            record = self._queue.popleft()
            self._end_soon(record, failure_of(EngineEnd("worker_shutdown")), self._folder(record), record.prepared)
        deadline = time.monotonic() + grace_sec
        hurrying = asyncio.ensure_future(hurry.wait())
        done = asyncio.ensure_future(self._none_open.wait())
        while self._current is not None and not hurry.is_set() and time.monotonic() < deadline:
            await asyncio.wait(
                {hurrying, done}, timeout=deadline - time.monotonic(), return_when=asyncio.FIRST_COMPLETED
            )
            if done.done():
                break
        hurrying.cancel()
        if self._current is not None:
            self._current.stop("worker_shutdown", grace_sec=0.0)
        await done

    async def _run_one(self, record: TaskRecord) -> None:
        try:
            prepared = record.prepared or await self._prepare_again(record)
        except RejectedError as error:
            self._end_soon(record, error.failure, self._folder(record), None)
            return
        except JournalError as error:
            failure = Failure(
                reason="disk_full", message=str(error), hint="check RESULTS_DIR on the worker", retryable=True
            )
            self._end_soon(record, failure, self._folder(record), None)
            return
        folder = prepared.folder
        try:
            for each in (folder, *prepared.child_folders.values()):
                prepare(each.path)
        except OSError as error:
            text = f"cannot make the results folder {folder.path}: {error.strerror or error}"
            failure = Failure(
                reason="result_write", message=text, hint="check RESULTS_DIR on the worker", retryable=True
            )
            self._end_soon(record, failure, folder, prepared)
            return
        execution = TaskExecution(
            prepared,
            self._parts.pool,
            self._parts.settings.worker_cancel_grace_sec,
            lambda progress: self._parts.news.tell(record.kind, progress),
            lambda: self._parts.inputs.fetch(prepared, lambda progress: self._fetching(record, progress)),
        )
        self._current, self._current_id = execution, record.task_id
        self._parts.journal.note_start(record.task_id)
        record.begin()
        self._parts.presence.set_running(record.task_id)
        self._parts.publisher.task_started(record.started_event(self._parts.worker_id), record.started_fields())
        self._parts.presence.job_started(record.task_id)
        log.info("task started", action="task_start", task_id=record.task_id, task_type=record.kind)
        if self._draining:
            execution.stop("worker_shutdown", grace_sec=0.0)
        self._fetch_ahead()
        await asyncio.sleep(0)  # lets TASK_STARTED go out before the engine gets its work
        try:
            outcome = await execution.run()
        except Exception as error:  # a fault of ours, which must not take the other tasks with it
            log.exception("a run broke", action="task_run", task_id=record.task_id)
            outcome = broken(error)
        self._current, self._current_id = None, ""
        self._parts.news.forget(record.task_id)
        await self._unwritten.acquire()
        self._end_soon(record, outcome, folder, prepared, slot=True)

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
        """Fetch the inputs of the task that comes next while another one runs."""
        if self._current is not None and self._queue and (following := self._queue[0].prepared) is not None:
            self._parts.inputs.prefetch(following)

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


def broken(error: Exception) -> Failure:
    """What a task is told when something of ours broke."""
    text = f"a fault of the worker itself: {type(error).__name__}: {error}"
    return Failure(reason="executor_error", message=text, hint="worker.log has the traceback; please report it")
