"""The cap on everything that is sent over HTTP (`WORKER_NETWORK_BANDWIDTH_BYTES_PER_SEC`)."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Final

_PIECE_SEC: Final = 0.04
"""A piece is what the cap lets through in this time: small enough to be smooth, large enough to be cheap."""
_CATCH_UP_SEC: Final = 0.06
"""What a late sender may make up for. With one piece it is the largest burst, also after hours without a send."""


class Bandwidth:
    """A token bucket that all senders share, in turns.

    Args:
        bytes_per_sec: the cap; None is none, and then nothing here costs anything.
        now: the clock, seconds.
        sleep: how to wait.
    """

    def __init__(
        self,
        bytes_per_sec: float | None,
        *,
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._rate = bytes_per_sec
        self._now = now
        self._sleep = sleep
        self._free_at = float("-inf")
        self._turn = asyncio.Lock()

    def piece(self, largest: int) -> int:
        """Bytes to send at once: at least 1, at most `largest`."""
        if self._rate is None:
            return largest
        return max(1, min(largest, int(self._rate * _PIECE_SEC)))

    async def take(self, size: int) -> float:
        """Wait until `size` bytes may be sent.

        Callers are let through in the order in which they came, so that callers with pieces of one size share evenly.

        Returns:
            Seconds waited.
        """
        if self._rate is None:
            return 0.0
        asked = self._now()
        async with self._turn:  # a fair lock: who has just been let through stands at the end of the line
            now = self._now()
            slot = max(self._free_at, now - _CATCH_UP_SEC)
            if slot > now:
                await self._sleep(slot - now)
            self._free_at = slot + size / self._rate
        return self._now() - asked
