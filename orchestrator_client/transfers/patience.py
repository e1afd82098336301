"""How often and for how long an HTTP transfer is tried again."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import stamina

from orchestrator_client.errors import TransferError

_FIRST_PAUSE_SEC: Final = 0.5
_LONGEST_PAUSE_SEC: Final = 60.0

ResultT = TypeVar("ResultT")


async def with_patience(
    attempt: Callable[[], Awaitable[ResultT]], patience_sec: float, on_wait: Callable[[TransferError, float], None]
) -> ResultT:
    """Try until it works: after each TransferError wait 0.5 to 60 s, doubling, with jitter, or as the peer asked.

    Args:
        attempt: one attempt; called at least once.
        patience_sec: from now on, seconds. The last attempt begins no later.
        on_wait: hears each failure that is followed by another attempt, and the seconds until then.

    Raises:
        TransferError: the last failure, when patience is over.
        Exception: anything else that `attempt` raises, at once.
    """
    async for one in stamina.retry_context(on=Patience(patience_sec, on_wait=on_wait), attempts=None, timeout=None):
        with one:
            return await attempt()
    raise AssertionError("stamina ends with a result or an error")


class Patience:
    """Decides after each failure whether there is another attempt, and when. A hook for `stamina.retry_context`.

    Args:
        seconds: no attempt begins later than this from now.
        on_wait: hears each failure that is followed by another attempt, and the seconds until then.
        most_in_a_row: give up after so many failures without progress; None is never.
    """

    def __init__(
        self,
        seconds: float,
        *,
        on_wait: Callable[[TransferError, float], None] | None = None,
        most_in_a_row: int | None = None,
    ) -> None:
        self._deadline = time.monotonic() + seconds
        self._on_wait = on_wait
        self._most_in_a_row = most_in_a_row
        self._in_a_row = 0

    def progressed(self) -> None:
        """The attempt got somewhere: its failure counts as the first one."""
        self._in_a_row = 0

    def __call__(self, error: Exception) -> bool | float:
        """Seconds to wait, or False to give up."""
        if not isinstance(error, TransferError):
            return False
        self._in_a_row += 1
        left = self._deadline - time.monotonic()
        if left <= 0 or (self._most_in_a_row is not None and self._in_a_row >= self._most_in_a_row):
            return False
        if error.retry_after_sec is not None and error.retry_after_sec > left:
            return False  # coming earlier than asked would be no use
        pause = self._pause() if error.retry_after_sec is None else error.retry_after_sec
        pause = min(pause, left)
        if self._on_wait is not None:
            self._on_wait(error, pause)
        return pause

    def _pause(self) -> float:
        longest = min(math.ldexp(_FIRST_PAUSE_SEC, min(self._in_a_row - 1, 16)), _LONGEST_PAUSE_SEC)
        return longest * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not secrecy
