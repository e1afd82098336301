"""Threads of the inputs' own: a slow disk keeps nobody else in the daemon waiting."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

_MOST_THREADS: Final = 4

ResultT = TypeVar("ResultT")

CheckWanted = Callable[[], None]
"""Called between two pieces of work; its error, not to be caught, ends work that nobody waits for any more."""


class _StoppedError(Exception):
    """Nobody waits for it any more."""


class InputThreads:
    """A few threads for calls that block.

    Args:
        name: what they are called in a list of threads.
    """

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix=name)

    async def stoppable(self, call: Callable[[CheckWanted], ResultT]) -> ResultT:
        """Run something that changes nothing; when cancelled, do not wait for it.

        Args:
            call: what to do; it ends soon after being cancelled if it asks what it is given often enough.

        Raises:
            Exception: what `call` raised.
        """
        stopped = threading.Event()

        def check() -> None:
            if stopped.is_set():
                raise _StoppedError

        try:
            return await asyncio.get_running_loop().run_in_executor(self._pool, call, check)
        finally:
            stopped.set()

    async def to_its_end(self, call: Callable[[], ResultT], undo: Callable[[ResultT], object] | None = None) -> ResultT:
        """Run something short, and wait for its end also when cancelled.

        Args:
            call: what to do.
            undo: takes the result back if nobody is there any more to receive it.

        Raises:
            Exception: what `call` raised.
        """
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._pool, call)
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError:
            while not running.done():
                with contextlib.suppress(asyncio.CancelledError):  # the first one is passed on below
                    await asyncio.wait({running})
            if running.exception() is None and undo is not None:
                await asyncio.shield(loop.run_in_executor(self._pool, undo, running.result()))
            raise
        return running.result()

    def close(self) -> None:
        """Take no more calls. What runs goes on to its end, and is not waited for."""
        self._pool.shutdown(wait=False)
