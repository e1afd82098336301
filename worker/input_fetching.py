"""One input into the cache: over HTTP, or out of an archive that lies on this worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote

import structlog

from executors.input_spec import InputRequest
from orchestrator_client.archives.archive_reader import UnpackLimits, unpack
from orchestrator_client.transfers.downloads import DownloadLimits, Source, default_name, download
from orchestrator_client.transfers.http_link import HttpLink, shown_url
from orchestrator_client.transfers.web_addresses import read_address
from worker.cache_entry import CONTENT, CacheRecord, Pin, Wanted, Workspace
from worker.input_cache import InputCache, means_disk_full
from worker.local_inputs import NotUsableError, digest_of_file, is_to_be_unpacked
from worker.settings import Settings
from worker.shared_work import Listener

_DEFAULT_TIMEOUT_SEC: Final = 60.0

log = structlog.get_logger()


@dataclass(frozen=True)
class _Order:
    """One download that may have to be done."""

    request: InputRequest
    url: str
    name: str
    wanted: Wanted
    listener: Listener


@dataclass(frozen=True)
class _Fetched:
    """A file in a workspace, before it is unpacked or put into its place."""

    file: Path
    name: str
    shown: str
    validator: str
    sha256: str
    size_bytes: int
    is_ours: bool


class _NoRoomError(Exception):
    """The server has told a size that the disk has no room for."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes are needed")
        self.needed_bytes = needed_bytes


class InputFetching:
    """Fetches and unpacks.

    Args:
        link: speaks HTTP.
        cache: where everything goes.
        settings: limits, and the orchestrator's address.
    """

    def __init__(self, link: HttpLink, cache: InputCache, settings: Settings) -> None:
        self._link = link
        self._cache = cache
        self._settings = settings

    def url_of(self, request: InputRequest) -> str:
        """Where the request may be fetched; empty: nowhere.

        Raises:
            NotUsableError: an address of the orchestrator is meant, and nobody has said where that is.
        """
        base = (request.base_url or self._settings.orchestrator_base_url).rstrip("/")
        if request.url and not request.url.startswith("/"):
            return request.url
        if not request.url and not (request.task_id and request.filename):
            return ""
        if not base:
            raise NotUsableError("is relative, and ORCHESTRATOR_BASE_URL is not set at this worker")
        if request.url:
            return base + request.url
        return f"{base}/api/v1/results/{quote(request.task_id, safe='')}/files/{quote(request.filename, safe='')}"

    async def from_url(self, request: InputRequest, url: str, listener: Listener) -> Pin:
        """Have a URL's file in the cache, unpacked if it is an archive.

        With a digest in the request, a file that is there needs no network. Without one the server is asked whether it
        is still current.

        Args:
            request: what is wanted, with headers, digest and format.
            url: absolute.
            listener: hears how far it is.

        Raises:
            TransferError: the network failed, for longer than retries last.
            RefusedError: the server said no, the file is too large, or another digest came.
            ArchiveError: it cannot be unpacked.
            OSError: the disk; with ENOSPC if it is full.
        """
        what = f"{request.name}.url"
        self._link.check_url(url, what=what)
        name = default_name(url, request.filename or None)
        wanted = Wanted(read_address(url, what=what).url, _form(request, name), request.sha256)
        order = _Order(request, url, name, wanted, listener)
        if request.sha256 and (pin := await self._cache.find(wanted)) is not None:
            pin.touch()
            return pin
        async with self._cache.workspace(wanted) as place:
            pin = await self._cache.find(wanted)
            if pin is not None and request.sha256:
                pin.touch()
                return pin
            try:
                made = await self._with_room(lambda: self._fetch(order, place, pin))
            except BaseException:
                if pin is not None:
                    pin.release()
                raise
            if pin is not None and made is not pin:
                pin.release()
            return made

    async def from_archive(self, request: InputRequest, archive: Path) -> Pin:
        """Have an archive of this worker's disk in the cache, unpacked.

        Raises:
            ArchiveError: it cannot be unpacked.
            OSError: the disk; with ENOSPC if it is full.
        """
        facts = await asyncio.to_thread(archive.stat)
        stamp = f"{facts.st_size}-{facts.st_mtime_ns}-{facts.st_ino}"
        wanted = Wanted(f"file:{archive}", _form(request, archive.name))
        async with self._cache.workspace(wanted) as place:
            pin = await self._cache.find(wanted)
            if pin is not None and pin.record.validator == stamp:
                pin.touch()
                return pin
            if pin is not None:
                pin.release()
            digest = await asyncio.to_thread(digest_of_file, archive)
            fetched = _Fetched(archive, archive.name, str(archive), stamp, digest, facts.st_size, is_ours=False)
            return await self._with_room(lambda: self._keep(request, wanted, place, fetched))

    async def _with_room(self, attempt: Callable[[], Awaitable[Pin]]) -> Pin:
        """Try, and once more after unused entries were deleted, if it was the room that lacked."""
        try:
            return await attempt()
        except _NoRoomError as error:
            await self._cache.make_room(error.needed_bytes)
        except OSError as error:
            if not means_disk_full(error) or not await self._cache.drop_unused():
                raise
        return await attempt()

    async def _fetch(self, order: _Order, place: Workspace, current: Pin | None) -> Pin:
        """Download unless `current` is current."""
        request, settings = order.request, self._settings
        limits = DownloadLimits(settings.worker_download_max_bytes, settings.worker_download_timeout_sec)
        source = Source(
            url=order.url,
            headers=request.headers,
            timeout_sec=request.timeout_sec or _DEFAULT_TIMEOUT_SEC,
            sha256=request.sha256 or None,
            with_token=request.with_token,
        )
        total_is_known = False

        def watch(done: int, total: int | None) -> None:
            nonlocal total_is_known
            if total is not None and not total_is_known:
                total_is_known = True
                if self._cache.free_bytes() < total - done:
                    raise _NoRoomError(total - done)
            order.listener(done, total)

        validator = current.record.validator if current else ""
        got = await download(self._link, source, place.folder / "download", limits, watch, validator=validator)
        if got is None:
            if current is None:
                raise RuntimeError("a download without a validator cannot be unchanged")
            current.touch()
            return current
        shown = shown_url(order.url)
        log.info("input fetched", action="input_fetch", url=shown, bytes=got.size_bytes, sha256=got.sha256)
        fetched = _Fetched(got.path, order.name, shown, got.validator, got.sha256, got.size_bytes, is_ours=True)
        return await self._keep(request, order.wanted, place, fetched)

    async def _keep(self, request: InputRequest, wanted: Wanted, place: Workspace, fetched: _Fetched) -> Pin:
        """Turn a file into an entry."""
        content = place.folder / CONTENT
        payload, kept = CONTENT, fetched.size_bytes
        if await asyncio.to_thread(is_to_be_unpacked, request, fetched.file):
            limits = UnpackLimits(total_bytes=self._settings.worker_unpack_max_bytes)
            kept = await unpack(fetched.file, content, request.archive_format, limits)
            if fetched.is_ours:
                await asyncio.to_thread(fetched.file.unlink)
        else:
            payload = f"{CONTENT}/{fetched.name}"
            await asyncio.to_thread(_move_into, fetched.file, content, fetched.name)
        record = CacheRecord(
            url=fetched.shown,
            source=wanted.source,
            form=wanted.form,
            validator=fetched.validator,
            sha256=fetched.sha256,
            fetched_bytes=fetched.size_bytes,
            kept_bytes=kept,
            payload=payload,
        )
        return await self._cache.add(place, record)


def _form(request: InputRequest, name: str) -> str:
    """What is done with the file; the suffix counts, because executors tell files apart by it."""
    unpacked = "none" if request.kind == "file" and request.archive_format == "auto" else request.archive_format
    return f"{unpacked}:{Path(name).suffix.lower()}"


def _move_into(file: Path, folder: Path, name: str) -> None:
    with contextlib.suppress(FileExistsError):  # of an attempt that found no room
        folder.mkdir()
    file.rename(folder / name)
