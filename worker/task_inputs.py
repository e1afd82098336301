"""What a task needs that lies elsewhere, found or fetched before its engine gets it (WIRE 4.3, 4.4, 4.9).

The order is the same for all: local paths, another task's folder, the URL. What cannot be had is an error that lists
everything that was tried.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import structlog

from executors.child_messages import RunTask
from executors.contract import Failure
from executors.input_spec import InputRequest
from orchestrator_client.archives.archive_reader import content_root
from orchestrator_client.errors import ArchiveError, RefusedError, TransferError
from orchestrator_client.transfers.http_link import HttpLink, shown_url
from worker.cache_entry import Pin
from worker.input_cache import InputCache, means_disk_full
from worker.input_fetching import InputFetching
from worker.input_threads import CheckWanted, InputThreads
from worker.local_inputs import LocalInput, LocalInputs, NotUsableError, content_of, cut
from worker.settings import Settings
from worker.shared_work import Audience, Listener, SharedWork
from worker.task_preparation import PreparedTask, RejectedError

_HINT: Final = (
    "give a path below RESULTS_DIR or WORKER_ALLOWED_ROOTS of this worker, the taskId of a task that ran here, "
    "or a url that it can fetch; taskId with filename needs ORCHESTRATOR_BASE_URL"
)

log = structlog.get_logger()


@dataclass(frozen=True)
class InputProgress:
    """How far a download is.

    Attributes:
        name: the input, for instance `checkpoint.load`.
        done_bytes: what has arrived.
        total_bytes: what will, if the server said so.
    """

    name: str
    done_bytes: int
    total_bytes: int | None


@dataclass
class _Found:
    """All inputs of one task."""

    inputs: dict[str, Path] = field(default_factory=dict)
    of_children: dict[str, dict[str, Path]] = field(default_factory=dict)
    pins: list[Pin] = field(default_factory=list)

    def release(self) -> None:
        for pin in self.pins:
            pin.release()


@dataclass
class _Prefetch:
    """Inputs of a task that waits, on their way or here."""

    running: asyncio.Task[_Found]
    listeners: list[Callable[[InputProgress], None]]


class TaskInputs:
    """Finds and fetches, keeps what running tasks use, and lets go of it.

    Args:
        link: speaks HTTP.
        cache: where fetched files go.
        settings: limits, folders, the orchestrator's address.
    """

    def __init__(self, link: HttpLink, cache: InputCache, settings: Settings) -> None:
        self._cache = cache
        self._local = LocalInputs(settings.results_dir, settings.readable_roots)
        self._threads = InputThreads("inputs")
        self._fetching = InputFetching(link, cache, settings, self._threads)
        self._sharing: SharedWork[Pin] = SharedWork(Pin.again, Pin.release)
        self._prefetches: dict[str, _Prefetch] = {}
        self._in_use: dict[str, list[_Found]] = {}
        self._tidying: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Begin to delete what killed processes left in the cache, and what it has no room for."""
        self._tidy(self._cache.start)

    async def fetch(self, prepared: PreparedTask, on_progress: Callable[[InputProgress], None]) -> RunTask:
        """Find or fetch all inputs of a task; they stay until `release`.

        Cancelling it ends its downloads, but those that another task waits for too.

        Args:
            prepared: the task.
            on_progress: hears of downloads, often.

        Returns:
            The order for the engine, with `inputs` filled, its children's too.

        Raises:
            RejectedError: one cannot be had, or the disk is full.
        """
        order = prepared.order
        if not prepared.wants_inputs:
            return order
        found = await self._prefetched(order.task_id, on_progress) or await self._find_all(
            prepared, on_progress, lambda: True
        )
        self._in_use.setdefault(order.task_id, []).append(found)
        children = tuple(
            child.model_copy(update={"inputs": found.of_children.get(child.task_id, {})}) for child in order.children
        )
        return order.model_copy(update={"inputs": found.inputs, "children": children})

    def prefetch(self, prepared: PreparedTask) -> None:
        """Begin to fetch for a task that waits; nothing happens while another one's prefetch runs.

        It deletes nothing to have more room on the disk, unless `fetch` joins it. If it fails nobody hears of it:
        `fetch` tries again; until then, or `release`, it is not repeated.
        """
        task_id = prepared.order.task_id
        busy = any(not prefetch.running.done() for prefetch in self._prefetches.values())
        if busy or task_id in self._prefetches or not prepared.wants_inputs:
            return
        listeners: list[Callable[[InputProgress], None]] = []

        def tell(progress: InputProgress) -> None:
            for listener in listeners:
                listener(progress)

        running = asyncio.create_task(self._find_all(prepared, tell, lambda: bool(listeners)))
        prefetch = self._prefetches[task_id] = _Prefetch(running, listeners)
        running.add_done_callback(lambda _: self._prefetch_ended(task_id, prefetch))

    def release(self, task_id: str) -> None:
        """The task is over, or will never run: what it used may be deleted when room is needed."""
        dropped = self._drop_prefetch(task_id)
        found = self._in_use.get(task_id, [])
        if found:
            found.pop(0).release()
            dropped = True
        if not found:
            self._in_use.pop(task_id, None)
        if dropped:
            self._tidy(self._cache.trim)

    async def close(self) -> None:
        """End all prefetches and let go of everything."""
        ending = [prefetch.running for prefetch in self._prefetches.values()]
        for task_id in {*self._prefetches, *self._in_use}:
            while task_id in self._prefetches or task_id in self._in_use:
                self.release(task_id)
        waiting = {*(task for task in ending if not task.done()), *self._tidying}
        if waiting:
            await asyncio.wait(waiting)
        self._threads.close()
        self._cache.close()

    async def _prefetched(self, task_id: str, on_progress: Callable[[InputProgress], None]) -> _Found | None:
        """Join the task's prefetch; None if there is none, or it failed."""
        prefetch = self._prefetches.get(task_id)
        if prefetch is None:
            return None
        prefetch.listeners.append(on_progress)
        try:
            await asyncio.wait({prefetch.running})
        except asyncio.CancelledError:
            prefetch.listeners.clear()
            self._drop_prefetch(task_id)
            await asyncio.wait({prefetch.running})
            raise
        self._prefetches.pop(task_id, None)
        return prefetch.running.result() if _succeeded(prefetch.running) else None

    def _drop_prefetch(self, task_id: str) -> bool:
        prefetch = self._prefetches.pop(task_id, None)
        if prefetch is None:
            return False
        prefetch.running.cancel()
        if _succeeded(prefetch.running):
            prefetch.running.result().release()
        return True

    def _prefetch_ended(self, task_id: str, prefetch: _Prefetch) -> None:
        forgotten = self._prefetches.get(task_id) is not prefetch and not prefetch.listeners
        if _succeeded(prefetch.running) and forgotten:  # in the moment in which it succeeded
            prefetch.running.result().release()

    def _tidy(self, work: Callable[[], Awaitable[None]]) -> None:
        """Tidy the cache in the background."""

        async def tidy() -> None:
            try:
                await work()
            except OSError as error:
                log.warning("the cache of inputs cannot be tidied", action="cache_evict", error=str(error))

        tidying = asyncio.create_task(tidy())
        self._tidying.add(tidying)
        tidying.add_done_callback(self._tidying.discard)

    async def _find_all(
        self, prepared: PreparedTask, on_progress: Callable[[InputProgress], None], is_urgent: Callable[[], bool]
    ) -> _Found:
        found = _Found()
        known: dict[str, Path] = {}
        try:
            for of_whom, out_dir, request in _requests(prepared):
                key = _key(request, out_dir)
                if key not in known:
                    listener = Listener(partial(_report, on_progress, request.name), is_urgent)
                    known[key] = await self._find(request, out_dir, listener, found.pins)
                inputs = found.inputs if of_whom is None else found.of_children.setdefault(of_whom, {})
                inputs[request.name] = known[key]
        except BaseException:
            found.release()
            raise
        return found

    async def _find(self, request: InputRequest, out_dir: Path, listener: Listener, pins: list[Pin]) -> Path:
        """Try everything in order.

        Raises:
            RejectedError: nothing was there.
        """
        tried: list[str] = []
        hopeful = False
        for what, attempt in self._candidates(request, out_dir, listener):
            try:
                found = await attempt()
                if isinstance(found, Pin):
                    pins.append(found)
                    found = await self._threads.stoppable(partial(_content_of_entry, request, found))
            except NotUsableError as error:
                hopeful = hopeful or error.elsewhere
                tried.append(_said(what, error))
            except (TransferError, RefusedError, ArchiveError) as error:
                hopeful = hopeful or isinstance(error, TransferError)
                tried.append(_said(what, error))
            except OSError as error:
                if means_disk_full(error):
                    raise _rejected_for_room(request, what, error) from error
                hopeful = True
                tried.append(f"{what} cannot be read: {error.strerror or error}")
            else:
                log.info("input found", action="input_found", input=request.name, by=what, path=str(found))
                return found
        text = f"{request.name} cannot be had: {'; '.join(tried) or 'it names nothing to look for'}"
        raise RejectedError(Failure(reason="input_failed", message=text, hint=_HINT, retryable=hopeful))

    def _candidates(
        self, request: InputRequest, out_dir: Path, listener: Listener
    ) -> Iterator[tuple[str, Callable[[], Awaitable[Path | Pin]]]]:
        """Every place to look at, with its name for people."""
        for path in request.paths:
            look = partial(self._local.at_path, request, path, out_dir)
            yield f"path {cut(repr(path))}", partial(self._on_disk, request, look, listener)
        if request.task_id:
            look = partial(self._local.of_task, request)
            yield f"taskId {cut(repr(request.task_id))}", partial(self._on_disk, request, look, listener)
        if request.url or (request.task_id and request.filename):
            shown = shown_url(request.url) if request.url else f"of file {cut(repr(request.filename))}"
            yield f"url {shown}", partial(self._over_http, request, listener)

    async def _on_disk(
        self, request: InputRequest, look: Callable[[CheckWanted], LocalInput], listener: Listener
    ) -> Path | Pin:
        found = await self._threads.stoppable(look)
        if not found.archive_stamp:
            return found.path

        def begin(audience: Audience) -> Coroutine[None, None, Pin]:
            return self._fetching.from_archive(request, found.path, found.archive_stamp, audience)

        return await self._sharing.get(f"{found.path} {found.archive_stamp} {_key(request, None)}", begin, listener)

    async def _over_http(self, request: InputRequest, listener: Listener) -> Pin:
        url = self._fetching.url_of(request)
        key = f"{url} {_key(request, None)}"
        return await self._sharing.get(key, lambda audience: self._fetching.from_url(request, url, audience), listener)


def _requests(prepared: PreparedTask) -> Iterator[tuple[str | None, Path, InputRequest]]:
    """Every request with the child whose it is (None: the task's own) and that one's folder."""
    for request in prepared.inputs:
        yield None, prepared.order.out_dir, request
    for child in prepared.order.children:
        for request in prepared.child_inputs.get(child.task_id, ()):
            yield child.task_id, child.out_dir, request


def _key(request: InputRequest, out_dir: Path | None) -> str:
    """Equal for requests that have the same answer."""
    relative = any(not Path(path).is_absolute() for path in request.paths)
    place = str(out_dir) if relative and request.kind == "file" else ""
    return f"{place} {request.model_dump(exclude={'name'})!r}"


def _content_of_entry(request: InputRequest, pin: Pin, check: CheckWanted) -> Path:
    check()
    root = content_root(pin.path, request.subdir or None) if pin.unpacked else pin.path
    return content_of(request, root)


def _said(what: str, error: Exception) -> str:
    """What is wrong with a candidate; errors of HTTP name the URL themselves."""
    text = str(error)
    if isinstance(error, NotUsableError):
        return f"{what} {text}"
    return text if what.removeprefix("url ") in text else f"{what}: {text}"


def _rejected_for_room(request: InputRequest, what: str, error: OSError) -> RejectedError:
    text = f"{request.name} cannot be had: {what}: no room on the disk of RESULTS_DIR ({error.strerror})"
    hint = "free space on the worker, or lower WORKER_CACHE_MAX_BYTES"
    return RejectedError(Failure(reason="disk_full", message=text, hint=hint, retryable=True))


def _succeeded(task: asyncio.Task[_Found]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def _report(on_progress: Callable[[InputProgress], None], name: str, done: int, total: int | None) -> None:
    on_progress(InputProgress(name, done, total))
