"""What one delivery does: archives, uploads, results of children, the task's own result, in this order (WIRE 6).

What was acknowledged is in the journal at once and is not sent again after a restart.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit
from weakref import WeakValueDictionary

import structlog

from executors.task_spec import Destination
from orchestrator_client.archives.archive_writer import ArchiveTools, write_archive
from orchestrator_client.errors import TransferError
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
from worker.task_ending import stored
from worker.task_journal import JournalError, TaskJournal

_ARCHIVES_AT_ONCE: Final = 1
_UPLOADS_AT_ONCE: Final = 2
_RESULTS_AT_ONCE: Final = 16

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


class DeliverySteps:
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
        self._archiving = asyncio.Semaphore(_ARCHIVES_AT_ONCE)
        # One for each peer, so that one that hangs keeps only its own results waiting.
        self._uploading: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()
        self._posting: WeakValueDictionary[str, asyncio.Semaphore] = WeakValueDictionary()

    async def deliver(self, job: DeliveryJob) -> None:
        """Do all that has not been done yet.

        Raises:
            RefusedError, BadSpecError: somebody said no for good.
            TransferError: patience is over.
            LostError: what is to be sent is gone.
            ArchiveError, OSError: an archive cannot be made.
        """
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
            try:
                await asyncio.to_thread(clean_up, job)
            except (OSError, LostError) as error:  # everything has arrived: that is what counts
                log.warning("cannot clean up", action="deliver", task_id=plan.task_id, error=str(error))

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
            async with _lane(self._uploading, target, _UPLOADS_AT_ONCE):
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
            async with _lane(self._posting, target, _RESULTS_AT_ONCE):
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


def _lane(lanes: WeakValueDictionary[str, asyncio.Semaphore], target: Target, width: int) -> asyncio.Semaphore:
    """How many may talk to one peer at a time; forgotten when nobody does."""
    peer = urlsplit(target.url).netloc
    lane = lanes.get(peer)
    if lane is None:
        lane = lanes[peer] = asyncio.Semaphore(width)
    return lane
