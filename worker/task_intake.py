"""From bytes on a channel to an accepted task: whose is it, is it well-formed, was it here before.

Reading never waits for a task, and accepting never waits for the disk more than once for many messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis.asyncio as aioredis
import stamina
import structlog
from pydantic import ValidationError

from executors.contract import Failure
from orchestrator_client.channels import CLAIM_TTL_SEC, TASK_CONTROL, claim_key
from orchestrator_client.connection import DISCONNECTED
from orchestrator_client.errors import EnvelopeError
from orchestrator_client.messages import (
    ControlMessage,
    DeliverMessage,
    SentEvent,
    TaskEnvelope,
    TaskEvent,
    decode_envelope,
    decode_head,
    safe_task_id,
)
from orchestrator_client.validation_text import validation_text
from worker.arrived_message import ArrivedMessage
from worker.event_publisher import EventPublisher
from worker.journal_tables import Acceptance, OwedEvent, StoredDelivery
from worker.task_delivery import TaskDelivery
from worker.task_ending import job_of
from worker.task_journal import JournalError, TaskJournal
from worker.task_preparation import PreparedTask, RejectedError, TaskPreparation
from worker.task_record import TaskRecord
from worker.task_runner import TaskRunner, broken

_MOST_AT_ONCE: Final = 256
_MOST_STARTS: Final = 3
"""A task during whose run the daemon itself ended this often is not started again."""
_LONGEST_ANSWERED_ID: Final = 1000
_CLAIM_WAIT_PER_TASK_SEC: Final = 0.25
_CLAIM_WAIT_MOST_SEC: Final = 2.0
_CLAIM_WAIT_UNABLE_SEC: Final = 3.0
_CLAIM_PATIENCE_SEC: Final = 30.0
_FINISH_WITHIN_SEC: Final = 5.0
_REMEMBER_CANCEL_SEC: Final = 60.0

log = structlog.get_logger()


@dataclass(frozen=True)
class IntakeParts:
    """What the intake works with."""

    worker_id: str
    max_envelope_bytes: int
    min_turnaround_sec: float
    client: aioredis.Redis
    preparation: TaskPreparation
    journal: TaskJournal
    publisher: EventPublisher
    runner: TaskRunner
    delivery: TaskDelivery


class TaskIntake:
    """Takes messages from the subscriber and hands accepted tasks to the runner."""

    def __init__(self, parts: IntakeParts) -> None:
        self._parts = parts
        self._inbox: deque[tuple[bytes, float, float]] = deque()
        self._arrived = asyncio.Event()
        self._side_jobs: set[asyncio.Task[None]] = set()
        self.malformed = 0
        self._closing = asyncio.Event()
        self._cancelled: dict[str, float] = {}
        """Ids that were cancelled while something was arriving, with the time of it."""

    def on_message(self, channel: str, raw: bytes) -> None:
        """Look at one message; called by the subscriber, in order, and never blocks."""
        if channel == TASK_CONTROL:
            self._control(raw)
            return
        try:
            head = decode_head(raw)
        except EnvelopeError as error:
            self._count_malformed(error)
            return
        if head.assigned_worker == self._parts.worker_id:
            self._take(raw)
        elif head.assigned_worker is None:
            self._claim_later(raw)

    async def run(self) -> None:
        """Accept what arrives until cancelled."""
        while True:
            await self._arrived.wait()
            self._arrived.clear()
            while self._inbox:
                batch = [self._inbox.popleft() for _ in range(min(len(self._inbox), _MOST_AT_ONCE))]
                try:
                    await self._accept([arrival for item in batch if (arrival := self._look_at(*item)) is not None])
                finally:
                    self._parts.runner.expect(-len(batch))

    async def close(self) -> None:
        """Claim nothing more, and finish what was begun; the subscription has ended before."""
        self._closing.set()
        if self._side_jobs:
            _, late = await asyncio.wait(self._side_jobs, timeout=_FINISH_WITHIN_SEC)
            for job in late:
                job.cancel()

    async def resume(self) -> None:
        """Put back what an earlier life of this worker accepted and did not end."""
        for task in await self._parts.journal.open_tasks():
            arrival = self._look_at(task.envelope, task.received_at, time.monotonic())
            if arrival is None:  # written by another version
                continue
            await asyncio.sleep(0)  # a large one takes a while to read
            record = arrival.record(Acceptance(task.dispatch, None, keeps_result=task.keeps_result))
            log.info("resuming a task", action="resume", task_id=task.task_id, starts=task.starts)
            if task.starts >= _MOST_STARTS:
                text = f"the worker ended {task.starts} times while this task ran; it is not started again"
                failure = Failure(reason="worker_restarted", message=text, hint="look into worker.log on the worker")
                self._parts.runner.reject(record, failure, arrival.answer_folder)
            elif arrival.failure is not None:
                self._parts.runner.reject(record, arrival.failure, arrival.answer_folder)
            else:
                self._parts.runner.enqueue(record)

    def _take(self, raw: bytes) -> None:
        self._parts.runner.expect(1)
        self._inbox.append((raw, time.time(), time.monotonic()))
        self._arrived.set()

    def _look_at(self, raw: bytes, received_at: float, received: float) -> ArrivedMessage | None:
        """Read a message; None also when that breaks, which must not keep the others from being read."""
        try:
            return self._read(raw, received_at, received)
        except Exception as error:  # a fault of ours: the next message is read all the same
            text = "a message broke what reads it: no answer now; one from the journal is tried again at the next start"
            log.exception(text, action="malformed", error=str(error))
            return None

    def _read(self, raw: bytes, received_at: float, received: float) -> ArrivedMessage | None:
        """Decode and check a message of ours; None when not even an answer can be addressed."""
        head = decode_head(raw)
        if len(raw) > self._parts.max_envelope_bytes:
            limit = self._parts.max_envelope_bytes
            text = f"the task message has {len(raw)} bytes: at most {limit} are accepted (WORKER_MAX_ENVELOPE_BYTES)"
            error = EnvelopeError(text, task_id=head.task_id if isinstance(head.task_id, str) else None)
            return self._malformed(error, raw, received_at, received)
        try:
            envelope = decode_envelope(raw, head)
        except EnvelopeError as error:
            return self._malformed(error, raw, received_at, received)
        prepared, failure = self._prepare(envelope)
        return ArrivedMessage(
            envelope.task_id,
            envelope.kind,
            raw,
            received_at,
            received,
            envelope.dispatched_at,
            prepared,
            failure,
            envelope.experiment_id,
            self._parts.preparation.answer_folder(envelope) if failure is not None else None,
        )

    def _prepare(self, envelope: TaskEnvelope) -> tuple[PreparedTask | None, Failure | None]:
        try:
            return self._parts.preparation.prepare(envelope), None
        except RejectedError as error:
            return None, error.failure
        except Exception as error:
            log.exception("an executor's spec model or engine key raised", action="prepare", task_id=envelope.task_id)
            text = f"the executor of {envelope.kind!r} cannot read this spec: {type(error).__name__}: {error}"
            return None, Failure(reason="executor_error", message=text, hint="see worker.log on the worker")

    def _malformed(
        self, error: EnvelopeError, raw: bytes, received_at: float, received: float
    ) -> ArrivedMessage | None:
        """Answer a message of ours that is no valid task, if its id can be read."""
        self._count_malformed(error)
        failure = Failure(reason="bad_spec", message=str(error), hint="correct the task and send it again")
        if error.task_id is None or not 0 < len(error.task_id.strip()) <= _LONGEST_ANSWERED_ID:
            return None
        if not safe_task_id(error.task_id):
            self._side_job(self._refuse(error.task_id, failure, received))
            return None
        empty = b'{"task_id":"%s","task":{"spec":{}}}' % error.task_id.encode()
        kept = raw if len(raw) <= self._parts.max_envelope_bytes else empty
        return ArrivedMessage(error.task_id, "", kept, received_at, received, None, None, failure)

    async def _refuse(self, task_id: str, failure: Failure, received: float) -> None:
        """Answer a task whose id must not become a path: an event, and nothing else."""
        event = TaskEvent(
            type="TASK_FAILED",
            task_id=task_id,
            worker_id=self._parts.worker_id,
            error=failure.message,
            payload={"reason": failure.reason, "hint": failure.hint, "retryable": False},
        )
        await self._owe(task_id, event.encode(), received)

    async def _accept(self, arrivals: list[ArrivedMessage]) -> None:
        if not arrivals:
            return
        try:
            answers = await self._parts.journal.accept([arrival.wish() for arrival in arrivals])
        except JournalError as error:
            log.error("cannot accept tasks", action="accept", error=str(error), tasks=len(arrivals))
            for arrival in arrivals:
                self._say_not_accepted(arrival, error)
            return
        for arrival, answer in zip(arrivals, answers, strict=True):
            try:
                await self._settle(arrival, answer)
            except Exception as error:  # a fault of ours, which must not take the other tasks with it
                log.exception("a task could not be taken over", action="accept", task_id=arrival.task_id)
                if answer.known is None:
                    self._parts.runner.reject(arrival.record(answer), broken(error))

    async def _settle(self, arrival: ArrivedMessage, answer: Acceptance) -> None:
        """Act on the journal's answer."""
        if answer.known is None:
            await self._hand_over(arrival, answer)
        elif answer.known == "succeeded":
            await self._answer_again(arrival, answer)
        elif not (answer.known == "delivering" and self._redirected(arrival)):
            log.info("already accepted; dispatched again", action="duplicate", task_id=arrival.task_id)

    async def _hand_over(self, arrival: ArrivedMessage, acceptance: Acceptance) -> None:
        record = arrival.record(acceptance)
        log.debug("task accepted", action="accept", task_id=arrival.task_id, task_type=arrival.kind)
        if arrival.failure is not None:
            self._parts.runner.reject(record, arrival.failure, arrival.answer_folder)
            return
        if acceptance.undelivered is not None and arrival.prepared is not None:
            await self._deliver_instead(arrival, record, acceptance.undelivered)
        else:
            self._parts.runner.enqueue(record)
        if self._cancelled.pop(arrival.task_id, None) is not None:
            self._parts.runner.cancel(arrival.task_id)

    async def _deliver_instead(self, arrival: ArrivedMessage, record: TaskRecord, undelivered: StoredDelivery) -> None:
        """A task comes again whose result is here: only its delivery failed before."""
        assert arrival.prepared is not None  # noqa: S101 - the caller has looked
        try:
            job = job_of(undelivered)
        except ValidationError as error:
            log.error(
                "a kept result cannot be read, another version wrote it; running the task again",
                action="duplicate", task_id=arrival.task_id, error=str(error),
            )  # fmt: skip
            await self._run_after_all(arrival)
            return
        log.info("done before, but not delivered; delivering it now", action="duplicate", task_id=arrival.task_id)
        job.send_to(arrival.prepared.destinations)
        job.received = arrival.received
        self._parts.runner.deliver(record, job)

    async def _run_after_all(self, arrival: ArrivedMessage) -> None:
        try:
            await self._parts.journal.drop_delivery(arrival.task_id)
        except JournalError as error:
            log.error("cannot accept a task", action="accept", task_id=arrival.task_id, error=str(error))
            self._say_not_accepted(arrival, error)
        else:
            await self._accept([arrival])

    def _redirected(self, arrival: ArrivedMessage) -> bool:
        """The task comes again while its result is being sent: to where this dispatch wants it, if that is another."""
        prepared = arrival.prepared
        if prepared is None:
            return False
        return self._parts.delivery.redirect(arrival.task_id, prepared.work, prepared.destinations)

    async def _answer_again(self, arrival: ArrivedMessage, answer: Acceptance) -> None:
        """A task that succeeded here comes again: the event was lost. Say it again, unless the result is gone."""
        event = answer.final_event or b""
        if not _result_exists(event):
            log.warning(
                "done before, but its result is gone; running it again", action="duplicate", task_id=arrival.task_id
            )
            try:
                await self._parts.journal.forget(arrival.task_id)
            except JournalError as error:
                log.error("cannot accept a task", action="accept", task_id=arrival.task_id, error=str(error))
                self._say_not_accepted(arrival, error)
            else:
                await self._accept([arrival])
            return
        log.info("done before; saying so again", action="duplicate", task_id=arrival.task_id)
        self._side_job(self._owe(arrival.task_id, event, arrival.received))

    async def _owe(self, task_id: str, event: bytes, received: float) -> None:
        self._parts.runner.expect(1)  # IDLE is said after the event
        try:
            number, token = await self._parts.journal.owe(task_id, event)
            await asyncio.sleep(max(0.0, received + self._parts.min_turnaround_sec - time.monotonic()))
            status = "SUCCEEDED" if b'"TASK_SUCCEEDED"' in event[:64] else "FAILED"
            self._parts.publisher.task_ended(OwedEvent(number, task_id, token, event), {"status": status})
        finally:
            self._parts.runner.expect(-1)

    def _say_not_accepted(self, arrival: ArrivedMessage, error: JournalError) -> None:
        """Nothing can be made durable: say so at once, so that the task goes elsewhere."""
        event = TaskEvent(
            type="TASK_FAILED",
            task_id=arrival.task_id,
            worker_id=self._parts.worker_id,
            error=f"the worker cannot accept tasks: {error}",
            payload={"reason": "disk_full", "hint": "free disk space in RESULTS_DIR", "retryable": True},
        )
        self._parts.publisher.task_started(event, {"status": "FAILED", "error": str(error), "reason": "disk_full"})

    def _claim_later(self, raw: bytes) -> None:
        """A task for anybody: idle workers claim at once, busy ones later, and those that cannot run it last."""
        try:
            envelope = decode_envelope(raw, decode_head(raw))
        except EnvelopeError as error:
            self._count_malformed(error)
            return
        wait = min(self._parts.runner.open_tasks * _CLAIM_WAIT_PER_TASK_SEC, _CLAIM_WAIT_MOST_SEC)
        if self._prepare(envelope)[1] is not None:
            wait = _CLAIM_WAIT_UNABLE_SEC
        self._side_job(self._claim(envelope.task_id, raw, wait))

    async def _claim(self, task_id: str, raw: bytes, wait: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait):
                await self._closing.wait()
        if self._closing.is_set():
            return
        worker_id = self._parts.worker_id.encode()
        try:
            async for attempt in stamina.retry_context(on=DISCONNECTED, attempts=None, timeout=_CLAIM_PATIENCE_SEC):
                with attempt:
                    taken = await self._parts.client.set(claim_key(task_id), worker_id, nx=True, ex=CLAIM_TTL_SEC)
                    mine = taken or await self._parts.client.get(claim_key(task_id)) == worker_id
        except DISCONNECTED as error:
            log.warning("cannot claim a task", action="claim", task_id=task_id, error=str(error))
            return
        if mine:
            self._take(raw)

    def _control(self, raw: bytes) -> None:
        try:
            message = ControlMessage.validate_json(raw)
        except ValidationError as error:
            log.warning("control message not understood", action="control", error=validation_text(error, "message"))
            return
        if isinstance(message, DeliverMessage):
            self._side_job(self._deliver_again(message.task_id))
            return
        if self._parts.runner.cancel(message.task_id):
            log.info("cancelling", action="cancel", task_id=message.task_id)
        elif self._inbox or self._side_jobs or self._parts.runner.arriving:
            now = time.monotonic()
            self._cancelled = {known: at for known, at in self._cancelled.items() if now - at < _REMEMBER_CANCEL_SEC}
            self._cancelled[message.task_id] = now

    async def _deliver_again(self, task_id: str) -> None:
        try:
            await self._parts.delivery.again(task_id)
        except JournalError as error:
            log.error("cannot deliver a task again", action="deliver", task_id=task_id, error=str(error))

    def _count_malformed(self, error: EnvelopeError) -> None:
        self.malformed += 1
        log.warning(
            "malformed task message", action="malformed", error=str(error), task_id=error.task_id, count=self.malformed
        )

    def _side_job(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._side_jobs.add(task)
        task.add_done_callback(self._side_jobs.discard)


def _result_exists(final_event: bytes) -> bool:
    try:
        path = SentEvent.model_validate_json(final_event).payload.get("result_path")
    except ValidationError:
        return False
    return isinstance(path, str) and Path(path).is_file()
