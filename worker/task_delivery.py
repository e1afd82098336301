"""Results on their way to an orchestrator: which there are, and how each ends.

Each delivery is one asyncio task beside the runner, so the next task runs meanwhile. What a delivery does is in
`worker.delivery_steps`. It goes on until everything is acknowledged, refused for good, or
`WORKER_DELIVERY_PATIENCE_SEC` is over; a restart does not end it, because the journal has it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

import structlog
from pydantic import ValidationError

from executors.contract import Failure
from executors.errors import BadSpecError, Reason
from executors.task_spec import Destination
from orchestrator_client.errors import ArchiveError, RefusedError, TransferError
from worker.delivery_files import LostError
from worker.delivery_plan import DeliveryJob
from worker.delivery_steps import DeliveryParts, DeliverySteps
from worker.journal_tables import StoredDelivery
from worker.task_ending import TaskEnding, job_of

_CANCEL_AGAIN_SEC: Final = 1.0

log = structlog.get_logger()


@dataclass
class _Running:
    """A delivery under way.

    Attributes:
        job: what is delivered.
        whole: from here to its announcement.
        attempt: the delivering alone, which may be interrupted.
        interrupted: why it was.
        ending: whether its end is being said, so that it is too late for an interruption.
        following: the next delivery of the same task, which came meanwhile.
    """

    job: DeliveryJob
    whole: asyncio.Task[None] | None = None
    attempt: asyncio.Task[None] | None = None
    interrupted: Literal["cancelled", "redirected"] | None = None
    ending: bool = False
    following: DeliveryJob | None = None


class TaskDelivery:
    """See the module's text."""

    def __init__(self, parts: DeliveryParts, ending: TaskEnding) -> None:
        self._parts = parts
        self._ending = ending
        self._steps = DeliverySteps(parts)
        self._running: dict[str, _Running] = {}
        self._none_left = asyncio.Event()
        self._none_left.set()

    @property
    def count(self) -> int:
        """How many deliveries are under way."""
        return len(self._running)

    def begin(self, job: DeliveryJob) -> None:
        """Deliver what the journal holds already, perhaps with another destination; nothing if that is under way."""
        task_id = job.plan.task_id
        earlier = self._running.get(task_id)
        if earlier is not None:
            if earlier.ending:  # its failure is being said; this is the next dispatch
                earlier.following = job
            return
        cleared = {"error": "", "reason": "", "hint": "", "progress_message": ""}
        self._parts.publisher.task_fields(task_id, {"status": "DELIVERING", **cleared})
        running = _Running(job)
        self._running[task_id] = running
        running.whole = asyncio.create_task(self._run(running), name=f"delivery of {task_id}")
        self._none_left.clear()

    async def resume(self) -> None:
        """Go on with what an earlier life of this worker did not finish."""
        for delivery in await self._parts.journal.open_deliveries():
            if delivery.task_id in self._running:
                continue
            try:
                job = job_of(delivery)
            except ValidationError as error:
                await self._give_up_unreadable(delivery, error)
                continue
            log.info("resuming a delivery", action="resume", task_id=delivery.task_id)
            job.resumed = True
            self.begin(job)

    async def again(self, task_id: str) -> None:
        """Begin a delivery that failed once more, if this worker has one of that task."""
        delivery = await self._parts.journal.reopen(task_id)
        if delivery is None:
            return
        try:
            job = job_of(delivery)
        except ValidationError as error:
            await self._give_up_unreadable(delivery, error)
            return
        log.info("delivering again", action="deliver", task_id=task_id)
        self.begin(job)

    def cancel(self, task_id: str) -> bool:
        """Give up a delivery; False if there is none of that task, or its end is being said."""
        return self._interrupt(task_id, "cancelled")

    def redirect(self, task_id: str, work: str, destinations: Mapping[str, Destination]) -> bool:
        """Send results under way elsewhere: the same work came again and names other destinations."""
        running = self._running.get(task_id)
        if running is None or running.ending or running.interrupted or running.job.plan.work != work:
            return False
        if not running.job.send_to(destinations):
            return False
        log.info("delivering elsewhere", action="deliver", task_id=task_id)
        return self._interrupt(task_id, "redirected")

    def _interrupt(self, task_id: str, why: Literal["cancelled", "redirected"]) -> bool:
        running = self._running.get(task_id)
        if running is None or running.ending:
            return False
        running.interrupted = why
        if running.attempt is not None:
            running.attempt.cancel()
        return True

    async def drain(self, grace_sec: float, hurry: asyncio.Event) -> None:
        """Give deliveries some time, then stop them: the journal keeps them for the next start."""
        done, hurrying = asyncio.create_task(self._none_left.wait()), asyncio.create_task(hurry.wait())
        await asyncio.wait({done, hurrying}, timeout=max(grace_sec, 0.0), return_when=asyncio.FIRST_COMPLETED)
        done.cancel()
        hurrying.cancel()
        await self.close()

    async def close(self) -> None:
        """Stop all deliveries where they are."""
        stopped = len(self._running)
        while tasks := [running.whole for running in self._running.values() if running.whole is not None]:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks, timeout=_CANCEL_AGAIN_SEC)
        if stopped:
            text = "deliveries stopped; the journal keeps them for the next start"
            log.info(text, action="shutdown", count=stopped)

    async def _run(self, running: _Running) -> None:
        job = running.job
        task_id = job.plan.task_id
        try:
            failure, keep = await self._outcome(running)
            running.ending = True
            ended = await self._ending.conclude(job, failure, keep=keep)
            await self._ending.announce(ended)
        except Exception:  # a fault of ours, which must not take the other deliveries with it
            log.exception("the end of a delivery could not be said", action="deliver", task_id=task_id)
        finally:
            del self._running[task_id]
            self._parts.news.forget(task_id)
            if running.following is not None:
                self.begin(running.following)
            if not self._running:
                self._none_left.set()

    async def _outcome(self, running: _Running) -> tuple[Failure | None, bool]:
        """Deliver. Returns why that failed, if it did, and whether it can be tried again."""
        job = running.job
        plan = job.plan
        if plan.best_effort and job.resumed:
            return None, False  # by now the task may have succeeded elsewhere, and its result must not be overwritten
        try:
            while not await self._attempt(running):
                pass
        except LostError as error:
            lost = Failure(reason="delivery_failed", message=str(error), hint="send the task again", retryable=True)
            return (None if plan.best_effort else lost), False
        except Exception as error:  # noqa: BLE001 - whatever it is, the task must get its end
            failure = self._failure(job, *_told(error))
        else:
            if running.interrupted != "cancelled":
                return None, False
            failure = self._failure(job, "cancelled", "cancelled while its result was being delivered")
        if plan.best_effort:  # the task's own failure is what counts
            text = "the summary of a failed task was not sent"
            log.warning(text, action="deliver", task_id=plan.task_id, error=failure.message)
            return None, False
        return failure, True

    async def _attempt(self, running: _Running) -> bool:
        """Deliver until the end or an interruption; False if it is to begin anew."""
        if running.interrupted is None:
            running.attempt = asyncio.create_task(self._steps.deliver(running.job))
            try:
                await running.attempt
            except asyncio.CancelledError:
                if running.interrupted is None:
                    raise  # the daemon stops; the journal keeps the delivery
            finally:
                running.attempt.cancel()
        if running.interrupted == "redirected":
            running.interrupted = None
            return False
        return True

    async def _give_up_unreadable(self, delivery: StoredDelivery, error: ValidationError) -> None:
        text = f"the result of this task was kept by another version of the worker and cannot be read: {error}"
        log.error("a delivery in the journal cannot be read", action="resume", task_id=delivery.task_id, error=text)
        failure = Failure(reason="delivery_failed", message=text, hint="send the task again", retryable=True)
        await self._ending.announce(await self._ending.give_up(delivery.task_id, delivery.dispatch, failure))

    def _failure(self, job: DeliveryJob, reason: Reason, message: str) -> Failure:
        folder = job.plan.postings[-1].folder
        step = "Send it later" if reason == "cancelled" else "Mend the cause, then resend it without running it again"
        hint = f"nothing is lost: the result is in {folder}. {step}: flowmesh-worker deliver {job.plan.task_id}"
        return Failure(reason=reason, message=message, hint=hint, retryable=reason in {"delivery_failed", "disk_full"})


def _told(error: Exception) -> tuple[Reason, str]:
    """The reason of a failed delivery, and what happened."""
    match error:
        case RefusedError() | BadSpecError():
            return "delivery_refused", f"the result was refused: {error}"
        case TransferError():
            return "delivery_failed", f"the result could not be delivered: {error}"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk_full", error.strerror or str(error)
        case ArchiveError() | OSError():
            return "delivery_failed", f"the result could not be prepared for sending: {error}"
        case _:
            log.error("a delivery broke", action="deliver", exc_info=error)
            return "delivery_failed", f"a fault of the worker itself: {type(error).__name__}: {error}"
