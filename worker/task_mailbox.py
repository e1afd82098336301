"""What an engine says about one of its tasks, until that task's execution reads it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Final

from executors.child_messages import Loaded, LogLine, Progress, TaskDone, TaskFailed

_UNREAD_MESSAGES: Final = 256
"""Messages that wait for the task's execution; when they are not taken, the engine has to wait."""

EngineMessage = Loaded | Progress | LogLine | TaskDone | TaskFailed


@dataclass(frozen=True)
class ChannelEnd:
    """No more messages will come. `garbage` holds what could not be understood, if that was the reason."""

    garbage: str = ""


class TaskMailbox:
    """Made when an engine gets the task; the engine's reader fills it."""

    def __init__(self) -> None:
        self._unread: asyncio.Queue[EngineMessage | None] = asyncio.Queue(_UNREAD_MESSAGES)
        self._end: ChannelEnd | None = None

    async def put(self, message: EngineMessage) -> None:
        """Add a message; waits while too many are unread."""
        await self._unread.put(message)

    def end(self, end: ChannelEnd) -> None:
        """After what is unread, nothing comes any more."""
        if self._end is None:
            self._end = end
            self.nudge()

    async def next(self, wait_sec: float) -> EngineMessage | ChannelEnd | None:
        """The next message, or None when the time is up or somebody called `nudge`."""
        if self._end is not None and self._unread.empty():
            return self._end
        try:
            async with asyncio.timeout(wait_sec):
                return await self._unread.get()
        except TimeoutError:
            return None

    def nudge(self) -> None:
        """Make `next` return."""
        with contextlib.suppress(asyncio.QueueFull):  # then it is about to return anyway
            self._unread.put_nowait(None)

    def close(self) -> None:
        """Nobody reads any more: let go of a reader that waits for room."""
        while not self._unread.empty():
            self._unread.get_nowait()
