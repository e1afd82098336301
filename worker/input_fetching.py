"""One input into the cache: over HTTP, or out of an archive that lies on this worker."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

import structlog

from executors.input_spec import InputRequest
from orchestrator_client.archives.archive_reader import UnpackLimits, unpack
from orchestrator_client.transfers.downloads import Downloaded, DownloadLimits, Source, default_name, download
from orchestrator_client.transfers.http_link import HttpLink, shown_url
from orchestrator_client.transfers.web_addresses import read_address
from worker.cache_entry import CONTENT, CacheRecord, Pin, Wanted, Workspace, bytes_taken
from worker.input_cache import InputCache, means_disk_full
from worker.input_threads import CheckWanted, InputThreads
from worker.local_inputs import NotUsableError, is_to_be_unpacked, stamp_of
from worker.settings import Settings
from worker.shared_work import Audience

_DEFAULT_TIMEOUT_SEC: Final = 60.0

log = structlog.get_logger()

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class _Order:
    """One download that may have to be done."""

    request: InputRequest
    url: str
    name: str
    wanted: Wanted
    audience: Audience


class _NoRoomError(OSError):
    """It is known beforehand that the disk has no room.

    Args:
        needed_bytes: how much is needed in all, once what there is of it has been deleted.
    """

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(errno.ENOSPC, f"{needed_bytes} bytes are needed")
        self.needed_bytes = needed_bytes


class InputFetching:
    """Fetches and unpacks.

    Args:
        link: speaks HTTP.
        cache: where everything goes.
        settings: limits, and the orchestrator's address.
        threads: for what blocks on the disk.
    """

    def __init__(self, link: HttpLink, cache: InputCache, settings: Settings, threads: InputThreads) -> None:
        self._link = link
        self._cache = cache
        self._settings = settings
        self._threads = threads

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
            raise NotUsableError("needs ORCHESTRATOR_BASE_URL at the worker, or base_url in the task")
        if request.url:
            return base + request.url
        return f"{base}/api/v1/results/{quote(request.task_id, safe='')}/files/{quote(request.filename, safe='')}"

    async def from_url(self, request: InputRequest, url: str, audience: Audience) -> Pin:
        """Have a URL's file in the cache, unpacked if it is an archive.

        With a digest in the request, a file that is there needs no network. Without one the server is asked whether it
        is still current.

        Args:
            request: what is wanted, with headers, digest and format.
            url: absolute.
            audience: hears how far it is; nothing is deleted for it to have room while it is not urgent.

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
        order = _Order(request, url, name, wanted, audience)
        if request.sha256 and (pin := await self._cache.find(wanted)) is not None:
            pin.touch()
            return pin
        async with self._cache.workspace(wanted) as place:
            pin = await self._cache.find(wanted)
            if pin is not None and request.sha256:
                pin.touch()
                return pin
            try:
                got = await self._with_room(partial(self._fetch, order, place, pin), audience)
                if got is None:
                    return _current(pin)
                made = await self._keep(order, place, got)
            except BaseException:
                if pin is not None:
                    pin.release()
                raise
            if pin is not None:
                pin.release()
            return made

    async def from_archive(self, request: InputRequest, archive: Path, stamp: str, audience: Audience) -> Pin:
        """Have an archive of this worker's disk in the cache, unpacked. The archive itself is left as it is.

        Args:
            request: what is wanted.
            archive: the file; if a digest is wanted, it had that.
            stamp: its state then, as `stamp_of` says it.
            audience: as in `from_url`.

        Raises:
            NotUsableError: it has changed meanwhile.
            ArchiveError: it cannot be unpacked.
            OSError: the disk; with ENOSPC if it is full.
        """
        wanted = Wanted(f"file:{archive}", _form(request, archive.name))
        async with self._cache.workspace(wanted) as place:
            pin = await self._cache.find(wanted)
            if pin is not None and pin.record.validator == stamp:
                pin.touch()
                return pin
            if pin is not None:
                pin.release()
            size = (await self._threads.stoppable(lambda _: archive.stat())).st_size
            await self._with_room(partial(self._unpack, request, archive, size, place), audience)
            if await self._threads.stoppable(lambda _: stamp_of(archive)) != stamp:
                raise NotUsableError("changed while it was unpacked", elsewhere=True)
            record = CacheRecord(
                url=str(archive),
                source=wanted.source,
                form=wanted.form,
                validator=stamp,
                sha256=request.sha256,
                fetched_bytes=size,
                kept_bytes=await self._bytes_taken(place),
                payload=CONTENT,
            )
            return await self._with_room(partial(self._cache.add, place, record), audience)

    async def _with_room(self, attempt: Callable[[], Awaitable[ResultT]], audience: Audience) -> ResultT:
        """Try; while it is room that lacks, and somebody waits, again after unused entries were deleted.

        At first as many as are known to be needed; what an archive holds is not known before, so then all.
        """
        for make_room in (self._make_known_room, self._make_all_room):
            try:
                return await attempt()
            except OSError as error:
                if not means_disk_full(error) or not audience.is_urgent or not await make_room(error):
                    raise
        return await attempt()

    async def _make_known_room(self, error: OSError) -> bool:
        if isinstance(error, _NoRoomError):
            await self._cache.make_room(error.needed_bytes)
            return True
        return bool(await self._cache.drop_unused())

    async def _make_all_room(self, _error: OSError) -> bool:
        return bool(await self._cache.drop_unused())

    async def _fetch(self, order: _Order, place: Workspace, current: Pin | None) -> Downloaded | None:
        """Download; None: `current` is current."""
        request, settings = order.request, self._settings
        limits = DownloadLimits(settings.worker_download_max_bytes, settings.worker_download_timeout_sec)
        source = Source(
            url=order.url,
            headers=request.headers,
            timeout_sec=request.timeout_sec or _DEFAULT_TIMEOUT_SEC,
            sha256=request.sha256 or None,
            with_token=request.with_token,
        )

        def watch(done: int, total: int | None) -> None:
            order.audience.tell(done, total)
            task = asyncio.current_task()
            if task is not None and task.cancelling():  # an error would take the place of the cancellation
                return
            if total is None and self._cache.room_bytes() == 0:
                raise OSError(errno.ENOSPC, f"{done} bytes have come and nothing is free, besides a reserve")
            if total is not None and self._cache.room_bytes() < total - done:
                raise _NoRoomError(total)

        validator = current.record.validator if current else ""
        got = await download(self._link, source, place.folder / "download", limits, watch, validator=validator)
        if got is not None:
            shown = shown_url(order.url)
            log.info("input fetched", action="input_fetch", url=shown, bytes=got.size_bytes, sha256=got.sha256)
        return got

    async def _keep(self, order: _Order, place: Workspace, got: Downloaded) -> Pin:
        """Turn a fetched file into an entry."""
        if await self._threads.stoppable(partial(_is_to_be_unpacked, order.request, got.path)):
            attempt = partial(self._unpack, order.request, got.path, got.size_bytes, place)
            await self._with_room(attempt, order.audience)
            payload = CONTENT
        else:
            payload = f"{CONTENT}/{order.name}"
            await self._threads.to_its_end(partial(_move_into, got.path, place.folder / CONTENT, order.name))
        record = CacheRecord(
            url=shown_url(order.url),
            source=order.wanted.source,
            form=order.wanted.form,
            validator=got.validator,
            sha256=got.sha256,
            fetched_bytes=got.size_bytes,
            kept_bytes=await self._bytes_taken(place),
            payload=payload,
        )
        return await self._with_room(partial(self._cache.add, place, record), order.audience)

    async def _unpack(self, request: InputRequest, archive: Path, size_bytes: int, place: Workspace) -> None:
        """Unpack into a workspace."""
        room = self._cache.room_bytes()
        if room < size_bytes:  # hardly any content is smaller than its archive
            raise _NoRoomError(size_bytes)
        limits = UnpackLimits(total_bytes=self._settings.worker_unpack_max_bytes, room_bytes=room)
        await unpack(archive, place.folder / CONTENT, request.archive_format, limits)

    async def _bytes_taken(self, place: Workspace) -> int:
        return await self._threads.stoppable(lambda _: bytes_taken(place.folder / CONTENT))


def _current(pin: Pin | None) -> Pin:
    """Return what the server says is current."""
    if pin is None:
        raise RuntimeError("a download without a validator cannot be unchanged")
    pin.touch()
    return pin


def _is_to_be_unpacked(request: InputRequest, file: Path, check: CheckWanted) -> bool:
    check()
    return is_to_be_unpacked(request, file)


def _form(request: InputRequest, name: str) -> str:
    """What is done with the file; the suffix counts, because executors tell files apart by it."""
    unpacked = "none" if request.kind == "file" and request.archive_format == "auto" else request.archive_format
    return f"{unpacked}:{Path(name).suffix.lower()}"


def _move_into(file: Path, folder: Path, name: str) -> None:
    folder.mkdir()
    file.rename(folder / name)
