"""Brings results to the orchestrator: archives, uploads, results of children, the task's own result, announcement.

Each delivery is one asyncio task beside the runner, so the next task runs meanwhile. What was acknowledged is in the
journal at once and is not sent again after a restart; what was not is tried until it is acknowledged, refused for good,
or `WORKER_DELIVERY_PATIENCE_SEC` is over.
"""

from __future__ import annotations

import asyncio
import errno
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

import structlog
from pydantic import ValidationError

from executors.contract import Failure
from executors.errors import BadSpecError, Reason
from executors.task_spec import Destination
from orchestrator_client.archives.archive_writer import ArchiveTools, write_archive
from orchestrator_client.errors import ArchiveError, RefusedError, TransferError
from orchestrator_client.transfers.http_link import HttpLink, Target, with_patience
from orchestrator_client.transfers.uploads import ResultBody, file_url, post_result, upload_file
from worker.delivery_files import LostError, check_folder, clean_up, file_state, is_there, write_package_keys
from worker.delivery_plan import (
    BEST_EFFORT_SEC,
    DeliveryJob,
    DeliveryProgress,
    Package,
    PackageState,
    Posting,
    package_key,
)
from worker.destinations import target_of
from worker.event_publisher import EventPublisher
from worker.progress_news import ByteNews, ProgressNews
from worker.results_folder import RESULT_FILE
from worker.settings import Settings
from worker.task_ending import TaskEnding, job_of, stored
from worker.task_journal import JournalError, TaskJournal

_ARCHIVES_AT_ONCE: Final = 1
_UPLOADS_AT_ONCE: Final = 2
_RESULTS_AT_ONCE: Final = 16
_CANCEL_AGAIN_SEC: Final = 1.0

T = TypeVar("T")
log = structlog.get_logger()


@dataclass(frozen=True)
class DeliveryParts:
    """What a delivery works with."""

    settings: Settings
    worker_id: str
    link: HttpLink
    journal: TaskJournal
    publisher: EventPublisher
    news: ProgressNews
    ending: TaskEnding


class TaskDelivery:
    """See the module's text."""

    def __init__(self, parts: DeliveryParts) -> None:
        self._parts = parts
        settings = parts.settings
        self._tools = ArchiveTools(
            use_pigz=settings.model_archive_use_pigz,
            level=settings.model_archive_compression_level,
            pigz_threads=settings.model_archive_pigz_threads,
            pigz_bin=settings.model_archive_pigz_bin,
            tar_bin=settings.model_archive_tar_bin,
        )
        self._running: dict[str, asyncio.Task[None]] = {}
        self._cancellable: set[str] = set()
        self._cancelled: set[str] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self._archiving = asyncio.Semaphore(_ARCHIVES_AT_ONCE)
        self._uploading = asyncio.Semaphore(_UPLOADS_AT_ONCE)
        self._posting = asyncio.Semaphore(_RESULTS_AT_ONCE)

    @property
    def count(self) -> int:
        """How many deliveries are under way."""
        return len(self._running)

    def begin(self, job: DeliveryJob) -> None:
        """Deliver what the journal holds already, perhaps with another destination."""
        task_id = job.plan.task_id
        self._parts.publisher.task_fields(task_id, {"status": "DELIVERING"})
        task = asyncio.create_task(self._run(job), name=f"delivery of {task_id}")
        self._running[task_id] = task
        self._none_left.clear()

    async def resume(self) -> None:
        """Go on with what an earlier life of this worker did not finish."""
        for delivery in await self._parts.journal.open_deliveries():
            try:
                job = job_of(delivery)
            except ValidationError as error:
                log.error(
                    "a delivery in the journal cannot be read; another version wrote it",
                    action="resume", task_id=delivery.task_id, error=str(error),
                )  # fmt: skip
                continue
            log.info("resuming a delivery", action="resume", task_id=delivery.task_id)
            self.begin(job)

    async def again(self, task_id: str) -> bool:
        """Begin a delivery that failed once more; False if this worker has none of that task."""
        if task_id in self._running:
            return True
        delivery = await self._parts.journal.reopen(task_id)
        if delivery is None:
            return False
        log.info("delivering again", action="deliver", task_id=task_id)
        self.begin(job_of(delivery))
        return True

    def cancel(self, task_id: str) -> bool:
        """Give up a delivery; False if there is none of that task."""
        if task_id not in self._cancellable:
            return False
        self._cancelled.add(task_id)
        self._running[task_id].cancel()
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
        while self._running:
            for task in self._running.values():
                task.cancel()
            await asyncio.wait(self._running.values(), timeout=_CANCEL_AGAIN_SEC)
        if stopped:
            text = "deliveries stopped; the journal keeps them for the next start"
            log.info(text, action="shutdown", count=stopped)

    async def _run(self, job: DeliveryJob) -> None:
        task_id = job.plan.task_id
        self._cancellable.add(task_id)
        try:
            failure, keep = await self._outcome(job)
            self._cancellable.discard(task_id)  # from here on its end is being said
            ended = await self._parts.ending.conclude(job, failure, keep=keep)
            await self._parts.ending.announce(ended)
        except asyncio.CancelledError:
            raise
        except Exception:  # a fault of ours, which must not take the other deliveries with it
            log.exception(
                "a delivery broke; the journal keeps it, and the next start of the daemon goes on with it",
                action="deliver", task_id=task_id,
            )  # fmt: skip
        finally:
            self._running.pop(task_id, None)
            self._cancellable.discard(task_id)
            self._cancelled.discard(task_id)
            self._parts.news.forget(task_id)
            if not self._running:
                self._none_left.set()

    async def _outcome(self, job: DeliveryJob) -> tuple[Failure | None, bool]:
        """Deliver. Returns why that failed, if it did, and whether it can be tried again."""
        plan = job.plan
        try:
            await self._deliver(job)
        except asyncio.CancelledError:
            if plan.task_id not in self._cancelled:
                raise  # the daemon stops; the journal keeps the delivery
            if (own := asyncio.current_task()) is not None:
                own.uncancel()  # a person's wish, which ends here
            failure = self._failure(job, "cancelled", "cancelled while its result was being delivered")
        except LostError as error:
            lost = Failure(reason="delivery_failed", message=str(error), hint="send the task again", retryable=True)
            return (None if plan.best_effort else lost), False
        except (RefusedError, BadSpecError, TransferError, ArchiveError, OSError) as error:
            failure = self._failure(job, *_told(error))
        else:
            return None, False
        if plan.best_effort:  # the task's own failure is what counts
            text = "the summary of a failed task was not sent"
            log.warning(text, action="deliver", task_id=plan.task_id, error=failure.message)
            return None, False
        return failure, True

    def _failure(self, job: DeliveryJob, reason: Reason, message: str) -> Failure:
        folder = job.plan.postings[-1].folder
        hint = (
            f"nothing is lost: the result is in {folder}. Mend the cause, then resend it without running it again: "
            f"flowmesh-worker deliver {job.plan.task_id}"
        )
        return Failure(reason=reason, message=message, hint=hint, retryable=reason in {"delivery_failed", "disk_full"})

    async def _deliver(self, job: DeliveryJob) -> None:
        """Files first, then children, then the task's own result (WIRE 6)."""
        plan = job.plan
        if job.redirected:
            await self._note(job, job.progress)
        for package in plan.packages:
            await self._deliver_package(job, package)
        if plan.packages and not job.progress.results_written:
            await asyncio.to_thread(write_package_keys, job)
            await self._note(job, job.progress.model_copy(update={"results_written": True}))
        for posting in plan.postings:
            if posting.destination is not None:
                await self._post(job, posting, self._target(posting.destination))
        if self._parts.settings.model_cleanup_after_upload and not plan.best_effort:
            await asyncio.to_thread(clean_up, job)

    async def _deliver_package(self, job: DeliveryJob, package: Package) -> None:
        posting = job.plan.posting_of(package)
        source = posting.folder / package.path
        target = self._target(posting.destination) if posting.destination is not None else None
        state = job.progress.packages.get(package_key(package))
        if state is not None and target is not None and state.url == file_url(target, posting.task_id, state.name):
            return
        if state is None or not is_there(source.with_name(state.name), state):
            state = await self._make_sendable(job, package, source)
            await self._note_package(job, package, state)
        if target is None:
            return
        path = source.with_name(state.name)
        news = ByteNews(self._parts.news, job.plan.task_id, job.plan.kind, f"uploading {state.name}")

        async def attempt() -> str:
            async with self._uploading:
                return await upload_file(self._parts.link, target, posting.task_id, path, state.name, news.tell)

        began = time.monotonic()
        try:
            url = await self._patiently(job, attempt, f"upload of {state.name}")
        except FileNotFoundError as error:
            raise LostError(f"{path} is not there any more, so it cannot be uploaded") from error
        log.info(
            "uploaded",
            action="upload", task_id=posting.task_id, file=state.name, bytes=state.size_bytes,
            seconds=round(time.monotonic() - began, 3),
        )  # fmt: skip
        await self._note_package(job, package, state.model_copy(update={"url": url}))

    async def _make_sendable(self, job: DeliveryJob, package: Package, source: Path) -> PackageState:
        if package.kind == "file":
            return await asyncio.to_thread(file_state, source)
        news = ByteNews(self._parts.news, job.plan.task_id, job.plan.kind, f"archiving {source.name}")
        async with self._archiving:
            await asyncio.to_thread(check_folder, source)
            began = time.monotonic()
            facts = await write_archive(source, self._tools, news.tell)
        log.info(
            "archived",
            action="archive", task_id=package.task_id, file=facts.path.name, bytes=facts.size_bytes,
            method=facts.method, seconds=round(time.monotonic() - began, 3),
        )  # fmt: skip
        return PackageState(name=facts.path.name, size_bytes=facts.size_bytes, sha256=facts.sha256)

    async def _post(self, job: DeliveryJob, posting: Posting, target: Target) -> None:
        if job.progress.posted.get(posting.task_id) == target.url:
            return
        body = ResultBody(posting.task_id, self._parts.worker_id, posting.folder / RESULT_FILE, job.plan.metadata)

        async def attempt() -> None:
            async with self._posting:
                await post_result(self._parts.link, target, body)

        try:
            await self._patiently(job, attempt, f"result of {posting.task_id}")
        except FileNotFoundError as error:
            raise LostError(f"{body.result_file} is not there any more, so it cannot be sent") from error
        posted = {**job.progress.posted, posting.task_id: target.url}
        await self._note(job, job.progress.model_copy(update={"posted": posted}))

    async def _patiently(self, job: DeliveryJob, attempt: Callable[[], Awaitable[T]], what: str) -> T:
        plan = job.plan
        patience = BEST_EFFORT_SEC if plan.best_effort else self._parts.settings.worker_delivery_patience_sec
        left = max(job.since + patience - time.time(), 0.0)

        def on_wait(error: TransferError, pause_sec: float) -> None:
            log.warning(
                "not delivered yet; trying again",
                action="deliver", task_id=plan.task_id, what=what, error=str(error), pause_sec=round(pause_sec, 2),
            )  # fmt: skip
            self._parts.publisher.task_fields(plan.task_id, {"progress_message": f"{what}: {error}; trying again"})

        if plan.best_effort:
            try:
                async with asyncio.timeout(left):
                    return await with_patience(attempt, left, on_wait)
            except TimeoutError as error:
                raise TransferError(f"{what}: no answer within {BEST_EFFORT_SEC:.0f} s") from error
        return await with_patience(attempt, left, on_wait)

    def _target(self, destination: Destination) -> Target:
        return target_of(destination, self._parts.settings, self._parts.link)

    async def _note_package(self, job: DeliveryJob, package: Package, state: PackageState) -> None:
        packages = {**job.progress.packages, package_key(package): state}
        await self._note(job, job.progress.model_copy(update={"packages": packages, "results_written": False}))

    async def _note(self, job: DeliveryJob, progress: DeliveryProgress) -> None:
        """Remember durably; if that fails the delivery goes on, at the risk of sending something twice."""
        job.progress = progress
        try:
            await self._parts.journal.note_delivery(stored(job))
        except JournalError as error:
            log.error("the journal cannot be written", action="deliver", task_id=job.plan.task_id, error=str(error))


def _told(error: Exception) -> tuple[Reason, str]:
    """The reason of a failed delivery, and what happened."""
    match error:
        case RefusedError() | BadSpecError():
            return "delivery_refused", f"the result was refused: {error}"
        case TransferError():
            return "delivery_failed", f"the result could not be delivered: {error}"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "disk_full", error.strerror or str(error)
        case _:
            return "delivery_failed", f"the result could not be prepared for sending: {error}"
