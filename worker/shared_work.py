"""Work that several callers want at the same time is done once, and given up when the last of them has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Generic, TypeVar

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Listener:
    """Somebody who waits for a piece of work.

    Attributes:
        hear: is told bytes done, and bytes in all where they are known.
        is_urgent: whether a task cannot go on without it at this moment; else it is only done ahead.
    """

    hear: Callable[[int, int | None], None]
    is_urgent: Callable[[], bool]


@dataclass(frozen=True)
class Audience:
    """All who wait for one piece of work just now."""

    listeners: list[Listener] = field(default_factory=list)

    def tell(self, done: int, total: int | None) -> None:
        """Tell all how far it is."""
        for listener in self.listeners:
            listener.hear(done, total)

    @property
    def is_urgent(self) -> bool:
        """Whether it is urgent for one of them."""
        return any(listener.is_urgent() for listener in self.listeners)


@dataclass(frozen=True)
class _Work(Generic[ResultT]):
    running: asyncio.Task[ResultT]
    audience: Audience


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
        self, key: str, begin: Callable[[Audience], Coroutine[None, None, ResultT]], listener: Listener
    ) -> ResultT:
        """Join the work with this key, or begin it.

        A cancelled caller who was the last one waits until the work has ended.

        Args:
            key: what it is.
            begin: the work; it is given those who wait for it.
            listener: the caller.

        Raises:
            Exception: what the work raised.
        """
        work = self._works.get(key)
        if work is None or work.running.done():  # one that is over may have failed for want of urgency
            audience = Audience()
            work = self._works[key] = _Work(asyncio.create_task(begin(audience)), audience)
        listeners = work.audience.listeners
        listeners.append(listener)
        try:
            await asyncio.wait({work.running})
            return self._copy(work.running.result())
        finally:
            listeners.remove(listener)
            if not listeners:
                if self._works[key] is work:
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
