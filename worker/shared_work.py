"""Work that several callers want at the same time is done once, and given up when the last of them has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")

Listener = Callable[[int, int | None], None]
"""Hears bytes done, and bytes in all where they are known."""


@dataclass
class _Work(Generic[ResultT]):
    running: asyncio.Task[ResultT]
    listeners: list[Listener] = field(default_factory=list)


class SharedWork(Generic[ResultT]):
    """Runs at most one piece of work for each key.

    Args:
        copy: makes one more of a result; each caller gets its own.
        drop: ends the use of the original, when every caller has its copy.
    """

    def __init__(self, copy: Callable[[ResultT], ResultT], drop: Callable[[ResultT], None]) -> None:
        self._copy = copy
        self._drop = drop
        self._works: dict[str, _Work[ResultT]] = {}

    async def get(
        self, key: str, begin: Callable[[Listener], Coroutine[None, None, ResultT]], listener: Listener
    ) -> ResultT:
        """Join the work with this key, or begin it.

        A cancelled caller who was the last one waits until the work has ended.

        Args:
            key: what it is.
            begin: the work; it is given something to tell its progress to.
            listener: hears its progress.

        Raises:
            Exception: what the work raised.
        """
        work = self._works.get(key)
        if work is None:
            listeners: list[Listener] = []
            work = _Work(asyncio.create_task(begin(lambda done, total: _tell(listeners, done, total))), listeners)
            self._works[key] = work
        work.listeners.append(listener)
        try:
            await asyncio.wait({work.running})
            return self._copy(work.running.result())
        finally:
            work.listeners.remove(listener)
            if not work.listeners:
                del self._works[key]
                await self._end(work)

    async def _end(self, work: _Work[ResultT]) -> None:
        """Nobody waits any more."""
        work.running.cancel()
        work.running.add_done_callback(self._drop_result)
        if not work.running.done():
            await asyncio.wait({work.running})

    def _drop_result(self, running: asyncio.Task[ResultT]) -> None:
        if not running.cancelled() and running.exception() is None:
            self._drop(running.result())


def _tell(listeners: list[Listener], done: int, total: int | None) -> None:
    for listener in listeners:
        listener(done, total)
